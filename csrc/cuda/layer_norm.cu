// y = LayerNorm(dropout(x) + residual), and its backward.
#include "cuda/kernels.cuh"
#include "cuda/norm.cuh"

namespace xlmr::XLMR_CUDA_NS {
namespace {

template <class T>
struct ResidualRow {
  const T* x;
  const T* residual;  // may be null
  __device__ __forceinline__ Wide<T> value(int64_t column, Wide<T> factor) const {
    const Wide<T> kept = widen(x[column]) * factor;
    return residual == nullptr ? kept : kept + widen(residual[column]);
  }
};

template <class T>
struct ResidualRows {
  const T* x;
  int64_t x_stride;
  const T* residual;
  int64_t residual_stride;
  __device__ __forceinline__ ResidualRow<T> row(int64_t index) const {
    return {x + index * x_stride,
            residual == nullptr ? nullptr : residual + index * residual_stride};
  }
};

template <class T>
struct LayerNormForwardLauncher {
  LayerNormForwardLauncher(Workspace&, const LayerNormForward&) {}

  Status run(const LayerNormForward& a, const ExecContext& ctx) const {
    NormForward<T> norm = norm_forward_of<T>(a);
    norm.before = DropoutMask<Wide<T>>(a.dropout);
    norm.sum = static_cast<T*>(a.sum);
    const ResidualRows<T> rows{static_cast<const T*>(a.x), a.x_stride,
                               static_cast<const T*>(a.residual), a.residual_stride};
    return norm_forward("layer_norm_forward", norm, rows, ctx);
  }
};

template <class T>
struct LayerNormBackwardLauncher {
  ColumnSums<T, 2> sums;

  LayerNormBackwardLauncher(Workspace& space, const LayerNormBackward& a)
      : sums(space, a.dweight != nullptr, a.rows, a.hidden) {}

  Status run(const LayerNormBackward& a, const ExecContext& ctx) const {
    NormBackward<T> norm = norm_backward_of<T>(a);
    norm.before = DropoutMask<Wide<T>>(a.dropout);
    norm.dx = static_cast<T*>(a.dx);
    const ResidualRows<T> rows{static_cast<const T*>(a.sum), a.sum_stride, nullptr, 0};
    return norm_backward("layer_norm_backward", norm, rows, sums, ctx);
  }
};

}  // namespace

XLMR_DEFINE_OP(layer_norm_forward, LayerNormForward, LayerNormForwardLauncher)
XLMR_DEFINE_OP(layer_norm_backward, LayerNormBackward, LayerNormBackwardLauncher)

}  // namespace xlmr::XLMR_CUDA_NS
