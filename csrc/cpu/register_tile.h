// The register tile of float32 and float64.
#pragma once

#include "cpu/math.h"
#include "cpu/pack_panel.h"
#include "cpu/parallel_for.h"

namespace xlmr::XLMR_ISA {
namespace {

template <class T>
struct Tile {
  // MR: of 16 registers 12 are accumulators, 2 hold B and 1 A; of 32, 24 are accumulators.
  static constexpr int kRows = kVectorRegisters == 32 ? 12 : 6;
  static constexpr int kVectors = 2;                        // of one row
  static constexpr int kColumns = kVectors * Vec<T>::size;  // NR
};

// How the micro-kernel reads the MR rows of A at step k.
enum class ALayout {
  panel,         // packed: a[k * MR + i], the next panel behind it
  column_major,  // a[k * stride + i]
  row_major      // a[i * stride + k]
};

// What a tile asks the caches for while it is computed: from `at`, `step` bytes further at each k.
struct LookAhead {
  const char* at;
  int64_t step;
};

// One register tile: out(i, j) (+)= sum_k A(i, k) B(k, j), kRows x NR of it. `rows` of them are
// real; in row_major layout the others repeat the last real one, otherwise they are whatever is
// there, to the end of a vector. Not inlined: each epilogue would bring a copy of its own. Bound by
// the multipliers as long as both panels arrive in time, hence the prefetches.
template <int kRows, ALayout kLayout, class T>
__attribute__((noinline)) void multiply_rows(int64_t k_size, const T* a, int64_t a_stride,
                                             int64_t rows, const T* b, T* out, int64_t out_stride,
                                             bool add, LookAhead ahead) {
  constexpr int NV = Tile<T>::kVectors, V = Vec<T>::size;
  constexpr bool by_lane = kFmaByLane && kLayout != ALayout::row_major;
  Vec<T> acc[kRows][NV];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[i][v] = Vec<T>::zero();
  }
  const T* row[kRows];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    row[i] = kLayout == ALayout::row_major ? a + min_of<int64_t>(i, rows - 1) * a_stride : a + i;
  }
  const int64_t next_panel = k_size * a_stride;
#pragma GCC unroll 4
  for (int64_t k = 0; k < k_size; ++k) {
    Vec<T> bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) bv[v] = Vec<T>::load(b + v * V);
    Vec<T> lanes[ceil_div(kRows, V)];
    if constexpr (by_lane) {
#pragma GCC unroll 16
      for (int i = 0; i < kRows; i += V) lanes[i / V] = Vec<T>::load(a + i);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> av(kLayout == ALayout::row_major ? row[i][k]
                      : by_lane                     ? lanes[i / V].lane(i % V)
                                                    : a[i]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[i][v] = fma(av, bv[v], acc[i][v]);
    }
    b += NV * V;
    if (kLayout != ALayout::row_major) a += a_stride;
    if (kLayout == ALayout::panel) {
      __builtin_prefetch(a + next_panel);
      __builtin_prefetch(ahead.at);
      ahead.at += ahead.step;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      T* dst = out + i * out_stride + v * V;
      (add ? Vec<T>::load(dst) + acc[i][v] : acc[i][v]).store(dst);
    }
  }
}

// A tile of 1 to MR rows, by the kernel with the fewest rows that holds them: the chain of an
// element is the same in each.
template <ALayout kLayout, class T>
XLMR_INLINE void multiply_tile(int64_t k_size, const T* a, int64_t a_stride, int64_t rows,
                               const T* b, T* out, int64_t out_stride, bool add,
                               LookAhead ahead = {nullptr, 0}) {
  constexpr int MR = Tile<T>::kRows;
  const auto kernel = rows > MR * 2 / 3 ? multiply_rows<MR, kLayout, T>
                      : rows > MR / 3   ? multiply_rows<MR * 2 / 3, kLayout, T>
                      : rows > 1        ? multiply_rows<MR / 3, kLayout, T>
                                        : multiply_rows<1, kLayout, T>;
  kernel(k_size, a, a_stride, rows, b, out, out_stride, add, ahead);
}

// pack_panel over all columns of B, a K x N matrix; panel p lies at dst + p * k_size * NR.
template <class T>
void pack_b(MatrixView<T> b, int64_t k_size, int64_t columns, T* dst) {
  constexpr int NR = Tile<T>::kColumns;
  for (int64_t j = 0; j < columns; j += NR) {
    pack_panel<NR>(Numbers<T>{b.at(0, j).transposed(), k_size}, min_of<int64_t>(NR, columns - j),
                   dst + j * k_size);
  }
}

// The arithmetic of a product (gemm.h) in the type of its numbers.
template <class T>
struct Exact {
  using Value = T;              // of the operands as they are given, of the sums and of the result
  using Packed = T;             // of the panels
  using Right = MatrixView<T>;  // B as it is given
  static constexpr int64_t kRows = Tile<T>::kRows, kColumns = Tile<T>::kColumns;
  static constexpr int64_t kDepth = 1;        // k is padded to a multiple of it
  static constexpr int64_t kBlockK = 192;     // a panel of B in L1; longer chains round more
  static constexpr bool kReadsPacked = true;  // the layout of packed weights
  struct Session {};                          // what a thread holds while it multiplies

  // B = W^T of a weight [out, in] that is not packed.
  static Right right(const void* weight, int64_t, int64_t in_features) {
    return {static_cast<const T*>(weight), 1, in_features};
  }
  static void pack_rows(MatrixView<T> a, int64_t rows, int64_t k_size, T* dst) {
    pack_panel<kRows>(Numbers<T>{a, k_size}, rows, dst);
  }
  static void pack_columns(const Right& b, int64_t k_size, int64_t columns, T* dst) {
    pack_b(b, k_size, columns, dst);
  }
  // out[kRows, kColumns] (+)= the product of a panel of A, of which `rows` are real, and one of B.
  static XLMR_INLINE void multiply(int64_t k_size, const T* a, int64_t rows, const T* b, T* out,
                                   bool add, LookAhead ahead) {
    multiply_tile<ALayout::panel>(k_size, a, kRows, rows, b, out, kColumns, add, ahead);
  }
};

// Calls fn(row, column, valid lanes) for every vector of the real part of a tile. The bounds of a
// whole tile are constants.
template <class A, class F>
XLMR_INLINE void for_each_vector(int64_t rows, int64_t columns, const F& fn) {
  constexpr int64_t MR = A::kRows, NR = A::kColumns, V = Vec<typename A::Value>::size;
  if (rows == MR && columns >= NR) {
    for (int64_t i = 0; i < MR; ++i) {
#pragma GCC unroll 4
      for (int64_t j = 0; j < NR; j += V) fn(i, j, V);
    }
    return;
  }
  const int64_t valid = min_of(NR, columns);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < valid; j += V) fn(i, j, min_of(V, valid - j));
  }
}

}  // namespace
}  // namespace xlmr::XLMR_ISA
