#include "simt/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef SIMT_UCONTEXT
// void simt_switch_stack(void** save, void* load): keeps the registers that a callee must preserve
// on the stack being left. swapcontext would enter the kernel for the signal mask on each switch.
extern "C" void simt_switch_stack(void** save, void* load);
asm(R"(
.text
.p2align 4
.hidden simt_switch_stack
.globl simt_switch_stack
.type simt_switch_stack, @function
simt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stack, .-simt_switch_stack
)");
#endif

namespace simt {
namespace {

#ifdef __SANITIZE_ADDRESS__
thread_local Fiber* left = nullptr;  // the fiber that the last switch left
#endif
thread_local void (*fiber_body)() = nullptr;

// Tells AddressSanitizer, on the new stack, that the switch is over.
void arrived([[maybe_unused]] void* fake_stack) {
#ifdef __SANITIZE_ADDRESS__
  const void* low = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(fake_stack, &low, &size);
  left->stack_low = low;
  left->stack_size = size;
#endif
}

void first_entry() {
  arrived(nullptr);
  fiber_body();
  std::abort();  // a body never returns
}

}  // namespace

void switch_fiber(Fiber& from, Fiber& to) {
  void* fake_stack = nullptr;
#ifdef __SANITIZE_ADDRESS__
  left = &from;
  __sanitizer_start_switch_fiber(&fake_stack, to.stack_low, to.stack_size);
#endif
#ifdef SIMT_UCONTEXT
  swapcontext(&from.context, &to.context);
#else
  simt_switch_stack(&from.stack_pointer, to.stack_pointer);
#endif
  arrived(fake_stack);
}

void FiberPool::grow() {
  // The lowest page of each stack faults, so that a stack that overflows does not reach the next.
  void* memory = mmap(nullptr, Fiber::stack_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
    std::perror("simt: no memory for the stack of an emulated thread");
    std::abort();
  }
  stacks_.push_back(memory);
  fibers_.push_back(std::make_unique<Fiber>());
  Fiber& fiber = *fibers_.back();
  auto* low = static_cast<char*>(memory) + page;
  // Tops at differing distances from a page's end: else the hot lines of all stacks would share a
  // few sets of the cache.
  const size_t colour = (fibers_.size() % 29) * 320;
  auto* top = static_cast<char*>(memory) + Fiber::stack_bytes - colour / 16 * 16;
  fiber.stack_low = low;
  fiber.stack_size = size_t(top - low);
#ifdef SIMT_UCONTEXT
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = low;
  fiber.context.uc_stack.ss_size = fiber.stack_size;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, first_entry, 0);
#else
  auto** slot = reinterpret_cast<void**>(top) - 2;  // as after a call: 8 modulo 16 on entry
  *slot = reinterpret_cast<void*>(&first_entry);
  for (int saved = 0; saved < 6; ++saved) *--slot = nullptr;
  fiber.stack_pointer = slot;
#endif
  idle_.push_back(&fiber);
}

FiberPool::FiberPool(void (*body)()) { fiber_body = body; }

FiberPool::~FiberPool() {
  for (void* stack : stacks_) munmap(stack, Fiber::stack_bytes);
}

}  // namespace simt
