// y_p = act(x W_p^T + b_p [+ addend]), its backward, and the packing of W, which is a plain copy.
#include "cuda/bias_activation.cuh"
#include "cuda/column_sums.cuh"
#include "cuda/gemm.cuh"
#include "cuda/kernels.cuh"

namespace xlmr::XLMR_CUDA_NS {
namespace {

constexpr int kElementThreads = 256;

template <class T>
__global__ void __launch_bounds__(kElementThreads)
    copy_kernel(int64_t count, const T* from, T* to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  if (i < count) to[i] = from[i];
}

template <class T>
struct PackWeightLauncher {
  PackWeightLauncher(Workspace&, const PackWeight&) {}

  Status run(const PackWeight& a, const ExecContext& ctx) const {
    const int64_t count = a.out_features * a.in_features;
    return launch("pack_weight", copy_kernel<T>, ceil_div(count, kElementThreads), kElementThreads,
                  0, ctx, count, static_cast<const T*>(a.weight), static_cast<T*>(a.packed));
  }
};

template <class T>
struct LinearForwardLauncher {
  LinearForwardLauncher(Workspace&, const LinearForward&) {}

  Status run(const LinearForward& a, const ExecContext& ctx) const {
    GemmArgs<T> g;
    g.m = a.rows;
    g.n = a.out_features;
    g.k = a.in_features;
    g.products = a.parts;
    g.a_stride = a.x_stride;
    g.b_stride = a.in_features;
    g.c_stride = a.y_stride;
    BiasActivation<T> epilogue;
    for (int p = 0; p < a.parts; ++p) {
      g.a[p] = static_cast<const T*>(a.x);
      g.b[p] = static_cast<const T*>(a.weight[p]);
      g.c[p] = static_cast<T*>(a.y[p]);
      epilogue.bias[p] = static_cast<const T*>(a.bias[p]);
    }
    epilogue.addend = static_cast<const T*>(a.addend);
    epilogue.addend_stride = a.addend_stride;
    epilogue.activation = a.activation;
    return gemm<Layout::k_contiguous, Layout::k_contiguous>("linear_forward", g, epilogue, ctx);
  }
};

// dz = dy (1 - y^2)
template <class T>
__global__ void __launch_bounds__(kElementThreads)
    tanh_backward_kernel(int64_t rows, int64_t columns, const T* dy, int64_t dy_stride, const T* y,
                         T* dz) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  if (i >= rows * columns) return;
  const Wide<T> of_y = widen(y[i]), of_dy = widen(dy[i / columns * dy_stride + i % columns]);
  dz[i] = narrow<T>(of_dy * (Wide<T>(1) - of_y * of_y));
}

template <class T>
struct LinearBackwardLauncher {
  ColumnSums<T, 1> sums;

  LinearBackwardLauncher(Workspace& space, const LinearBackward& a)
      : sums(space, a.dbias[0] != nullptr || a.dbias[1] != nullptr || a.dbias[2] != nullptr, a.rows,
             a.out_features) {}

  Status run(const LinearBackward& a, const ExecContext& ctx) const {
    const T* dz[3] = {};
    int64_t dz_stride = a.dy_stride;
    for (int p = 0; p < a.parts; ++p) dz[p] = static_cast<const T*>(a.dy[p]);
    if (a.activation == Activation::tanh) {
      T* out = static_cast<T*>(a.dz);
      const int64_t blocks = ceil_div(a.rows * a.out_features, kElementThreads);
      if (Status error =
              launch("tanh_backward", tanh_backward_kernel<T>, blocks, kElementThreads, 0, ctx,
                     a.rows, a.out_features, dz[0], dz_stride, static_cast<const T*>(a.y), out)) {
        return error;
      }
      dz[0] = out;
      dz_stride = a.out_features;
    }
    if (a.dx != nullptr) {
      GemmArgs<T> g;
      g.m = a.rows;
      g.n = a.in_features;
      g.k = a.out_features;
      g.segments = a.parts;
      g.a_stride = dz_stride;
      g.b_stride = g.c_stride = a.in_features;
      g.c[0] = static_cast<T*>(a.dx);
      for (int p = 0; p < a.parts; ++p) {
        g.a[p] = dz[p];
        g.b[p] = static_cast<const T*>(a.weight[p]);
      }
      if (Status error = gemm<Layout::k_contiguous, Layout::k_strided>("linear_backward dx", g,
                                                                       NoEpilogue(), ctx)) {
        return error;
      }
    }
    if (a.dweight[0] != nullptr) {
      GemmArgs<T> g;
      g.m = a.out_features;
      g.n = a.in_features;
      g.k = a.rows;
      g.products = a.parts;
      g.a_stride = dz_stride;
      g.b_stride = a.x_stride;
      g.c_stride = a.in_features;
      for (int p = 0; p < a.parts; ++p) {
        g.a[p] = dz[p];
        g.b[p] = static_cast<const T*>(a.x);
        g.c[p] = static_cast<T*>(a.dweight[p]);
      }
      if (Status error = gemm<Layout::k_strided, Layout::k_strided>("linear_backward dweight", g,
                                                                    NoEpilogue(), ctx)) {
        return error;
      }
    }
    for (int p = 0; p < a.parts; ++p) {
      if (a.dbias[p] == nullptr) continue;
      T* const out[1] = {static_cast<T*>(a.dbias[p])};
      if (Status error = sums.run("linear_backward dbias", a.rows, a.out_features,
                                  MatrixTerm<T>{dz[p], dz_stride}, out, ctx)) {
        return error;
      }
    }
    return nullptr;
  }
};

}  // namespace

XLMR_DEFINE_OP(pack_weight, PackWeight, PackWeightLauncher)
XLMR_DEFINE_OP(linear_forward, LinearForward, LinearForwardLauncher)
XLMR_DEFINE_OP(linear_backward, LinearBackward, LinearBackwardLauncher)

}  // namespace xlmr::XLMR_CUDA_NS
