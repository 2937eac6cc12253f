// The functions that code compiled with -fsanitize=thread calls (GCC's sanitizer.def), in place of
// ThreadSanitizer's own, which would take the threads of a block for one. What a kernel needs and
// is not here fails to link.
#include <cstddef>
#include <cstdint>

#include "simt/race.h"
#include "simt/state.h"

#define SIMT_HOOK extern "C" __attribute__((used))

SIMT_HOOK void __tsan_init() {}
SIMT_HOOK void __tsan_func_entry(void*) {}
SIMT_HOOK void __tsan_func_exit() {}
SIMT_HOOK void __tsan_vptr_update(void**, void*) {}

#define SIMT_ACCESS(bytes)                                                  \
  SIMT_HOOK void __tsan_read##bytes(void* address) {                        \
    simt::check_access(address, bytes, false, __builtin_return_address(0)); \
  }                                                                         \
  SIMT_HOOK void __tsan_write##bytes(void* address) {                       \
    simt::check_access(address, bytes, true, __builtin_return_address(0));  \
  }
SIMT_ACCESS(1)
SIMT_ACCESS(2)
SIMT_ACCESS(4)
SIMT_ACCESS(8)
SIMT_ACCESS(16)

SIMT_HOOK void __tsan_read_range(void* address, size_t bytes) {
  simt::check_access(address, bytes, false, __builtin_return_address(0));
}
SIMT_HOOK void __tsan_write_range(void* address, size_t bytes) {
  simt::check_access(address, bytes, true, __builtin_return_address(0));
}

// Launchers may use atomics (the guard of a local static is one). For kernels they are not
// modelled.
namespace {
void refuse_in_kernel() {
  if (simt::running) simt::fail("an atomic operation; the race detector does not model them");
}
}  // namespace

#define SIMT_ATOMIC(bits)                                                                          \
  SIMT_HOOK uint##bits##_t __tsan_atomic##bits##_load(const uint##bits##_t* address, int) {        \
    refuse_in_kernel();                                                                            \
    return __atomic_load_n(address, __ATOMIC_SEQ_CST);                                             \
  }                                                                                                \
  SIMT_HOOK void __tsan_atomic##bits##_store(uint##bits##_t* address, uint##bits##_t value, int) { \
    refuse_in_kernel();                                                                            \
    __atomic_store_n(address, value, __ATOMIC_SEQ_CST);                                            \
  }                                                                                                \
  SIMT_HOOK uint##bits##_t __tsan_atomic##bits##_fetch_add(uint##bits##_t* address,                \
                                                           uint##bits##_t value, int) {            \
    refuse_in_kernel();                                                                            \
    return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);                                   \
  }
SIMT_ATOMIC(8)
SIMT_ATOMIC(32)
SIMT_ATOMIC(64)
