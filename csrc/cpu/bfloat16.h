// Products of bfloat16 with sums in float32. Operands are given in float32 and rounded when they
// are packed; the sums, what the epilogue does and the result are float32.
//
// A pair is two neighbours in k, the first in the lower half of 32 bits. Vectors of pairs are
// carried as Vec<float>, whose loads, stores and transposes keep any bits.
#pragma once

#include "core/bf16.h"
#include "core/bf16_layout.h"
#include "cpu/gemm.h"

#if defined(XLMR_ISA_AVX512) && defined(XLMR_ISA_BF16) && !defined(XLMR_BF16_TWIN)
#define XLMR_BF16_NATIVE
#endif

namespace xlmr::XLMR_ISA {
namespace {

#if defined(XLMR_BF16_NATIVE)

// (low[i], high[i]) in lane i.
XLMR_INLINE Vec<float> join(Vec<float> low, Vec<float> high) {
  const __m512i interleave =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                       21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v));
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(interleave, both));
}
// Neighbours: x[2 i], x[2 i + 1] in lane i.
XLMR_INLINE Vec<float> neighbours(Vec<float> first, Vec<float> second) {
  return reinterpret_cast<__m512>(_mm512_cvtne2ps_pbh(second.v, first.v));
}
// One pair in all lanes.
XLMR_INLINE Vec<float> everywhere(const float* pair) { return _mm512_set1_ps(*pair); }
XLMR_INLINE Vec<float> dot(Vec<float> sum, Vec<float> a, Vec<float> b) {
  return _mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v));
}

#else  // the same in plain C++

XLMR_INLINE Vec<float> of_pairs(const uint16_t* pairs) {
  float bits[Vec<float>::size];
  memcpy(bits, pairs, sizeof bits);
  return Vec<float>::load(bits);
}
XLMR_INLINE void to_pairs(Vec<float> x, uint16_t* pairs) {
  float bits[Vec<float>::size];
  x.store(bits);
  memcpy(pairs, bits, sizeof bits);
}
XLMR_INLINE Vec<float> join(Vec<float> low, Vec<float> high) {
  constexpr int V = Vec<float>::size;
  uint16_t pairs[2 * V];
  for (int i = 0; i < V; ++i) {
    pairs[2 * i] = to_bf16(low.lane(i));
    pairs[2 * i + 1] = to_bf16(high.lane(i));
  }
  return of_pairs(pairs);
}
XLMR_INLINE Vec<float> neighbours(Vec<float> first, Vec<float> second) {
  constexpr int V = Vec<float>::size;
  uint16_t pairs[2 * V];
  for (int i = 0; i < V; ++i) {
    pairs[i] = to_bf16(first.lane(i));
    pairs[V + i] = to_bf16(second.lane(i));
  }
  return of_pairs(pairs);
}
XLMR_INLINE Vec<float> everywhere(const float* pair) {
  float bits[Vec<float>::size];
  for (float& lane : bits) memcpy(&lane, pair, sizeof lane);
  return Vec<float>::load(bits);
}
// vdpbf16ps: the upper products first (Intel's manual, volume 2).
XLMR_INLINE Vec<float> dot(Vec<float> sum, Vec<float> a, Vec<float> b) {
  constexpr int V = Vec<float>::size;
  uint16_t left[2 * V], right[2 * V];
  float sums[V];
  to_pairs(a, left);
  to_pairs(b, right);
  sum.store(sums);
  for (int i = 0; i < V; ++i) {
    for (int half = 1; half >= 0; --half) {
      sums[i] =
          bf16_multiply_add(from_bf16(left[2 * i + half]), from_bf16(right[2 * i + half]), sums[i]);
    }
  }
  return Vec<float>::load(sums);
}

#endif

// A matrix in pairs of columns, for pack_panel; 0 beside a last column that stands alone.
struct Pairs {
  using Element = float;
  MatrixView<float> m;
  int64_t columns, steps;

  Pairs(MatrixView<float> matrix, int64_t k_size)
      : m(matrix), columns(k_size), steps(ceil_div(k_size, 2)) {}

  bool rows_adjoin() const { return m.row == 1; }
  bool steps_adjoin() const { return m.column == 1; }
  XLMR_INLINE Vec<float> along_rows(int64_t i, int64_t step, int64_t lanes) const {
    const float* p = m.data + 2 * step * m.column + i;
    const bool whole = 2 * step + 1 < columns;
    return join(load_lanes(p, lanes), whole ? load_lanes(p + m.column, lanes) : Vec<float>::zero());
  }
  XLMR_INLINE Vec<float> along_steps(int64_t i, int64_t step) const {
    constexpr int64_t V = Vec<float>::size;
    const float* p = m.data + i * m.row + 2 * step;
    const int64_t rest = columns - 2 * step - V;  // odd where the last pair is half
    return neighbours(Vec<float>::load(p), load_lanes(p + V, min_of(V, rest)));
  }
  XLMR_INLINE float at(int64_t i, int64_t step) const {
    const float* p = m.data + i * m.row + 2 * step * m.column;
    const bool whole = 2 * step + 1 < columns;
    const uint32_t bits =
        uint32_t{to_bf16(p[0])} | uint32_t{whole ? to_bf16(p[m.column]) : uint16_t{0}} << 16;
    float pair;
    memcpy(&pair, &bits, sizeof pair);
    return pair;
  }
};

template <int kWidth>
void pack_pairs(MatrixView<float> m, int64_t rows, int64_t k_size, uint16_t* dst) {
  const Pairs pairs(m, k_size);
  pack_panel<kWidth>(pairs, rows, reinterpret_cast<float*>(dst));
  const int64_t written = 2 * pairs.steps, padded = round_up(k_size, kBf16Depth);
  memset(dst + written * kWidth, 0, static_cast<size_t>((padded - written) * kWidth) * sizeof *dst);
}

constexpr int kPairRows = 12;  // of a register tile: 24 accumulators in registers of 16 lanes

// One register tile as multiply_rows of register_tile.h; `a` and `b` hold pairs.
template <int kRows>
__attribute__((noinline)) void multiply_pairs(int64_t steps, const float* a, const float* b,
                                              float* out, bool add, LookAhead ahead) {
  constexpr int V = Vec<float>::size, NR = kBf16Channels, NV = NR / V;
  Vec<float> acc[kRows][NV];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[i][v] = Vec<float>::zero();
  }
#pragma GCC unroll 4
  for (int64_t step = 0; step < steps; ++step) {
    Vec<float> bv[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) bv[v] = Vec<float>::load(b + v * V);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec<float> av = everywhere(a + i);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[i][v] = dot(acc[i][v], av, bv[v]);
    }
    a += kPairRows;
    b += NR;
    __builtin_prefetch(a + steps * kPairRows);
    __builtin_prefetch(ahead.at);
    ahead.at += ahead.step;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      float* dst = out + i * NR + v * V;
      (add ? Vec<float>::load(dst) + acc[i][v] : acc[i][v]).store(dst);
    }
  }
}

// The arithmetic of a product in bfloat16 by dot products.
struct Bfloat16 {
  using Value = float;
  using Packed = uint16_t;
  using Right = MatrixView<float>;
  static constexpr int64_t kRows = kPairRows, kColumns = kBf16Channels;
  static constexpr int64_t kDepth = kBf16Depth;
  static constexpr int64_t kBlockK = 384;
  static constexpr bool kReadsPacked = true;
  struct Session {};

  static Right right(const void* weight, int64_t, int64_t in_features) {
    return {static_cast<const float*>(weight), 1, in_features};
  }
  static void pack_rows(MatrixView<float> a, int64_t rows, int64_t k_size, uint16_t* dst) {
    pack_pairs<kRows>(a, rows, k_size, dst);
  }
  static void pack_columns(const Right& b, int64_t k_size, int64_t columns, uint16_t* dst) {
    for (int64_t j = 0; j < columns; j += kColumns) {
      pack_pairs<kColumns>(b.at(0, j).transposed(), min_of(kColumns, columns - j), k_size,
                           dst + j * round_up(k_size, kDepth));
    }
  }
  static XLMR_INLINE void multiply(int64_t k_size, const uint16_t* a, int64_t rows,
                                   const uint16_t* b, float* out, bool add, LookAhead ahead) {
    const auto kernel = rows > 8   ? multiply_pairs<kPairRows>
                        : rows > 4 ? multiply_pairs<8>
                        : rows > 1 ? multiply_pairs<4>
                                   : multiply_pairs<1>;
    kernel(k_size / 2, reinterpret_cast<const float*>(a), reinterpret_cast<const float*>(b), out,
           add, {ahead.at, 2 * ahead.step});
  }
};

// Weights in bfloat16 where products are in float32: widened when they are packed for a task.
struct StoredBfloat16 : Exact<float> {
  static constexpr bool kReadsPacked = false;
  struct Right {
    const uint16_t* panels;
    int64_t panel;  // numbers from one to the next
    int64_t k, column;
    Right at(int64_t i, int64_t j) const { return {panels, panel, k + i, column + j}; }
  };

  static Right right(const void* weight, int64_t, int64_t in_features) {
    return {static_cast<const uint16_t*>(weight), kBf16Channels * round_up(in_features, kBf16Depth),
            0, 0};
  }
  static void pack_columns(const Right& b, int64_t k_size, int64_t columns, float* dst) {
    static_assert(kBf16Channels % kColumns == 0 && kBlockK % 2 == 0);
    for (int64_t j = 0; j < columns; j += kColumns, dst += kColumns * k_size) {
      const int64_t column = b.column + j;
      const uint16_t* panel = b.panels + column / kBf16Channels * b.panel + b.k * kBf16Channels +
                              column % kBf16Channels * 2;
      for (int64_t k = 0; k < k_size; ++k) {
        const uint16_t* from = panel + k / 2 * 2 * kBf16Channels + k % 2;
        for (int64_t i = 0; i < kColumns; ++i) dst[k * kColumns + i] = from_bf16(from[2 * i]);
      }
    }
  }
};

}  // namespace
}  // namespace xlmr::XLMR_ISA
