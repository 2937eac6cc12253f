// y = LayerNorm(dropout(x) + residual), and its backward.
#include "cpu/kernels.h"
#include "cpu/norm_row.h"

namespace xlmr::XLMR_ISA {
namespace {

template <class T>
struct LayerNormForwardKernel {
  int64_t row_size;
  T* mask;  // per thread, one row
  T* sum;   // per thread, one row, where the caller keeps none

  LayerNormForwardKernel(Workspace& space, const LayerNormForward& a, const ExecContext& ctx)
      : row_size(round_up(a.hidden, DropoutMask<T>::kGroup)),
        mask(space.take<T>(row_size, ctx.num_threads)),
        sum(space.take<T>(row_size, ctx.num_threads)) {}

  void run(const LayerNormForward& a, const ExecContext& ctx) const {
    const DropoutMask<T> dropout(a.dropout);
    auto rows = [&](int64_t block, int32_t thread) {
      T* mask_row = mask + thread * row_size;
      const int64_t begin = block * kNormRows;
      for (int64_t row = begin; row < min_of(a.rows, begin + kNormRows); ++row) {
        const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
        const T* residual = static_cast<const T*>(a.residual);
        const T* normalized = x;
        if (residual != nullptr || dropout.on() || a.sum != nullptr) {
          T* s =
              a.sum != nullptr ? static_cast<T*>(a.sum) + row * a.hidden : sum + thread * row_size;
          if (dropout.on()) dropout.row(0, row, 0, a.hidden, mask_row);
          for_row<T>(a.hidden, [&](int64_t j, int64_t lanes) {
            Vec<T> v = load_lanes(x + j, lanes);
            if (dropout.on()) v = v * load_lanes(mask_row + j, lanes);
            if (residual != nullptr) {
              v = v + load_lanes(residual + row * a.residual_stride + j, lanes);
            }
            store_lanes(s + j, v, lanes);
          });
          normalized = s;
        }
        const auto stat = normalize_row<T>(
            a.hidden, static_cast<T>(a.eps), normalized, static_cast<const T*>(a.weight),
            static_cast<const T*>(a.bias), static_cast<T*>(a.y) + row * a.hidden);
        if (a.mean != nullptr) {
          static_cast<T*>(a.mean)[row] = stat.mean;
          static_cast<T*>(a.rstd)[row] = stat.rstd;
        }
      }
    };
    parallel_for(ctx, ceil_div(a.rows, kNormRows), rows);
  }
};

template <class T>
struct LayerNormBackwardKernel {
  int64_t row_size;
  T* mask;  // per thread, one row
  ParameterSums<T> sums;

  LayerNormBackwardKernel(Workspace& space, const LayerNormBackward& a, const ExecContext& ctx)
      : row_size(round_up(a.hidden, DropoutMask<T>::kGroup)),
        mask(space.take<T>(row_size, ctx.num_threads)),
        sums(space, a.dweight != nullptr, a.rows, a.hidden) {}

  void run(const LayerNormBackward& a, const ExecContext& ctx) const {
    const DropoutMask<T> dropout(a.dropout);
    auto rows = [&](int64_t block, int32_t thread) {
      T* mask_row = mask + thread * row_size;
      T* dweight = sums.dweight(block, a.hidden);
      if (dweight != nullptr) fill_zero(dweight, 2 * a.hidden);
      const int64_t begin = block * kNormRows;
      for (int64_t row = begin; row < min_of(a.rows, begin + kNormRows); ++row) {
        T* dsum = static_cast<T*>(a.dsum) + row * a.hidden;
        normalize_row_backward<T>(
            a.hidden, {static_cast<const T*>(a.mean)[row], static_cast<const T*>(a.rstd)[row]},
            static_cast<const T*>(a.dy) + row * a.dy_stride,
            static_cast<const T*>(a.sum) + row * a.sum_stride, static_cast<const T*>(a.weight),
            dsum, dweight, dweight + (dweight != nullptr ? a.hidden : 0));
        if (a.dx != nullptr) {
          T* dx = static_cast<T*>(a.dx) + row * a.hidden;
          memcpy(dx, dsum, static_cast<size_t>(a.hidden) * sizeof(T));
          if (dropout.on()) {
            dropout.row(0, row, 0, a.hidden, mask_row);
            scale_row(a.hidden, mask_row, dx);
          }
        }
      }
    };
    parallel_for(ctx, ceil_div(a.rows, kNormRows), rows);
    sums.finish(ctx, a.rows, a.hidden, static_cast<T*>(a.dweight), static_cast<T*>(a.dbias));
  }
};

}  // namespace

XLMR_DEFINE_OP(layer_norm_forward, LayerNormForward, LayerNormForwardKernel)
XLMR_DEFINE_OP(layer_norm_backward, LayerNormBackward, LayerNormBackwardKernel)

}  // namespace xlmr::XLMR_ISA
