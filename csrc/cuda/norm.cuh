// LayerNorm of rows, forward and backward, shared by the LayerNorm and embedding ops. A warp makes
// a row: three passes forward, two backward, over what it wrote itself or over its inputs again, so
// a row may be of any length. A `Rows` says what is normalised: rows.row(i).value(column, factor)
// is an element before the LayerNorm, `factor` being what dropout does to x. In 16 bits that
// element is rounded before anything is made of it: so statistics and gradients are of the very
// numbers that are kept for the backward.
#pragma once

#include "cuda/column_sums.cuh"
#include "cuda/dropout.cuh"
#include "cuda/element.cuh"

namespace xlmr::XLMR_CUDA_NS {
namespace {

constexpr int kNormWarps = 4;  // of a block
constexpr int kNormThreads = kNormWarps * kWarp;
constexpr int kNormBlocks = 8;  // of a multiprocessor; asked for more, ptxas spills for it

template <class T>
struct NormForward {
  int64_t rows, hidden;
  Wide<T> eps;
  DropoutMask<Wide<T>> before, after;  // on what `value` takes as its factor, and on y
  const T* weight;
  const T* bias;
  T* y;
  T* sum;         // may be null
  Wide<T>* mean;  // null together with rstd
  Wide<T>* rstd;
};

// What the arguments of the two ops have alike; dropout and `sum` are left to them.
template <class T, class Args>
NormForward<T> norm_forward_of(const Args& a) {
  NormForward<T> norm{};
  norm.rows = a.rows;
  norm.hidden = a.hidden;
  norm.eps = static_cast<Wide<T>>(a.eps);
  norm.weight = static_cast<const T*>(a.weight);
  norm.bias = static_cast<const T*>(a.bias);
  norm.y = static_cast<T*>(a.y);
  norm.mean = static_cast<Wide<T>*>(a.mean);
  norm.rstd = static_cast<Wide<T>*>(a.rstd);
  return norm;
}

// Calls f(column, i) for the columns of a group of four that there are.
template <class F>
__device__ __forceinline__ void for_group(int64_t group, int64_t hidden, const F& f) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (4 * group + i < hidden) f(4 * group + i, i);
  }
}

template <class T, class Rows>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    norm_forward_kernel(NormForward<T> a, Rows rows) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kNormWarps + threadIdx.x / kWarp;
  if (index >= a.rows) return;
  using W = Wide<T>;
  const auto row = rows.row(index);
  const int64_t groups = ceil_div(a.hidden, 4);
  T* y = a.y + index * a.hidden;
  // The sums wait where each lane finds its own again: in y, where the caller keeps none.
  T* sum = a.sum != nullptr ? a.sum + index * a.hidden : y;
  W total = 0;
  for (int64_t group = lane; group < groups; group += kWarp) {
    const Quad<W> factor = a.before.factors(0, index, group);
    for_group(group, a.hidden, [&](int64_t column, int i) {
      const T value = narrow<T>(row.value(column, factor.v[i]));
      sum[column] = value;
      total += widen(value);
    });
  }
  const W mean = sum_lanes(total) / static_cast<W>(a.hidden);
  W squares = 0;
  for (int64_t group = lane; group < groups; group += kWarp) {
    for_group(group, a.hidden, [&](int64_t column, int) {
      const W d = widen(sum[column]) - mean;
      squares = fma(d, d, squares);
    });
  }
  const W variance = sum_lanes(squares) / static_cast<W>(a.hidden);
  const W rstd = W(1) / sqrt(variance + a.eps);
  for (int64_t group = lane; group < groups; group += kWarp) {
    const Quad<W> factor = a.after.factors(0, index, group);
    for_group(group, a.hidden, [&](int64_t column, int i) {
      const W h = (widen(sum[column]) - mean) * rstd;
      const W normal = fma(h, widen(a.weight[column]), widen(a.bias[column]));
      y[column] = narrow<T>(normal * factor.v[i]);
    });
  }
  if (lane == 0 && a.mean != nullptr) {
    a.mean[index] = mean;
    a.rstd[index] = rstd;
  }
}

template <class T>
struct NormBackward {
  int64_t rows, hidden;
  DropoutMask<Wide<T>> before, after;  // on dx, and on dy
  const T* dy;
  int64_t dy_stride;
  const Wide<T>* mean;
  const Wide<T>* rstd;
  const T* weight;
  T* dsum;
  T* dx;       // may be null
  T* dweight;  // null together with dbias
  T* dbias;
};

// What the arguments of the two ops have alike; dropout and `dx` are left to them.
template <class T, class Args>
NormBackward<T> norm_backward_of(const Args& a) {
  NormBackward<T> norm{};
  norm.rows = a.rows;
  norm.hidden = a.hidden;
  norm.dy = static_cast<const T*>(a.dy);
  norm.dy_stride = a.dy_stride;
  norm.mean = static_cast<const Wide<T>*>(a.mean);
  norm.rstd = static_cast<const Wide<T>*>(a.rstd);
  norm.weight = static_cast<const T*>(a.weight);
  norm.dsum = static_cast<T*>(a.dsum);
  norm.dweight = static_cast<T*>(a.dweight);
  norm.dbias = static_cast<T*>(a.dbias);
  return norm;
}

// dsum = rstd (g - mean(g) - h mean(g h)) with g = dy * weight and h = (sum - mean) rstd.
template <class T, class Rows>
__global__ void __launch_bounds__(kNormThreads) norm_backward_kernel(NormBackward<T> a, Rows rows) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kNormWarps + threadIdx.x / kWarp;
  if (index >= a.rows) return;
  using W = Wide<T>;
  const auto row = rows.row(index);
  const int64_t groups = ceil_div(a.hidden, 4);
  const W mean = a.mean[index], rstd = a.rstd[index];
  const T* dy = a.dy + index * a.dy_stride;
  W total_g = 0, total_gh = 0;
  for (int64_t group = lane; group < groups; group += kWarp) {
    const Quad<W> factor = a.after.factors(0, index, group);
    for_group(group, a.hidden, [&](int64_t column, int i) {
      const W g = widen(dy[column]) * factor.v[i] * widen(a.weight[column]);
      total_g += g;
      total_gh = fma(g, (stored<T>(row.value(column, W(1))) - mean) * rstd, total_gh);
    });
  }
  const W mean_g = sum_lanes(total_g) / static_cast<W>(a.hidden);
  const W mean_gh = sum_lanes(total_gh) / static_cast<W>(a.hidden);
  for (int64_t group = lane; group < groups; group += kWarp) {
    const Quad<W> factor = a.after.factors(0, index, group);
    const Quad<W> dx_factor = a.before.factors(0, index, group);
    for_group(group, a.hidden, [&](int64_t column, int i) {
      const W g = widen(dy[column]) * factor.v[i] * widen(a.weight[column]);
      const W h = (stored<T>(row.value(column, W(1))) - mean) * rstd;
      const W dsum = rstd * (g - mean_g - h * mean_gh);
      a.dsum[index * a.hidden + column] = narrow<T>(dsum);
      if (a.dx != nullptr) {
        a.dx[index * a.hidden + column] = narrow<T>(dsum * dx_factor.v[i]);
      }
    });
  }
}

// dy * h and dy, whose sums over rows are dweight and dbias.
template <class T, class Rows>
struct ParameterTerm {
  NormBackward<T> a;
  Rows rows;
  __device__ void operator()(int64_t index, int64_t column, Wide<T> (&value)[2]) const {
    const Wide<T> dy = widen(a.dy[index * a.dy_stride + column]) * a.after.factor(0, index, column);
    const Wide<T> sum = stored<T>(rows.row(index).value(column, Wide<T>(1)));
    value[0] = dy * ((sum - a.mean[index]) * a.rstd[index]);
    value[1] = dy;
  }
};

template <class T, class Rows>
Status norm_forward(const char* name, const NormForward<T>& a, const Rows& rows,
                    const ExecContext& ctx) {
  return launch(name, norm_forward_kernel<T, Rows>, ceil_div(a.rows, kNormWarps), kNormThreads, 0,
                ctx, a, rows);
}

template <class T, class Rows>
Status norm_backward(const char* name, const NormBackward<T>& a, const Rows& rows,
                     const ColumnSums<T, 2>& sums, const ExecContext& ctx) {
  if (Status error = launch(name, norm_backward_kernel<T, Rows>, ceil_div(a.rows, kNormWarps),
                            kNormThreads, 0, ctx, a, rows)) {
    return error;
  }
  if (a.dweight == nullptr) return nullptr;
  T* const out[2] = {a.dweight, a.dbias};
  return sums.run(name, a.rows, a.hidden, ParameterTerm<T, Rows>{a, rows}, out, ctx);
}

}  // namespace
}  // namespace xlmr::XLMR_CUDA_NS
