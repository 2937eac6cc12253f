// Sums over a row, and sums over rows whose order is fixed by the shapes alone.
#pragma once

#include "cpu/gemm.h"

namespace xlmr::XLMR_ISA {
namespace {

// sum over j of term(load j, lanes) along one row of n elements: four running vectors, then one.
template <class T, class F>
XLMR_INLINE T sum_row(int64_t n, F&& term) {
  constexpr int64_t V = Vec<T>::size;
  Vec<T> acc[4] = {Vec<T>::zero(), Vec<T>::zero(), Vec<T>::zero(), Vec<T>::zero()};
  int64_t j = 0;
  for (; j + 4 * V <= n; j += 4 * V) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) acc[u] = acc[u] + term(j + u * V, V);
  }
  for (; j < n; j += V) acc[0] = acc[0] + term(j, min_of(V, n - j));
  return reduce_add((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// fn(j, lanes) for every vector of a row of n elements.
template <class T, class F>
XLMR_INLINE void for_row(int64_t n, F&& fn) {
  constexpr int64_t V = Vec<T>::size;
  int64_t j = 0;
  for (; j + V <= n; j += V) fn(j, V);
  if (j < n) fn(j, n - j);
}

constexpr int64_t kRowBlock = 64;     // rows added up before they join the total
constexpr int64_t kColumnBlock = 64;  // columns of one task

// out[j] = sum over rows of x[row, j]: blocks of kRowBlock rows, added in order.
template <class T>
void column_sums(const ExecContext& ctx, int64_t rows, int64_t columns, const T* x, int64_t stride,
                 T* out) {
  parallel_ranges(ctx, columns, kColumnBlock, [&](int64_t begin, int64_t end) {
    for_row<T>(end - begin, [&](int64_t j, int64_t lanes) {
      Vec<T> total = Vec<T>::zero();
      for (int64_t block = 0; block < rows; block += kRowBlock) {
        Vec<T> partial = Vec<T>::zero();
        for (int64_t row = block; row < min_of(rows, block + kRowBlock); ++row) {
          partial = partial + load_lanes(x + row * stride + begin + j, lanes);
        }
        total = total + partial;
      }
      store_lanes(out + begin + j, total, lanes);
    });
  });
}

}  // namespace
}  // namespace xlmr::XLMR_ISA
