// Vec<T> on AVX2 and FMA: 8 floats or 4 doubles.
#pragma once

#define XLMR_VEC_NATIVE
#include <immintrin.h>

#include "cpu/vec.h"

namespace xlmr::XLMR_ISA {
namespace {

constexpr int kVectorRegisters = 16;
constexpr bool kFmaByLane = false;

// Sliding a window over these words gives the mask of the first n lanes.
alignas(32) constexpr int32_t kTailMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1,
                                               0,  0,  0,  0,  0,  0,  0,  0};

XLMR_INLINE __m256i tail_mask(int64_t words) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kTailMask + 8 - words));
}

template <>
struct Vec<float> {
  using Mask = __m256;
  static constexpr int size = 8;
  __m256 v;

  Vec() = default;
  XLMR_INLINE Vec(__m256 data) : v(data) {}
  XLMR_INLINE explicit Vec(float x) : v(_mm256_set1_ps(x)) {}
  static XLMR_INLINE Vec zero() { return _mm256_setzero_ps(); }
  static XLMR_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static XLMR_INLINE Vec load(const float* p, int64_t n) {
    return _mm256_maskload_ps(p, tail_mask(n));
  }
  XLMR_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  XLMR_INLINE void store(float* p, int64_t n) const { _mm256_maskstore_ps(p, tail_mask(n), v); }
  XLMR_INLINE Vec operator+(Vec o) const { return _mm256_add_ps(v, o.v); }
  XLMR_INLINE Vec operator-(Vec o) const { return _mm256_sub_ps(v, o.v); }
  XLMR_INLINE Vec operator*(Vec o) const { return _mm256_mul_ps(v, o.v); }
  XLMR_INLINE Vec operator/(Vec o) const { return _mm256_div_ps(v, o.v); }
  XLMR_INLINE Mask operator<(Vec o) const { return _mm256_cmp_ps(v, o.v, _CMP_LT_OQ); }
  XLMR_INLINE float lane(int i) const { return v[i]; }
};

template <>
struct Vec<double> {
  using Mask = __m256d;
  static constexpr int size = 4;
  __m256d v;

  Vec() = default;
  XLMR_INLINE Vec(__m256d data) : v(data) {}
  XLMR_INLINE explicit Vec(double x) : v(_mm256_set1_pd(x)) {}
  static XLMR_INLINE Vec zero() { return _mm256_setzero_pd(); }
  static XLMR_INLINE Vec load(const double* p) { return _mm256_loadu_pd(p); }
  static XLMR_INLINE Vec load(const double* p, int64_t n) {
    return _mm256_maskload_pd(p, tail_mask(2 * n));
  }
  XLMR_INLINE void store(double* p) const { _mm256_storeu_pd(p, v); }
  XLMR_INLINE void store(double* p, int64_t n) const {
    _mm256_maskstore_pd(p, tail_mask(2 * n), v);
  }
  XLMR_INLINE Vec operator+(Vec o) const { return _mm256_add_pd(v, o.v); }
  XLMR_INLINE Vec operator-(Vec o) const { return _mm256_sub_pd(v, o.v); }
  XLMR_INLINE Vec operator*(Vec o) const { return _mm256_mul_pd(v, o.v); }
  XLMR_INLINE Vec operator/(Vec o) const { return _mm256_div_pd(v, o.v); }
  XLMR_INLINE Mask operator<(Vec o) const { return _mm256_cmp_pd(v, o.v, _CMP_LT_OQ); }
  XLMR_INLINE double lane(int i) const { return v[i]; }
};

XLMR_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm256_fmadd_ps(a.v, b.v, c.v);
}
XLMR_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return _mm256_fmadd_pd(a.v, b.v, c.v);
}
XLMR_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return _mm256_max_ps(a.v, b.v); }
XLMR_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return _mm256_max_pd(a.v, b.v); }
XLMR_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return _mm256_min_ps(a.v, b.v); }
XLMR_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return _mm256_min_pd(a.v, b.v); }
XLMR_INLINE Vec<float> select(__m256 m, Vec<float> yes, Vec<float> no) {
  return _mm256_blendv_ps(no.v, yes.v, m);
}
XLMR_INLINE Vec<double> select(__m256d m, Vec<double> yes, Vec<double> no) {
  return _mm256_blendv_pd(no.v, yes.v, m);
}
XLMR_INLINE Vec<float> abs(Vec<float> a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }
XLMR_INLINE Vec<float> copysign(Vec<float> magnitude, Vec<float> s) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return _mm256_or_ps(_mm256_andnot_ps(sign, magnitude.v), _mm256_and_ps(sign, s.v));
}
XLMR_INLINE Vec<float> round(Vec<float> a) {
  return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
XLMR_INLINE Vec<float> pow2(Vec<float> n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
// 64-bit lanes, as many as fill a vector; the product of their low halves.
using Words = uint64_t __attribute__((vector_size(32)));
XLMR_INLINE Words multiply_low(Words a, Words b) {
  return reinterpret_cast<Words>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
XLMR_INLINE float reduce_add(Vec<float> a) {
  const __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 t = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_shuffle_ps(t, t, 1)));
}
XLMR_INLINE double reduce_add(Vec<double> a) {
  const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}
XLMR_INLINE float reduce_max(Vec<float> a) {
  const __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 t = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(t, _mm_shuffle_ps(t, t, 1)));
}
XLMR_INLINE double reduce_max(Vec<double> a) {
  const __m128d s = _mm_max_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_max_sd(s, _mm_unpackhi_pd(s, s)));
}

XLMR_INLINE void transpose(Vec<float> (&r)[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
  for (int half = 0; half < 8; half += 4) {
    u[half + 0] = _mm256_shuffle_ps(t[half], t[half + 2], 0x44);
    u[half + 1] = _mm256_shuffle_ps(t[half], t[half + 2], 0xee);
    u[half + 2] = _mm256_shuffle_ps(t[half + 1], t[half + 3], 0x44);
    u[half + 3] = _mm256_shuffle_ps(t[half + 1], t[half + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}
XLMR_INLINE void transpose(Vec<double> (&r)[4]) {
  const __m256d a = _mm256_unpacklo_pd(r[0].v, r[1].v), b = _mm256_unpackhi_pd(r[0].v, r[1].v);
  const __m256d c = _mm256_unpacklo_pd(r[2].v, r[3].v), d = _mm256_unpackhi_pd(r[2].v, r[3].v);
  r[0].v = _mm256_permute2f128_pd(a, c, 0x20);
  r[1].v = _mm256_permute2f128_pd(b, d, 0x20);
  r[2].v = _mm256_permute2f128_pd(a, c, 0x31);
  r[3].v = _mm256_permute2f128_pd(b, d, 0x31);
}

}  // namespace
}  // namespace xlmr::XLMR_ISA
