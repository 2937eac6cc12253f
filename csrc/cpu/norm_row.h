// LayerNorm of one row, forward and backward, shared by the LayerNorm and embedding ops.
#pragma once

#include "cpu/dropout.h"
#include "cpu/reduce.h"

namespace xlmr::XLMR_ISA {
namespace {

template <class T>
struct RowStatistics {
  T mean, rstd;
};

// y = (sum - mean) * rstd * weight + bias over n elements; two passes, so nothing cancels.
template <class T>
XLMR_INLINE RowStatistics<T> normalize_row(int64_t n, T eps, const T* sum, const T* weight,
                                           const T* bias, T* y) {
  const T mean =
      sum_row<T>(n, [&](int64_t j, int64_t lanes) { return load_lanes(sum + j, lanes); }) /
      static_cast<T>(n);
  const Vec<T> mean_v(mean);
  const T variance = sum_row<T>(n,
                                [&](int64_t j, int64_t lanes) {
                                  Vec<T> d = load_lanes(sum + j, lanes) - mean_v;
                                  // The lanes behind the row hold -mean; they must not count.
                                  if (lanes < Vec<T>::size) {
                                    T part[Vec<T>::size] = {};
                                    d.store(part, lanes);
                                    d = Vec<T>::load(part);
                                  }
                                  return d * d;
                                }) /
                     static_cast<T>(n);
  const T rstd = T(1) / static_cast<T>(::sqrt(static_cast<double>(variance + eps)));
  const Vec<T> rstd_v(rstd);
  for_row<T>(n, [&](int64_t j, int64_t lanes) {
    const Vec<T> h = (load_lanes(sum + j, lanes) - mean_v) * rstd_v;
    store_lanes(y + j, fma(h, load_lanes(weight + j, lanes), load_lanes(bias + j, lanes)), lanes);
  });
  return {mean, rstd};
}

// dsum = rstd (g - mean(g) - h mean(g h)) with g = dy * weight, h = (sum - mean) rstd; and, where
// dweight is given, dweight += dy * h, dbias += dy.
template <class T>
XLMR_INLINE void normalize_row_backward(int64_t n, RowStatistics<T> stat, const T* dy, const T* sum,
                                        const T* weight, T* dsum, T* dweight, T* dbias) {
  const Vec<T> mean(stat.mean), rstd(stat.rstd);
  const auto g = [&](int64_t j, int64_t lanes) {
    return load_lanes(dy + j, lanes) * load_lanes(weight + j, lanes);
  };
  const auto h = [&](int64_t j, int64_t lanes) {
    return (load_lanes(sum + j, lanes) - mean) * rstd;
  };
  const Vec<T> mean_g(sum_row<T>(n, g) / static_cast<T>(n));
  // g is 0 in the lanes behind the row, so h does not count there.
  const Vec<T> mean_gh(
      sum_row<T>(n, [&](int64_t j, int64_t lanes) { return g(j, lanes) * h(j, lanes); }) /
      static_cast<T>(n));
  for_row<T>(n, [&](int64_t j, int64_t lanes) {
    const Vec<T> hj = h(j, lanes);
    store_lanes(dsum + j, rstd * (g(j, lanes) - mean_g - hj * mean_gh), lanes);
    if (dweight != nullptr) {
      const Vec<T> d = load_lanes(dy + j, lanes);
      store_lanes(dweight + j, fma(d, hj, load_lanes(dweight + j, lanes)), lanes);
      store_lanes(dbias + j, load_lanes(dbias + j, lanes) + d, lanes);
    }
  });
}

// x *= mask
template <class T>
XLMR_INLINE void scale_row(int64_t n, const T* mask, T* x) {
  for_row<T>(n, [&](int64_t j, int64_t lanes) {
    store_lanes(x + j, load_lanes(x + j, lanes) * load_lanes(mask + j, lanes), lanes);
  });
}

constexpr int64_t kNormRows = 32;  // rows of one task, and of one partial sum of dweight

// Per block of kNormRows rows one partial dweight and one dbias, added up in order afterwards.
template <class T>
struct ParameterSums {
  T* partial = nullptr;  // [blocks, 2, hidden]

  ParameterSums(Workspace& space, bool wanted, int64_t rows, int64_t hidden) {
    if (wanted) partial = space.take<T>(ceil_div(rows, kNormRows), 2, hidden);
  }

  T* dweight(int64_t block, int64_t hidden) const {
    return partial == nullptr ? nullptr : partial + block * 2 * hidden;
  }

  void finish(const ExecContext& ctx, int64_t rows, int64_t hidden, T* dweight, T* dbias) const {
    if (partial == nullptr) return;
    const int64_t blocks = ceil_div(rows, kNormRows);
    column_sums(ctx, blocks, hidden, partial, 2 * hidden, dweight);
    column_sums(ctx, blocks, hidden, partial + hidden, 2 * hidden, dbias);
  }
};

}  // namespace
}  // namespace xlmr::XLMR_ISA
