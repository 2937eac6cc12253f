// CUDA C++ on the CPU: what a kernel's source needs when g++ compiles it. ../README.md says what
// the emulator shows and what it cannot.
#pragma once

#include "simt/device_math.h"
#include "simt/emulator.h"
#include "simt/vector_types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define threadIdx (::simt::self().index)
#define blockIdx (::simt::geometry().block_index)
#define blockDim (::simt::geometry().block)
#define gridDim (::simt::geometry().grid)
constexpr int warpSize = 32;

inline void __syncthreads(simt::Site site = simt::Site::here()) { simt::block_barrier(site); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, simt::Site site = simt::Site::here()) {
  simt::warp_barrier(simt::Op::syncwarp, mask, site);
}

namespace simt {
template <class T>
inline T shuffle_value(Op op, uint32_t mask, T value, unsigned source, Site site) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8),
                "a shuffle moves one 4- or 8-byte number");
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  return bits<T>(Bits(shuffle(op, mask, bits<Bits>(value), source, site)));
}
// The first lane of the group of `width` lanes that holds this one.
inline unsigned group_of(unsigned lane, int width) { return lane & ~unsigned(width - 1); }
}  // namespace simt

template <class T>
inline T __shfl_sync(uint32_t mask, T value, int source, int width = warpSize,
                     simt::Site site = simt::Site::here()) {
  const unsigned lane = simt::self().lane;
  return simt::shuffle_value(simt::Op::shfl, mask, value,
                             simt::group_of(lane, width) + (source & (width - 1)), site);
}
template <class T>
inline T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = warpSize,
                        simt::Site site = simt::Site::here()) {
  const unsigned lane = simt::self().lane;
  const bool inside = lane - simt::group_of(lane, width) >= delta;
  return simt::shuffle_value(simt::Op::shfl_up, mask, value, inside ? lane - delta : lane, site);
}
template <class T>
inline T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = warpSize,
                          simt::Site site = simt::Site::here()) {
  const unsigned lane = simt::self().lane;
  const bool inside = lane + delta < simt::group_of(lane, width) + width;
  return simt::shuffle_value(simt::Op::shfl_down, mask, value, inside ? lane + delta : lane, site);
}
template <class T>
inline T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = warpSize,
                         simt::Site site = simt::Site::here()) {
  const unsigned lane = simt::self().lane;
  const unsigned source = lane ^ unsigned(lanes);
  const bool inside = source < simt::group_of(lane, width) + width;
  return simt::shuffle_value(simt::Op::shfl_xor, mask, value, inside ? source : lane, site);
}

inline unsigned __ballot_sync(uint32_t mask, int predicate, simt::Site site = simt::Site::here()) {
  return simt::vote(simt::Op::ballot, mask, predicate != 0, site);
}
inline int __any_sync(uint32_t mask, int predicate, simt::Site site = simt::Site::here()) {
  return simt::vote(simt::Op::any, mask, predicate != 0, site) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, simt::Site site = simt::Site::here()) {
  return simt::vote(simt::Op::all, mask, predicate != 0, site) == simt::participants();
}

template <class T>
inline T __ldg(const T* address) {
  return *address;
}
