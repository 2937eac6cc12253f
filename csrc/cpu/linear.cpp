// y_p = act(x W_p^T + b_p [+ addend]), its backward, and the packing of W.
#include "cpu/bfloat16_ops.h"
#include "cpu/reduce.h"

namespace xlmr::XLMR_ISA {
namespace {

template <class A>
struct LinearForwardKernel {
  using T = typename A::Value;
  GemmSpace<A> gemm_space;

  LinearForwardKernel(Workspace& space, const LinearForward& a, const ExecContext& ctx)
      : gemm_space(space, ctx, a.rows, padded<A>(a.in_features), A::kReadsPacked && a.packed) {}

  void run(const LinearForward& a, const ExecContext& ctx) const {
    Product<A> product[3];
    for (int p = 0; p < a.parts; ++p) {
      product[p] = {a.rows,
                    a.out_features,
                    1,
                    {{{static_cast<const T*>(a.x), a.x_stride, 1},
                      A::right(a.weight[p], a.out_features, a.in_features),
                      a.in_features}},
                    static_cast<T*>(a.y[p]),
                    a.y_stride,
                    packed_weight<A>(a.weight[p], a.packed)};
    }
    const T* addend = static_cast<const T*>(a.addend);
    gemm(ctx, gemm_space, product, static_cast<int>(a.parts),
         [&](int p, Vec<T> y, int64_t row, int64_t column, int64_t lanes) {
           const T* bias = static_cast<const T*>(a.bias[p]);
           if (bias != nullptr) y = y + load_lanes(bias + column, lanes);
           if (addend != nullptr)
             y = y + load_lanes(addend + row * a.addend_stride + column, lanes);
           return a.activation == Activation::tanh ? tanh(y) : y;
         });
  }
};

template <class A>
struct LinearBackwardKernel {
  using T = typename A::Value;
  GemmSpace<A> dx_space, dweight_space;

  LinearBackwardKernel(Workspace& space, const LinearBackward& a, const ExecContext& ctx)
      : dx_space(space, ctx, a.dx ? a.rows : 0,
                 a.dx ? product(a.parts, padded<A>(a.out_features)) : 0),
        dweight_space(space, ctx, a.dweight[0] ? a.out_features : 0,
                      a.dweight[0] ? padded<A>(a.rows) : 0) {}

  void run(const LinearBackward& a, const ExecContext& ctx) const {
    MatrixView<T> dz[3];
    for (int p = 0; p < a.parts; ++p) dz[p] = {static_cast<const T*>(a.dy[p]), a.dy_stride, 1};
    if (a.activation == Activation::tanh) {
      // tanh' = 1 - y^2
      T* out = static_cast<T*>(a.dz);
      parallel_ranges(ctx, a.rows, 16, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const T* dy = static_cast<const T*>(a.dy[0]) + row * a.dy_stride;
          const T* y = static_cast<const T*>(a.y) + row * a.out_features;
          for_row<T>(a.out_features, [&](int64_t j, int64_t lanes) {
            const Vec<T> v = load_lanes(y + j, lanes);
            const Vec<T> slope = Vec<T>(T(1)) - v * v;
            store_lanes(out + row * a.out_features + j, load_lanes(dy + j, lanes) * slope, lanes);
          });
        }
      });
      dz[0] = {out, a.out_features, 1};
    }
    const auto keep = [](int, Vec<T> x, int64_t, int64_t, int64_t) { return x; };
    if (a.dx != nullptr) {
      Product<A> product = {a.rows, a.in_features,         static_cast<int>(a.parts),
                            {},     static_cast<T*>(a.dx), a.in_features};
      for (int p = 0; p < a.parts; ++p) {
        product.segment[p] = {
            dz[p], {static_cast<const T*>(a.weight[p]), a.in_features, 1}, a.out_features};
      }
      gemm(ctx, dx_space, &product, 1, keep);
    }
    for (int p = 0; p < a.parts; ++p) {
      if (a.dweight[p] != nullptr) {
        weight_gradient(ctx, dweight_space, a.rows, dz[p], a.out_features,
                        {static_cast<const T*>(a.x), a.x_stride, 1}, a.in_features,
                        static_cast<T*>(a.dweight[p]));
      }
      if (a.dbias[p] != nullptr) {
        column_sums(ctx, a.rows, a.out_features, dz[p].data, dz[p].row,
                    static_cast<T*>(a.dbias[p]));
      }
    }
  }
};

template <class T>
using ExactLinearForward = LinearForwardKernel<Exact<T>>;
template <class T>
using ExactLinearBackward = LinearBackwardKernel<Exact<T>>;

template <class T>
struct PackWeightKernel {
  PackWeightKernel(Workspace&, const PackWeight&, const ExecContext&) {}

  void run(const PackWeight& a, const ExecContext& ctx) const {
    constexpr int64_t NR = Tile<T>::kColumns;
    const MatrixView<T> b{static_cast<const T*>(a.weight), 1, a.in_features};  // W^T
    parallel_ranges(ctx, ceil_div(a.out_features, NR), 1, [&](int64_t begin, int64_t) {
      const int64_t column = begin * NR;
      pack_b(b.at(0, column), a.in_features, min_of(NR, a.out_features - column),
             static_cast<T*>(a.packed) + column * a.in_features);
    });
  }
};

}  // namespace

#if !defined(XLMR_ISA_BF16)

int64_t packed_bytes(DType dtype, int64_t out_features, int64_t in_features) {
  const int64_t columns = dtype == DType::float32 ? Tile<float>::kColumns : Tile<double>::kColumns;
  const int64_t elements = product(round_up(out_features, columns), in_features);
  const int64_t bytes = product(elements, dtype_size(dtype));
  return bytes == INT64_MAX ? -1 : bytes;
}

XLMR_DEFINE_OP(pack_weight, PackWeight, PackWeightKernel)
XLMR_DEFINE_OP(linear_forward, LinearForward, ExactLinearForward)
XLMR_DEFINE_OP(linear_backward, LinearBackward, ExactLinearBackward)

#else
XLMR_DEFINE_BF16_OP(linear_bf16_backward, linear_backward, LinearBackward, LinearBackwardKernel)
#endif
XLMR_DEFINE_BF16_OP(linear_bf16_forward, linear_forward, LinearForward, LinearForwardKernel)

}  // namespace xlmr::XLMR_ISA
