// Vec<T> on AVX-512 (F, BW, DQ, VL): 16 floats or 8 doubles.
#pragma once

#define XLMR_VEC_NATIVE
#include <immintrin.h>

#include "cpu/vec.h"

namespace xlmr::XLMR_ISA {
namespace {

constexpr int kVectorRegisters = 32;
constexpr bool kFmaByLane = false;

XLMR_INLINE __mmask16 first_lanes(int64_t n) {
  return static_cast<__mmask16>((uint32_t{1} << n) - 1);
}

template <>
struct Vec<float> {
  using Mask = __mmask16;
  static constexpr int size = 16;
  __m512 v;

  Vec() = default;
  XLMR_INLINE Vec(__m512 data) : v(data) {}
  XLMR_INLINE explicit Vec(float x) : v(_mm512_set1_ps(x)) {}
  static XLMR_INLINE Vec zero() { return _mm512_setzero_ps(); }
  static XLMR_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static XLMR_INLINE Vec load(const float* p, int64_t n) {
    return _mm512_maskz_loadu_ps(first_lanes(n), p);
  }
  XLMR_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  XLMR_INLINE void store(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
  XLMR_INLINE Vec operator+(Vec o) const { return _mm512_add_ps(v, o.v); }
  XLMR_INLINE Vec operator-(Vec o) const { return _mm512_sub_ps(v, o.v); }
  XLMR_INLINE Vec operator*(Vec o) const { return _mm512_mul_ps(v, o.v); }
  XLMR_INLINE Vec operator/(Vec o) const { return _mm512_div_ps(v, o.v); }
  XLMR_INLINE Mask operator<(Vec o) const { return _mm512_cmp_ps_mask(v, o.v, _CMP_LT_OQ); }
  XLMR_INLINE float lane(int i) const { return v[i]; }
};

template <>
struct Vec<double> {
  using Mask = __mmask8;
  static constexpr int size = 8;
  __m512d v;

  Vec() = default;
  XLMR_INLINE Vec(__m512d data) : v(data) {}
  XLMR_INLINE explicit Vec(double x) : v(_mm512_set1_pd(x)) {}
  static XLMR_INLINE Vec zero() { return _mm512_setzero_pd(); }
  static XLMR_INLINE Vec load(const double* p) { return _mm512_loadu_pd(p); }
  static XLMR_INLINE Vec load(const double* p, int64_t n) {
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>(first_lanes(n)), p);
  }
  XLMR_INLINE void store(double* p) const { _mm512_storeu_pd(p, v); }
  XLMR_INLINE void store(double* p, int64_t n) const {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_lanes(n)), v);
  }
  XLMR_INLINE Vec operator+(Vec o) const { return _mm512_add_pd(v, o.v); }
  XLMR_INLINE Vec operator-(Vec o) const { return _mm512_sub_pd(v, o.v); }
  XLMR_INLINE Vec operator*(Vec o) const { return _mm512_mul_pd(v, o.v); }
  XLMR_INLINE Vec operator/(Vec o) const { return _mm512_div_pd(v, o.v); }
  XLMR_INLINE Mask operator<(Vec o) const { return _mm512_cmp_pd_mask(v, o.v, _CMP_LT_OQ); }
  XLMR_INLINE double lane(int i) const { return v[i]; }
};

XLMR_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm512_fmadd_ps(a.v, b.v, c.v);
}
XLMR_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return _mm512_fmadd_pd(a.v, b.v, c.v);
}
XLMR_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return _mm512_max_ps(a.v, b.v); }
XLMR_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return _mm512_max_pd(a.v, b.v); }
XLMR_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return _mm512_min_ps(a.v, b.v); }
XLMR_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return _mm512_min_pd(a.v, b.v); }
XLMR_INLINE Vec<float> select(__mmask16 m, Vec<float> yes, Vec<float> no) {
  return _mm512_mask_blend_ps(m, no.v, yes.v);
}
XLMR_INLINE Vec<double> select(__mmask8 m, Vec<double> yes, Vec<double> no) {
  return _mm512_mask_blend_pd(m, no.v, yes.v);
}
XLMR_INLINE Vec<float> abs(Vec<float> a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), a.v); }
XLMR_INLINE Vec<float> copysign(Vec<float> magnitude, Vec<float> s) {
  const __m512 sign = _mm512_set1_ps(-0.0f);
  return _mm512_or_ps(_mm512_andnot_ps(sign, magnitude.v), _mm512_and_ps(sign, s.v));
}
XLMR_INLINE Vec<float> round(Vec<float> a) {
  return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
XLMR_INLINE Vec<float> pow2(Vec<float> n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}
// 64-bit lanes, as many as fill a vector; the product of their low halves.
using Words = uint64_t __attribute__((vector_size(64)));
XLMR_INLINE Words multiply_low(Words a, Words b) {
  return reinterpret_cast<Words>(
      _mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
XLMR_INLINE float reduce_add(Vec<float> a) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 t = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_shuffle_ps(t, t, 1)));
}
XLMR_INLINE double reduce_add(Vec<double> a) {
  const __m256d h = _mm256_add_pd(_mm512_castpd512_pd256(a.v), _mm512_extractf64x4_pd(a.v, 1));
  const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(h), _mm256_extractf128_pd(h, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}
XLMR_INLINE float reduce_max(Vec<float> a) {
  const __m256 h = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 s = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 t = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(t, _mm_shuffle_ps(t, t, 1)));
}
XLMR_INLINE double reduce_max(Vec<double> a) {
  const __m256d h = _mm256_max_pd(_mm512_castpd512_pd256(a.v), _mm512_extractf64x4_pd(a.v, 1));
  const __m128d s = _mm_max_pd(_mm256_castpd256_pd128(h), _mm256_extractf128_pd(h, 1));
  return _mm_cvtsd_f64(_mm_max_sd(s, _mm_unpackhi_pd(s, s)));
}

// Quarters of 128 bits: 4 x 4 blocks are turned within, then the blocks change places.
XLMR_INLINE void transpose(Vec<float> (&r)[16]) {
  __m512 t[16], u[16];
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
#pragma GCC unroll 4
  for (int q = 0; q < 16; q += 4) {
    u[q + 0] = _mm512_shuffle_ps(t[q], t[q + 2], 0x44);
    u[q + 1] = _mm512_shuffle_ps(t[q], t[q + 2], 0xee);
    u[q + 2] = _mm512_shuffle_ps(t[q + 1], t[q + 3], 0x44);
    u[q + 3] = _mm512_shuffle_ps(t[q + 1], t[q + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(u[i], u[i + 4], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0xdd);
    r[i].v = _mm512_shuffle_f32x4(a, c, 0x88);
    r[i + 4].v = _mm512_shuffle_f32x4(b, d, 0x88);
    r[i + 8].v = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[i + 12].v = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}
XLMR_INLINE void transpose(Vec<double> (&r)[8]) {
  __m512d t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm512_unpacklo_pd(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_pd(r[2 * i].v, r[2 * i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512d a = _mm512_shuffle_f64x2(t[i], t[i + 2], 0x88);
    const __m512d b = _mm512_shuffle_f64x2(t[i], t[i + 2], 0xdd);
    const __m512d c = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0x88);
    const __m512d d = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0xdd);
    r[i].v = _mm512_shuffle_f64x2(a, c, 0x88);
    r[i + 2].v = _mm512_shuffle_f64x2(b, d, 0x88);
    r[i + 4].v = _mm512_shuffle_f64x2(a, c, 0xdd);
    r[i + 6].v = _mm512_shuffle_f64x2(b, d, 0xdd);
  }
}

}  // namespace
}  // namespace xlmr::XLMR_ISA
