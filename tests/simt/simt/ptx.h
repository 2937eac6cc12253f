// The functions of csrc/cuda/ptx.cuh over the emulator; that file says what they do.
//
// A cp.async lands at the wait for its group and not before; until then its destination holds
// poison. The sums of an mma are of float32 in rising order of k, which is not the (undocumented)
// order of a device.
#pragma once

#include "simt/half.h"
#include "simt/simt.h"

namespace simt {
// The lane's 8 elements of A, 4 of B and 4 of C; C becomes the result.
void mma_m16n8k16(const float (&a)[8], const float (&b)[4], float (&c)[4], Site site);
void load_matrices(uint32_t* registers, unsigned matrices, bool transpose, const void* row,
                   Site site);
void copy_16_async(void* shared, const void* global);
void commit_copies();
void wait_for_copies(unsigned groups_left);

template <float (*convert)(uint32_t)>
void mma_of_halves(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  float wide_a[8], wide_b[4];
  for (int i = 0; i < 8; ++i) wide_a[i] = convert(a[i / 2] >> 16 * (i % 2) & 0xffff);
  for (int i = 0; i < 4; ++i) wide_b[i] = convert(b[i / 2] >> 16 * (i % 2) & 0xffff);
  mma_m16n8k16(wide_a, wide_b, c, site);
}
}  // namespace simt

namespace ptx {

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     simt::Site site = simt::Site::here()) {
  simt::mma_of_halves<simt::bf16_to_float>(c, a, b, site);
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    simt::Site site = simt::Site::here()) {
  simt::mma_of_halves<simt::f16_to_float>(c, a, b, site);
}

template <int matrices>
inline void ldmatrix(uint32_t (&registers)[matrices], const void* row,
                     simt::Site site = simt::Site::here()) {
  static_assert(matrices == 1 || matrices == 2 || matrices == 4, "x1, x2 or x4");
  simt::load_matrices(registers, matrices, false, row, site);
}
template <int matrices>
inline void ldmatrix_trans(uint32_t (&registers)[matrices], const void* row,
                           simt::Site site = simt::Site::here()) {
  static_assert(matrices == 1 || matrices == 2 || matrices == 4, "x1, x2 or x4");
  simt::load_matrices(registers, matrices, true, row, site);
}

inline void cp_async_16(void* shared, const void* global, bool valid = true) {
  simt::copy_16_async(shared, valid ? global : nullptr);
}
inline void cp_async_commit() { simt::commit_copies(); }
template <int groups_left>
inline void cp_async_wait() {
  simt::wait_for_copies(groups_left);
}

inline uint32_t pack_bf16(float low, float high) {
  return simt::float_to_bf16(low) | simt::float_to_bf16(high) << 16;
}
inline uint32_t pack_f16(float low, float high) {
  return simt::float_to_f16(low) | simt::float_to_f16(high) << 16;
}
inline float2 unpack_bf16(uint32_t pair) {
  return {simt::bf16_to_float(pair & 0xffff), simt::bf16_to_float(pair >> 16)};
}
inline float2 unpack_f16(uint32_t pair) {
  return {simt::f16_to_float(pair & 0xffff), simt::f16_to_float(pair >> 16)};
}

}  // namespace ptx
