// The types that tensors are stored in, and the type that is computed in: float32 for 16 bits, else
// the type itself.
#pragma once

#include "cuda/common.cuh"

namespace xlmr::XLMR_CUDA_NS {
namespace {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
constexpr bool kIs16Bits = std::is_same_v<T, Bfloat16> || std::is_same_v<T, Float16>;

// Of sums, statistics, and all that lies between a load and a store.
template <class T>
using Wide = std::conditional_t<kIs16Bits<T>, float, T>;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(Bfloat16 x) { return ptx::unpack_bf16(x.bits).x; }
__device__ __forceinline__ float widen(Float16 x) { return ptx::unpack_f16(x.bits).x; }

// Two numbers rounded to 16 bits, as a register of a tensor core's operand holds them.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  static_assert(kIs16Bits<T>, "a pair of 16 bits");
  if constexpr (std::is_same_v<T, Bfloat16>) {
    return ptx::pack_bf16(low, high);
  } else {
    return ptx::pack_f16(low, high);
  }
}

// To nearest, ties to even.
template <class T>
__device__ __forceinline__ T narrow(Wide<T> x) {
  if constexpr (kIs16Bits<T>) {
    return T{static_cast<uint16_t>(pack<T>(x, 0.0f))};
  } else {
    return x;
  }
}

// What a load finds where x was stored.
template <class T>
__device__ __forceinline__ Wide<T> stored(Wide<T> x) {
  return widen(narrow<T>(x));
}

}  // namespace
}  // namespace xlmr::XLMR_CUDA_NS
