// Sums over rows, for the gradients of biases and of LayerNorm's parameters: parts of the rows by
// blocks, then the parts in ascending order. The order depends on the number of rows alone.
#pragma once

#include "cuda/element.cuh"

namespace xlmr::XLMR_CUDA_NS {
namespace {

constexpr int kSumWarps = 8;
constexpr int kSumThreads = kSumWarps * kWarp;
constexpr int64_t kSumRows = 64;  // of one part, at least
constexpr int64_t kMostParts = 64;

inline int64_t rows_of_part(int64_t rows) { return max_of(kSumRows, ceil_div(rows, kMostParts)); }
// At least 1, so that sums over no rows are written too.
inline int64_t parts_of(int64_t rows) {
  return max_of(int64_t{1}, ceil_div(rows, rows_of_part(rows)));
}

template <class Out, int kCount>
struct ColumnSumsOut {
  Out* out[kCount];  // [parts, columns] each
};

// term(row, column, values) gives the kCount values of an element. Warps take every eighth row.
template <class Out, int kCount, class Term>
__global__ void __launch_bounds__(kSumThreads)
    column_sums_kernel(int64_t rows, int64_t columns, int64_t part_rows, Term term,
                       ColumnSumsOut<Out, kCount> to) {
  using T = Wide<Out>;
  XLMR_SHARED(T, shared);  // [kSumWarps][kCount][kWarp]
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t column_blocks = ceil_div(columns, kWarp);
  const int64_t part = blockIdx.x / column_blocks;
  const int64_t column = blockIdx.x % column_blocks * kWarp + lane;
  const int64_t end = min_of(rows, (part + 1) * part_rows);
  T sum[kCount] = {};
  if (column < columns) {
    for (int64_t row = part * part_rows + warp; row < end; row += kSumWarps) {
      T value[kCount];
      term(row, column, value);
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum[i] += value[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) shared[(warp * kCount + i) * kWarp + lane] = sum[i];
  __syncthreads();
  if (column >= columns) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (warp != i) continue;
    T total = 0;
    for (int w = 0; w < kSumWarps; ++w) total += shared[(w * kCount + i) * kWarp + lane];
    to.out[i][part * columns + column] = narrow<Out>(total);
  }
}

template <class T, int kCount>
struct PartTerm {
  const T* partial;
  int64_t parts, columns;
  __device__ void operator()(int64_t row, int64_t column, T (&value)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) value[i] = partial[(i * parts + row) * columns + column];
  }
};

// Where parts lie between the two kernels. Sums are stored as Out.
template <class Out, int kCount>
struct ColumnSums {
  using T = Wide<Out>;
  T* partial = nullptr;  // [kCount, parts, columns]; null where there is one part

  ColumnSums(Workspace& space, bool wanted, int64_t rows, int64_t columns) {
    if (wanted && parts_of(rows) > 1) partial = space.take<T>(parts_of(rows), columns, kCount);
  }

  template <class Term>
  Status run(const char* name, int64_t rows, int64_t columns, const Term& term, Out* const* out,
             const ExecContext& ctx) const {
    constexpr size_t shared = kSumThreads * kCount * sizeof(T);
    static_assert(shared <= kMostShared && kCount <= kSumWarps, "a block of column sums");
    const int64_t parts = parts_of(rows), column_blocks = ceil_div(columns, kWarp);
    ColumnSumsOut<Out, kCount> sums;
    ColumnSumsOut<T, kCount> parts_of_sums;
    for (int i = 0; i < kCount; ++i) {
      sums.out[i] = out[i];
      parts_of_sums.out[i] = parts == 1 ? nullptr : partial + i * parts * columns;
    }
    if (parts == 1) {
      return launch(name, column_sums_kernel<Out, kCount, Term>, column_blocks, kSumThreads, shared,
                    ctx, rows, columns, rows_of_part(rows), term, sums);
    }
    if (Status error = launch(name, column_sums_kernel<T, kCount, Term>,
                              product(parts, column_blocks), kSumThreads, shared, ctx, rows,
                              columns, rows_of_part(rows), term, parts_of_sums)) {
      return error;
    }
    const PartTerm<T, kCount> part_term{partial, parts, columns};
    return launch(name, column_sums_kernel<Out, kCount, PartTerm<T, kCount>>, column_blocks,
                  kSumThreads, shared, ctx, parts, columns, parts, part_term, sums);
  }
};

// The elements themselves.
template <class T>
struct MatrixTerm {
  const T* data;
  int64_t stride;
  __device__ void operator()(int64_t row, int64_t column, Wide<T> (&value)[1]) const {
    value[0] = widen(data[row * stride + column]);
  }
};

}  // namespace
}  // namespace xlmr::XLMR_CUDA_NS
