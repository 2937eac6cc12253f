// Vec<T> on AArch64's Advanced SIMD: 4 floats or 2 doubles.
#pragma once

#define XLMR_VEC_NATIVE
#include <arm_neon.h>

#include "cpu/vec.h"

namespace xlmr::XLMR_ISA {
namespace {

// A step of the 12 x 2 register tile is 24 multiply-adds and, where A is a panel, 5 loads: 2 of B
// and 3 of A, whose lanes fmla takes one by one. 8 x 3 loads as much, but its 12 columns divide
// neither heads of 64 nor blocks of 128 keys.
constexpr int kVectorRegisters = 32;
constexpr bool kFmaByLane = true;

template <>
struct Vec<float> {
  using Mask = uint32x4_t;
  static constexpr int size = 4;
  float32x4_t v;

  Vec() = default;
  XLMR_INLINE Vec(float32x4_t data) : v(data) {}
  XLMR_INLINE explicit Vec(float x) : v(vdupq_n_f32(x)) {}
  static XLMR_INLINE Vec zero() { return vdupq_n_f32(0); }
  static XLMR_INLINE Vec load(const float* p) { return vld1q_f32(p); }
  static XLMR_INLINE Vec load(const float* p, int64_t n) {  // there are no masked loads
    if (n == size) return load(p);
    float32x2_t low = vdup_n_f32(0), high = low;
    if (n == 1) low = vld1_lane_f32(p, low, 0);
    if (n >= 2) low = vld1_f32(p);
    if (n == 3) high = vld1_lane_f32(p + 2, high, 0);
    return vcombine_f32(low, high);
  }
  XLMR_INLINE void store(float* p) const { vst1q_f32(p, v); }
  XLMR_INLINE void store(float* p, int64_t n) const {
    if (n == size) return store(p);
    if (n == 1) vst1q_lane_f32(p, v, 0);
    if (n >= 2) vst1_f32(p, vget_low_f32(v));
    if (n == 3) vst1q_lane_f32(p + 2, v, 2);
  }
  XLMR_INLINE Vec operator+(Vec o) const { return vaddq_f32(v, o.v); }
  XLMR_INLINE Vec operator-(Vec o) const { return vsubq_f32(v, o.v); }
  XLMR_INLINE Vec operator*(Vec o) const { return vmulq_f32(v, o.v); }
  XLMR_INLINE Vec operator/(Vec o) const { return vdivq_f32(v, o.v); }
  XLMR_INLINE Mask operator<(Vec o) const { return vcltq_f32(v, o.v); }
  XLMR_INLINE float lane(int i) const { return v[i]; }
};

template <>
struct Vec<double> {
  using Mask = uint64x2_t;
  static constexpr int size = 2;
  float64x2_t v;

  Vec() = default;
  XLMR_INLINE Vec(float64x2_t data) : v(data) {}
  XLMR_INLINE explicit Vec(double x) : v(vdupq_n_f64(x)) {}
  static XLMR_INLINE Vec zero() { return vdupq_n_f64(0); }
  static XLMR_INLINE Vec load(const double* p) { return vld1q_f64(p); }
  static XLMR_INLINE Vec load(const double* p, int64_t n) {
    return n == size ? load(p) : n == 1 ? Vec(vld1q_lane_f64(p, vdupq_n_f64(0), 0)) : zero();
  }
  XLMR_INLINE void store(double* p) const { vst1q_f64(p, v); }
  XLMR_INLINE void store(double* p, int64_t n) const {
    if (n == size) return store(p);
    if (n == 1) vst1q_lane_f64(p, v, 0);
  }
  XLMR_INLINE Vec operator+(Vec o) const { return vaddq_f64(v, o.v); }
  XLMR_INLINE Vec operator-(Vec o) const { return vsubq_f64(v, o.v); }
  XLMR_INLINE Vec operator*(Vec o) const { return vmulq_f64(v, o.v); }
  XLMR_INLINE Vec operator/(Vec o) const { return vdivq_f64(v, o.v); }
  XLMR_INLINE Mask operator<(Vec o) const { return vcltq_f64(v, o.v); }
  XLMR_INLINE double lane(int i) const { return v[i]; }
};

XLMR_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return vfmaq_f32(c.v, a.v, b.v);
}
XLMR_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return vfmaq_f64(c.v, a.v, b.v);
}
XLMR_INLINE Vec<float> select(uint32x4_t m, Vec<float> yes, Vec<float> no) {
  return vbslq_f32(m, yes.v, no.v);
}
XLMR_INLINE Vec<double> select(uint64x2_t m, Vec<double> yes, Vec<double> no) {
  return vbslq_f64(m, yes.v, no.v);
}
// vmaxq and vminq answer NaN where either operand is NaN, and +0 for max(+0, -0).
template <class T>
XLMR_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return select(b < a, a, b);
}
template <class T>
XLMR_INLINE Vec<T> min(Vec<T> a, Vec<T> b) {
  return select(a < b, a, b);
}
XLMR_INLINE Vec<float> abs(Vec<float> a) { return vabsq_f32(a.v); }
XLMR_INLINE Vec<float> copysign(Vec<float> magnitude, Vec<float> s) {
  return vbslq_f32(vdupq_n_u32(0x80000000), s.v, magnitude.v);
}
XLMR_INLINE Vec<float> round(Vec<float> a) { return vrndnq_f32(a.v); }
XLMR_INLINE Vec<float> pow2(Vec<float> n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n.v), vdupq_n_s32(127)), 23));
}
// 64-bit lanes, as many as fill a vector; the product of their low halves.
using Words = uint64_t __attribute__((vector_size(16)));
XLMR_INLINE Words multiply_low(Words a, Words b) {
  return reinterpret_cast<Words>(vmull_u32(vmovn_u64(reinterpret_cast<uint64x2_t>(a)),
                                           vmovn_u64(reinterpret_cast<uint64x2_t>(b))));
}
XLMR_INLINE float reduce_add(Vec<float> a) {
  const float32x2_t s = vadd_f32(vget_low_f32(a.v), vget_high_f32(a.v));
  return vget_lane_f32(s, 0) + vget_lane_f32(s, 1);
}
XLMR_INLINE double reduce_add(Vec<double> a) { return a.lane(0) + a.lane(1); }
XLMR_INLINE float reduce_max(Vec<float> a) {
  a = max(a, Vec<float>(vextq_f32(a.v, a.v, 2)));
  return max(a, Vec<float>(vextq_f32(a.v, a.v, 1))).lane(0);
}
XLMR_INLINE double reduce_max(Vec<double> a) {
  return max(a, Vec<double>(vextq_f64(a.v, a.v, 1))).lane(0);
}

XLMR_INLINE void transpose(Vec<float> (&r)[4]) {
  const auto pairs = [](float32x4_t x) { return vreinterpretq_f64_f32(x); };
  const auto floats = [](float64x2_t x) { return vreinterpretq_f32_f64(x); };
  const float64x2_t a = pairs(vtrn1q_f32(r[0].v, r[1].v)), b = pairs(vtrn2q_f32(r[0].v, r[1].v));
  const float64x2_t c = pairs(vtrn1q_f32(r[2].v, r[3].v)), d = pairs(vtrn2q_f32(r[2].v, r[3].v));
  r[0].v = floats(vtrn1q_f64(a, c));
  r[1].v = floats(vtrn1q_f64(b, d));
  r[2].v = floats(vtrn2q_f64(a, c));
  r[3].v = floats(vtrn2q_f64(b, d));
}
XLMR_INLINE void transpose(Vec<double> (&r)[2]) {
  const float64x2_t a = r[0].v, b = r[1].v;
  r[0].v = vtrn1q_f64(a, b);
  r[1].v = vtrn2q_f64(a, b);
}

}  // namespace
}  // namespace xlmr::XLMR_ISA
