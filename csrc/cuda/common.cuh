// The one place that knows which compiler reads the kernels: nvcc, or g++ over the emulator of
// tests/simt. Launching, shared memory, and the math that both have.
#pragma once

#include <cmath>
#include <type_traits>

#include "core/philox.h"
#include "core/workspace.h"
#include "ops.h"

#if defined(XLMR_SIMT)
#include "simt/ptx.h"
#include "simt/simt.h"
#define XLMR_CUDA_NS simt
// All shared memory is dynamic, and exactly as large as the launch says.
#define XLMR_SHARED(T, name) T* name = static_cast<T*>(::simt::shared_memory())
#else
#include <cuda_runtime.h>

#include "cuda/ptx.cuh"
#define XLMR_CUDA_NS cuda
#define XLMR_SHARED(T, name)                                          \
  extern __shared__ __align__(16) unsigned char xlmr_shared_memory[]; \
  T* name = reinterpret_cast<T*>(xlmr_shared_memory)
#endif

namespace xlmr::XLMR_CUDA_NS {

// The sentence about a launch that failed; it lives until the thread's next failure.
Status launch_failure(const char* name, const char* error, int64_t blocks, int threads,
                      size_t shared_bytes, const ExecContext& ctx);

namespace {

// The overloads for float; without them g++ would take those for double.
using std::erf;
using std::exp;
using std::fma;
using std::fmax;
using std::log;
using std::sqrt;
using std::tanh;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr size_t kMostShared = 99 << 10;  // bytes a block may have on every supported architecture
constexpr int64_t kMostBlocks = 0x7fffffff;

template <class T>
struct Same {
  using type = T;
};

#if defined(XLMR_SIMT)

template <class... P>
const char* launch_checked(const char* name, void (*kernel)(P...), unsigned blocks, int threads,
                           size_t shared_bytes, const ExecContext&, P... args) {
  return ::simt::launch(name, dim3(blocks), dim3(static_cast<unsigned>(threads)), shared_bytes,
                        [=] { kernel(args...); });
}

#else

template <class... P>
const char* launch_checked(const char*, void (*kernel)(P...), unsigned blocks, int threads,
                           size_t shared_bytes, const ExecContext& ctx, P... args) {
  int before = -1;
  cudaError_t error = cudaGetDevice(&before);
  const bool other = error == cudaSuccess && before != ctx.device;
  if (other) error = cudaSetDevice(ctx.device);
  const void* function = reinterpret_cast<const void*>(kernel);
  // Above 48 KiB only where asked for; a call that changes nothing costs next to nothing.
  if (error == cudaSuccess && shared_bytes > 48 << 10) {
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    void* values[] = {&args...};
    error = cudaLaunchKernel(function, dim3(blocks), dim3(static_cast<unsigned>(threads)), values,
                             shared_bytes, static_cast<cudaStream_t>(ctx.stream));
  }
  if (other) cudaSetDevice(before);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // it has been told; the next caller's check must not find it
  return cudaGetErrorName(error);
}

#endif

// Runs kernel(args...) on `blocks` blocks of `threads` threads, in order with the stream. Nothing
// is run for 0 blocks. No allocation and no synchronisation: a CUDA graph may capture it.
template <class... P>
Status launch(const char* name, void (*kernel)(P...), int64_t blocks, int threads,
              size_t shared_bytes, const ExecContext& ctx, typename Same<P>::type... args) {
  if (blocks == 0) return nullptr;
  const char* error = "more blocks than a grid has";
  if (blocks > 0 && blocks <= kMostBlocks) {
    error = launch_checked<P...>(name, kernel, static_cast<unsigned>(blocks), threads, shared_bytes,
                                 ctx, args...);
  }
  if (error == nullptr) return nullptr;
  return launch_failure(name, error, blocks, threads, shared_bytes, ctx);
}

// Four values that lie side by side in shared memory, read at once. Rows there are padded by
// kPad elements, which keeps quads aligned and spreads columns over the banks.
template <class T>
struct alignas(16) Quad {
  T v[4];
};
template <class T>
constexpr int kPad = static_cast<int>(16 / sizeof(T));

template <class T>
__device__ __forceinline__ Quad<T> load_quad(const T* from) {
  return *reinterpret_cast<const Quad<T>*>(from);
}
template <class T>
__device__ __forceinline__ void store_quad(T* to, const Quad<T>& values) {
  *reinterpret_cast<Quad<T>*>(to) = values;
}

// The sum over groups of `width` lanes, the same bits in every lane of a group.
template <class T>
__device__ __forceinline__ T sum_lanes(T x, int width = kWarp) {
  for (int lanes = width / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}
template <class T>
__device__ __forceinline__ T max_lanes(T x, int width) {
  for (int lanes = width / 2; lanes > 0; lanes /= 2) {
    x = fmax(x, __shfl_xor_sync(kAllLanes, x, lanes));
  }
  return x;
}

}  // namespace
}  // namespace xlmr::XLMR_CUDA_NS
