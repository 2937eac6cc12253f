// Finds data races in kernels compiled with -fsanitize=thread, whose every access to memory calls
// the functions of tsan_hooks.cpp.
//
// Two accesses to one byte, one of them a write, are a race where nothing orders them:
//   by threads of two blocks of a launch: always;
//   by two warps of a block: no __syncthreads between them;
//   by two lanes of a warp: neither __syncthreads nor __syncwarp between them. Shuffles and votes
//   order no memory, says CUDA's manual.
// A race is found in whatever order the two happen to run. Memory that only one emulated thread can
// see (its stack) is left out.
#pragma once

#include <cstddef>

namespace simt {

// Ends the process where this access of the running thread races with an earlier one. `code` is
// where it happens. Outside of launches it does nothing.
#ifdef SIMT_RACE
void check_access(const void* address, size_t bytes, bool write, const void* code);
#else
inline void check_access(const void*, size_t, bool, const void*) {}
#endif

}  // namespace simt
