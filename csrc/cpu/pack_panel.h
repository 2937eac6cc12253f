// Panels: some rows of a matrix, what lies at one step of k side by side, as register tiles read
// them.
#pragma once

#include "cpu/isa.h"

namespace xlmr::XLMR_ISA {
namespace {

// Element (i, j) of a matrix is data[i * row + j * column].
template <class T>
struct MatrixView {
  const T* data;
  int64_t row, column;
  MatrixView at(int64_t i, int64_t j) const { return {data + i * row + j * column, row, column}; }
  MatrixView transposed() const { return {data, column, row}; }
};

template <class T>
XLMR_INLINE Vec<T> load_lanes(const T* p, int64_t lanes) {
  return lanes == Vec<T>::size ? Vec<T>::load(p) : Vec<T>::load(p, lanes);
}
template <class T>
XLMR_INLINE void store_lanes(T* p, Vec<T> value, int64_t lanes) {
  if (lanes == Vec<T>::size) {
    value.store(p);
  } else {
    value.store(p, lanes);
  }
}

// What a panel is made of, here a matrix as it is, a step for every column; bfloat16.h has another.
template <class T>
struct Numbers {
  using Element = T;
  MatrixView<T> m;
  int64_t steps;

  // Whether vectors can be read along the rows' index, or along the steps.
  bool rows_adjoin() const { return m.row == 1; }
  bool steps_adjoin() const { return m.column == 1; }
  // Rows [i, i + lanes) at a step, 0 in the other lanes.
  XLMR_INLINE Vec<T> along_rows(int64_t i, int64_t step, int64_t lanes) const {
    return load_lanes(m.data + step * m.column + i, lanes);
  }
  // A vector of steps of row i; all of them are there.
  XLMR_INLINE Vec<T> along_steps(int64_t i, int64_t step) const {
    return Vec<T>::load(m.data + i * m.row + step);
  }
  XLMR_INLINE T at(int64_t i, int64_t step) const { return m.data[i * m.row + step * m.column]; }
};

// dst[step * kWidth + i] = source(i, step) for i < rows; 0 for rows <= i < kWidth. Packs a panel of
// A (kWidth = MR) or, with its matrix transposed, of B (kWidth = NR). Where one vector is wider
// than the panel, a store runs into the next step, which is written after it.
template <int kWidth, class Source>
void pack_panel(const Source& source, int64_t rows, typename Source::Element* dst) {
  using T = typename Source::Element;
  constexpr int V = Vec<T>::size;
  const int64_t steps = source.steps;
  const auto write = [&](int64_t k, int i, Vec<T> x) {
    if (i + V <= kWidth || (kWidth < V && k + 1 < steps)) {
      x.store(dst + k * kWidth + i);
    } else {
      x.store(dst + k * kWidth + i, kWidth - i);
    }
  };
  if (source.rows_adjoin()) {
    for (int64_t k = 0; k < steps; ++k) {
      for (int i = 0; i < kWidth; i += V) {
        const int64_t lanes = min_of<int64_t>(V, rows - i);
        write(k, i, lanes > 0 ? source.along_rows(i, k, lanes) : Vec<T>::zero());
      }
    }
    return;
  }
  int64_t k = 0;
  if (source.steps_adjoin()) {  // transpose V x V blocks
    for (; k + V <= steps; k += V) {
      for (int i = 0; i < kWidth; i += V) {
        Vec<T> block[V];
#pragma GCC unroll 16
        for (int j = 0; j < V; ++j) {
          block[j] = i + j < kWidth && i + j < rows ? source.along_steps(i + j, k) : Vec<T>::zero();
        }
        transpose(block);
#pragma GCC unroll 16
        for (int j = 0; j < V; ++j) write(k + j, i, block[j]);
      }
    }
  }
  for (; k < steps; ++k) {
    for (int64_t i = 0; i < kWidth; ++i) dst[k * kWidth + i] = i < rows ? source.at(i, k) : T(0);
  }
}

}  // namespace
}  // namespace xlmr::XLMR_ISA
