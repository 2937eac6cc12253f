// Stacks that can be left and taken up again, for the threads of an emulated block.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT  // no switch of our own for this processor
#endif
#ifdef SIMT_UCONTEXT
#include <ucontext.h>
#endif

namespace simt {

struct Fiber {
  static constexpr size_t stack_bytes = 128 << 10;

#ifdef SIMT_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  // Bounds of the stack, for AddressSanitizer; those of the operating system's own stack become
  // known when it is first left.
  const void* stack_low = nullptr;
  size_t stack_size = 0;
};

// Leaves `from`, which is running, for `to`. Returns when something switches to `from` again.
void switch_fiber(Fiber& from, Fiber& to);

// Hands out fibers that run `body`, which never returns. One pool in an operating system's thread.
class FiberPool {
 public:
  explicit FiberPool(void (*body)());
  ~FiberPool();
  FiberPool(const FiberPool&) = delete;
  FiberPool& operator=(const FiberPool&) = delete;

  Fiber& take() {
    if (idle_.empty()) grow();
    Fiber& fiber = *idle_.back();
    idle_.pop_back();
    return fiber;
  }
  void put_back(Fiber& fiber) { idle_.push_back(&fiber); }

 private:
  void grow();

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<void*> stacks_;
  std::vector<Fiber*> idle_;
};

}  // namespace simt
