// y = act(x W1^T + b1 [+ hidden_addend]) W2^T + b2 [+ addend], and its backward.
#include "cuda/bias_activation.cuh"
#include "cuda/column_sums.cuh"
#include "cuda/gemm.cuh"
#include "cuda/kernels.cuh"

namespace xlmr::XLMR_CUDA_NS {
namespace {

template <class T>
struct FeedForwardForwardLauncher {
  T* activated;  // [N, inner]

  FeedForwardForwardLauncher(Workspace& space, const FeedForwardForward& a)
      : activated(space.take<T>(a.rows, a.inner)) {}

  Status run(const FeedForwardForward& a, const ExecContext& ctx) const {
    GemmArgs<T> up;
    up.m = a.rows;
    up.n = a.inner;
    up.k = a.hidden;
    up.a[0] = static_cast<const T*>(a.x);
    up.a_stride = a.x_stride;
    up.b[0] = static_cast<const T*>(a.up_weight);
    up.b_stride = a.hidden;
    up.c[0] = activated;
    up.c_stride = a.inner;
    BiasActivation<T> act;
    act.bias[0] = static_cast<const T*>(a.up_bias);
    act.addend = static_cast<const T*>(a.hidden_addend);
    act.addend_stride = a.hidden_addend_stride;
    act.pre = static_cast<T*>(a.pre);
    act.pre_stride = a.inner;
    act.activation = a.activation;
    if (Status error = gemm<Layout::k_contiguous, Layout::k_contiguous>("feed_forward_forward up",
                                                                        up, act, ctx)) {
      return error;
    }
    GemmArgs<T> down;
    down.m = a.rows;
    down.n = a.hidden;
    down.k = a.inner;
    down.a[0] = activated;
    down.a_stride = a.inner;
    down.b[0] = static_cast<const T*>(a.down_weight);
    down.b_stride = a.inner;
    down.c[0] = static_cast<T*>(a.y);
    down.c_stride = a.hidden;
    BiasActivation<T> bias;
    bias.bias[0] = static_cast<const T*>(a.down_bias);
    bias.addend = static_cast<const T*>(a.addend);
    bias.addend_stride = a.addend_stride;
    return gemm<Layout::k_contiguous, Layout::k_contiguous>("feed_forward_forward down", down, bias,
                                                            ctx);
  }
};

// dpre = da act'(pre); act(pre) falls out on the way.
template <class T>
struct ActivationBackward {
  const T* pre;
  T* activated;  // may be null
  int64_t inner;
  Activation activation;

  __device__ __forceinline__ Wide<T> operator()(int, int64_t row, int64_t column,
                                                Wide<T> da) const {
    const auto act = activate_with_slope(activation, widen(pre[row * inner + column]));
    if (activated != nullptr) activated[row * inner + column] = narrow<T>(act.value);
    return da * act.slope;
  }
};

template <class T>
struct FeedForwardBackwardLauncher {
  T* dpre;       // [N, inner], where the caller gave none
  T* activated;  // [N, inner], act(pre) again; only for dW2
  ColumnSums<T, 1> up_sums, down_sums;

  FeedForwardBackwardLauncher(Workspace& space, const FeedForwardBackward& a)
      : dpre(a.dpre != nullptr ? static_cast<T*>(a.dpre) : space.take<T>(a.rows, a.inner)),
        activated(a.ddown_weight == nullptr ? nullptr : space.take<T>(a.rows, a.inner)),
        up_sums(space, a.dup_bias != nullptr, a.rows, a.inner),
        down_sums(space, a.ddown_bias != nullptr, a.rows, a.hidden) {}

  Status run(const FeedForwardBackward& a, const ExecContext& ctx) const {
    if (a.dx != nullptr || a.dup_weight != nullptr || a.dup_bias != nullptr || a.dpre != nullptr ||
        a.ddown_weight != nullptr) {
      if (Status error = inner_gradient(a, ctx)) return error;
    }
    if (a.dx != nullptr) {
      GemmArgs<T> g;
      g.m = a.rows;
      g.n = a.hidden;
      g.k = a.inner;
      g.a[0] = dpre;
      g.a_stride = a.inner;
      g.b[0] = static_cast<const T*>(a.up_weight);
      g.b_stride = g.c_stride = a.hidden;
      g.c[0] = static_cast<T*>(a.dx);
      if (Status error = gemm<Layout::k_contiguous, Layout::k_strided>("feed_forward_backward dx",
                                                                       g, NoEpilogue(), ctx)) {
        return error;
      }
    }
    const T* dy = static_cast<const T*>(a.dy);
    if (Status error = weight_gradient("feed_forward_backward dup_weight", a.rows, dpre, a.inner,
                                       a.inner, static_cast<const T*>(a.x), a.x_stride, a.hidden,
                                       static_cast<T*>(a.dup_weight), ctx)) {
      return error;
    }
    if (Status error = bias_gradient("feed_forward_backward dup_bias", up_sums, a.rows, a.inner,
                                     dpre, a.inner, static_cast<T*>(a.dup_bias), ctx)) {
      return error;
    }
    if (Status error =
            weight_gradient("feed_forward_backward ddown_weight", a.rows, dy, a.dy_stride, a.hidden,
                            activated, a.inner, a.inner, static_cast<T*>(a.ddown_weight), ctx)) {
      return error;
    }
    return bias_gradient("feed_forward_backward ddown_bias", down_sums, a.rows, a.hidden, dy,
                         a.dy_stride, static_cast<T*>(a.ddown_bias), ctx);
  }

 private:
  // dpre = (dy W2) * act'(pre)
  Status inner_gradient(const FeedForwardBackward& a, const ExecContext& ctx) const {
    GemmArgs<T> g;
    g.m = a.rows;
    g.n = a.inner;
    g.k = a.hidden;
    g.a[0] = static_cast<const T*>(a.dy);
    g.a_stride = a.dy_stride;
    g.b[0] = static_cast<const T*>(a.down_weight);
    g.b_stride = g.c_stride = a.inner;
    g.c[0] = dpre;
    const ActivationBackward<T> epilogue{static_cast<const T*>(a.pre), activated, a.inner,
                                         a.activation};
    return gemm<Layout::k_contiguous, Layout::k_strided>("feed_forward_backward dpre", g, epilogue,
                                                         ctx);
  }

  // dweight [out, in] = dz^T x; nothing where it is null.
  static Status weight_gradient(const char* name, int64_t rows, const T* dz, int64_t dz_stride,
                                int64_t out, const T* x, int64_t x_stride, int64_t in, T* dweight,
                                const ExecContext& ctx) {
    if (dweight == nullptr) return nullptr;
    GemmArgs<T> g;
    g.m = out;
    g.n = in;
    g.k = rows;
    g.a[0] = dz;
    g.a_stride = dz_stride;
    g.b[0] = x;
    g.b_stride = x_stride;
    g.c[0] = dweight;
    g.c_stride = in;
    return gemm<Layout::k_strided, Layout::k_strided>(name, g, NoEpilogue(), ctx);
  }

  static Status bias_gradient(const char* name, const ColumnSums<T, 1>& sums, int64_t rows,
                              int64_t columns, const T* dz, int64_t stride, T* dbias,
                              const ExecContext& ctx) {
    if (dbias == nullptr) return nullptr;
    T* const out[1] = {dbias};
    return sums.run(name, rows, columns, MatrixTerm<T>{dz, stride}, out, ctx);
  }
};

}  // namespace

XLMR_DEFINE_OP(feed_forward_forward, FeedForwardForward, FeedForwardForwardLauncher)
XLMR_DEFINE_OP(feed_forward_backward, FeedForwardBackward, FeedForwardBackwardLauncher)

}  // namespace xlmr::XLMR_CUDA_NS
