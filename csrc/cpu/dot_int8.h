// The integer arithmetic of one instruction set, as gemm_int8.h uses it.
//
// Dot: sums of products of 8-bit weights with the quantised values of one row.
//   Activation                a quantised value as dot() reads it
//   kBiased                   activations are q + 128 and sums start at -128 * (sum of the weights)
//   kChannels                 output channels in one vector of weights: 4 * kChannels bytes
//   kRows, kVectors           the register tile
//   start(sum), dot(s, a, w)  exact in int32: nothing saturates, and what wraps wraps back
//   store(s, out)             kVectors sums to kVectors * kChannels int32
// quantize(x, factor, dst):   round(x * factor), ties to even, a vector of them
// to_float(p):                a vector of int32 as floats
#pragma once

#include "core/int8_layout.h"
#include "cpu/isa.h"

namespace xlmr::XLMR_ISA {
namespace {

// vpdpbusd in plain C++, a step of 4 products: what the vector instructions are held against, and
// all there is where there are none.
template <class A>
XLMR_INLINE int32_t dot_plain(int32_t sum, const A* a, const int8_t* w) {
  uint32_t total = static_cast<uint32_t>(sum);  // wraps, as registers do
  for (int i = 0; i < kInt8Depth; ++i) total += static_cast<uint32_t>(int32_t{a[i]} * w[i]);
  return static_cast<int32_t>(total);
}

// Four activations as one number, which fills a register.
template <class Number, class A>
XLMR_INLINE Number four(const A* a) {
  static_assert(sizeof(Number) == kInt8Depth * sizeof(A));
  Number number;
  memcpy(&number, a, sizeof number);
  return number;
}

#if defined(XLMR_ISA_AVX512) || defined(XLMR_ISA_AVX2)
// Compilers turn the chain of sums of an unrolled loop into a tree, whose leaves do not fit into
// the registers.
template <class R>
XLMR_INLINE void keep_in_order(R& sum) {
  asm("" : "+v"(sum));
}
#endif

#if defined(XLMR_ISA_AVX512)

XLMR_INLINE Vec<float> to_float(const int32_t* p) {
  return _mm512_cvtepi32_ps(_mm512_loadu_si512(p));
}

#if defined(XLMR_ISA_VNNI)

// 12 x 2 sums, 2 vectors of weights and 1 activation: 27 registers.
struct Dot {
  using Activation = uint8_t;
  using Sum = __m512i;
  using Weights = __m512i;
  static constexpr bool kBiased = true;
  static constexpr int kChannels = 16, kRows = 12, kVectors = 2;

  static XLMR_INLINE Weights load(const int8_t* w) { return _mm512_loadu_si512(w); }
  static XLMR_INLINE __m512i broadcast(const uint8_t* a) {
    return _mm512_set1_epi32(four<int32_t>(a));
  }
  static XLMR_INLINE Sum start(const int32_t* sum) {
    return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(_mm512_loadu_si512(sum), 7));
  }
  static XLMR_INLINE Sum dot(Sum s, __m512i a, Weights w) { return _mm512_dpbusd_epi32(s, a, w); }
  template <int kCount>
  static XLMR_INLINE void store(const Sum (&s)[kCount], int32_t* out) {
    for (int v = 0; v < kCount; ++v) _mm512_storeu_si512(out + v * 16, s[v]);
  }
};
XLMR_INLINE void quantize(Vec<float> x, Vec<float> factor, uint8_t* dst) {
  const __m128i q = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((x * factor).v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), _mm_xor_si128(q, _mm_set1_epi8(-128)));
}

#else

// Weights widened to 16 bits, 8 channels a register; vpmaddwd leaves two sums of each channel.
struct Dot {
  using Activation = int16_t;
  using Sum = __m512i;
  using Weights = __m512i;
  static constexpr bool kBiased = false;
  static constexpr int kChannels = 8, kRows = 12, kVectors = 2;

  static XLMR_INLINE Weights load(const int8_t* w) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
  }
  static XLMR_INLINE __m512i broadcast(const int16_t* a) {
    return _mm512_set1_epi64(four<int64_t>(a));
  }
  static XLMR_INLINE Sum start(const int32_t*) { return _mm512_setzero_si512(); }
  static XLMR_INLINE Sum dot(Sum s, __m512i a, Weights w) {
    s = _mm512_add_epi32(s, _mm512_madd_epi16(a, w));
    keep_in_order(s);
    return s;
  }
  template <int kCount>
  static XLMR_INLINE void store(const Sum (&s)[kCount], int32_t* out) {
    for (int v = 0; v < kCount; ++v) {
      const __m512i both = _mm512_add_epi32(s[v], _mm512_srli_epi64(s[v], 32));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + v * 8), _mm512_cvtepi64_epi32(both));
    }
  }
};
XLMR_INLINE void quantize(Vec<float> x, Vec<float> factor, int16_t* dst) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst),
                      _mm512_cvtepi32_epi16(_mm512_cvtps_epi32((x * factor).v)));
}

#endif

#elif defined(XLMR_ISA_AVX2)

XLMR_INLINE Vec<float> to_float(const int32_t* p) {
  return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// 8 values as 16-bit integers.
XLMR_INLINE __m128i quantized(Vec<float> x, Vec<float> factor) {
  const __m256i q = _mm256_cvtps_epi32((x * factor).v);
  return _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
}

#if defined(XLMR_ISA_VNNI)

#if defined(XLMR_DOT_TWIN)  // for machines without AVX-VNNI: the tests' stand-in
XLMR_INLINE __m256i dot_bytes(__m256i sum, __m256i a, __m256i w) {
  uint8_t unsigned_bytes[32];
  int8_t signed_bytes[32];
  int32_t sums[8];
  memcpy(unsigned_bytes, &a, sizeof a);
  memcpy(signed_bytes, &w, sizeof w);
  memcpy(sums, &sum, sizeof sum);
  for (int i = 0; i < 8; ++i) {
    sums[i] = dot_plain(sums[i], unsigned_bytes + 4 * i, signed_bytes + 4 * i);
  }
  memcpy(&sum, sums, sizeof sum);
  return sum;
}
#else
XLMR_INLINE __m256i dot_bytes(__m256i sum, __m256i a, __m256i w) {
  return _mm256_dpbusd_avx_epi32(sum, a, w);
}
#endif

// 6 x 2 sums, 2 vectors of weights and 1 activation: 15 registers.
struct Dot {
  using Activation = uint8_t;
  using Sum = __m256i;
  using Weights = __m256i;
  static constexpr bool kBiased = true;
  static constexpr int kChannels = 8, kRows = 6, kVectors = 2;

  static XLMR_INLINE Weights load(const int8_t* w) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  }
  static XLMR_INLINE __m256i broadcast(const uint8_t* a) {
    return _mm256_set1_epi32(four<int32_t>(a));
  }
  static XLMR_INLINE Sum start(const int32_t* sum) {
    const __m256i s = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sum));
    return _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(s, 7));
  }
  static XLMR_INLINE Sum dot(Sum s, __m256i a, Weights w) { return dot_bytes(s, a, w); }
  template <int kCount>
  static XLMR_INLINE void store(const Sum (&s)[kCount], int32_t* out) {
    for (int v = 0; v < kCount; ++v) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + v * 8), s[v]);
    }
  }
};
XLMR_INLINE void quantize(Vec<float> x, Vec<float> factor, uint8_t* dst) {
  const __m128i q = quantized(x, factor);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(dst),
                   _mm_xor_si128(_mm_packs_epi16(q, q), _mm_set1_epi8(-128)));
}

#else

// Weights widened to 16 bits, 4 channels a register; vpmaddwd leaves two sums of each channel.
// (vpmaddubsw would add two products in 16 bits, where they saturate.) 6 x 2 sums, 2 vectors of
// weights, 1 activation and 1 product: 16 registers.
struct Dot {
  using Activation = int16_t;
  using Sum = __m256i;
  using Weights = __m256i;
  static constexpr bool kBiased = false;
  static constexpr int kChannels = 4, kRows = 6, kVectors = 2;

  static XLMR_INLINE Weights load(const int8_t* w) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
  }
  static XLMR_INLINE __m256i broadcast(const int16_t* a) {
    return _mm256_set1_epi64x(four<int64_t>(a));
  }
  static XLMR_INLINE Sum start(const int32_t*) { return _mm256_setzero_si256(); }
  static XLMR_INLINE Sum dot(Sum s, __m256i a, Weights w) {
    s = _mm256_add_epi32(s, _mm256_madd_epi16(a, w));
    keep_in_order(s);
    return s;
  }
  template <int kCount>
  static XLMR_INLINE void store(const Sum (&s)[kCount], int32_t* out) {
    for (int v = 0; v < kCount; v += 2) {
      const __m256i both = _mm256_hadd_epi32(s[v], s[v + 1]);  // channels 0 1 4 5, 2 3 6 7
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + v * 4),
                          _mm256_permute4x64_epi64(both, 0xd8));
    }
  }
};
XLMR_INLINE void quantize(Vec<float> x, Vec<float> factor, int16_t* dst) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), quantized(x, factor));
}

#endif

#elif defined(XLMR_ISA_NEON)

XLMR_INLINE Vec<float> to_float(const int32_t* p) { return vcvtq_f32_s32(vld1q_s32(p)); }

struct Dot {
  using Activation = int8_t;
  using Weights = int8x16_t;
  static constexpr bool kBiased = false;
  static constexpr int kChannels = 4;
  static XLMR_INLINE Weights load(const int8_t* w) { return vld1q_s8(w); }
  static XLMR_INLINE int8x16_t broadcast(const int8_t* a) {
    return vreinterpretq_s8_s32(vdupq_n_s32(four<int32_t>(a)));
  }

#if defined(__ARM_FEATURE_DOTPROD)
  using Sum = int32x4_t;
  static constexpr int kRows = 6, kVectors = 4;
  static XLMR_INLINE Sum start(const int32_t*) { return vdupq_n_s32(0); }
  static XLMR_INLINE Sum dot(Sum s, int8x16_t a, Weights w) { return vdotq_s32(s, a, w); }
  template <int kCount>
  static XLMR_INLINE void store(const Sum (&s)[kCount], int32_t* out) {
    for (int v = 0; v < kCount; ++v) vst1q_s32(out + v * 4, s[v]);
  }
#else
  using Sum = int32x4x2_t;  // two sums of each channel
  static constexpr int kRows = 5, kVectors = 2;
  static XLMR_INLINE Sum start(const int32_t*) { return {{vdupq_n_s32(0), vdupq_n_s32(0)}}; }
  static XLMR_INLINE Sum dot(Sum s, int8x16_t a, Weights w) {
    s.val[0] = vpadalq_s16(s.val[0], vmull_s8(vget_low_s8(a), vget_low_s8(w)));
    s.val[1] = vpadalq_s16(s.val[1], vmull_high_s8(a, w));
    return s;
  }
  template <int kCount>
  static XLMR_INLINE void store(const Sum (&s)[kCount], int32_t* out) {
    for (int v = 0; v < kCount; ++v) {
      vst1q_s32(out + v * 4, vpaddq_s32(s[v].val[0], s[v].val[1]));
    }
  }
#endif
};
XLMR_INLINE void quantize(Vec<float> x, Vec<float> factor, int8_t* dst) {
  const int16x4_t q = vmovn_s32(vcvtnq_s32_f32((x * factor).v));
  const int8x8_t bytes = vmovn_s16(vcombine_s16(q, q));
  vst1_lane_s32(reinterpret_cast<int32_t*>(dst), vreinterpret_s32_s8(bytes), 0);
}

#else

XLMR_INLINE Vec<float> to_float(const int32_t* p) {
  Vec<float>::Mask q;
  memcpy(&q, p, sizeof q);
  return __builtin_convertvector(q, Vec<float>::Data);
}

struct Dot {
  using Activation = int8_t;
  struct Sum {
    int32_t channel[4];
  };
  using Weights = const int8_t*;
  static constexpr bool kBiased = false;
  static constexpr int kChannels = 4, kRows = 2, kVectors = 2;

  static XLMR_INLINE Weights load(const int8_t* w) { return w; }
  static XLMR_INLINE const int8_t* broadcast(const int8_t* a) { return a; }
  static XLMR_INLINE Sum start(const int32_t*) { return {}; }
  static XLMR_INLINE Sum dot(Sum s, const int8_t* a, Weights w) {
    for (int i = 0; i < kChannels; ++i) s.channel[i] = dot_plain(s.channel[i], a, w + 4 * i);
    return s;
  }
  template <int kCount>
  static XLMR_INLINE void store(const Sum (&s)[kCount], int32_t* out) {
    memcpy(out, s, sizeof s);
  }
};
XLMR_INLINE void quantize(Vec<float> x, Vec<float> factor, int8_t* dst) {
  const Vec<float>::Mask q = __builtin_convertvector(round(x * factor).v, Vec<float>::Mask);
  for (int i = 0; i < Vec<float>::size; ++i) dst[i] = static_cast<int8_t>(q[i]);
}

#endif

}  // namespace
}  // namespace xlmr::XLMR_ISA
