// Linear and feed-forward over 8-bit weights.
#include "cpu/gemm_int8.h"
#include "cpu/kernels.h"

namespace xlmr::XLMR_ISA {
namespace {

struct LinearInt8Kernel {
  Int8Space product_space;

  LinearInt8Kernel(Workspace& space, const LinearInt8Forward& a, const ExecContext&)
      : product_space(space, a.rows, a.in_features) {}

  void run(const LinearInt8Forward& a, const ExecContext& ctx) const {
    const Int8Weight weight(a.weight, a.out_features, a.in_features);
    gemm_int8(
        ctx, product_space, a.rows, a.in_features, a.x, a.x_stride, weight, a.out_features, a.y,
        a.y_stride,
        [bias = a.bias, addend = a.addend, stride = a.addend_stride, activation = a.activation](
            Vec<float> y, int64_t row, int64_t column, int64_t lanes) {
          if (bias != nullptr) y = y + load_lanes(bias + column, lanes);
          if (addend != nullptr) y = y + load_lanes(addend + row * stride + column, lanes);
          return activation == Activation::tanh ? tanh(y) : y;
        });
  }
};

// Rows that go through both products before the next ones start: what lies between them, 1.5 MiB
// for an inner size of 3072, hardly leaves L2.
constexpr int64_t kInt8ForwardRows = 128;

struct FeedForwardInt8Kernel {
  int64_t chunk;
  float* activated;  // [chunk, inner]
  Int8Space up_space, down_space;

  FeedForwardInt8Kernel(Workspace& space, const FeedForwardInt8Forward& a, const ExecContext&)
      : chunk(min_of(a.rows, kInt8ForwardRows)),
        activated(space.take<float>(chunk, a.inner)),
        up_space(space, chunk, a.hidden),
        down_space(space, chunk, a.inner) {}

  void run(const FeedForwardInt8Forward& a, const ExecContext& ctx) const {
    for (int64_t row = 0; row < a.rows; row += chunk) {
      run_rows(a, ctx, row, min_of(chunk, a.rows - row));
    }
  }

  void run_rows(const FeedForwardInt8Forward& a, const ExecContext& ctx, int64_t first,
                int64_t rows) const {
    const Int8Weight up(a.up_weight, a.inner, a.hidden), down(a.down_weight, a.hidden, a.inner);
    with_feed_forward_activation(a.activation, [&](auto activation) {
      gemm_int8(ctx, up_space, rows, a.hidden, a.x + first * a.x_stride, a.x_stride, up, a.inner,
                activated, a.inner,
                [bias = a.up_bias](Vec<float> z, int64_t, int64_t column, int64_t lanes) {
                  if (bias != nullptr) z = z + load_lanes(bias + column, lanes);
                  return activate<decltype(activation)::value>(z);
                });
    });
    const float* addend = a.addend == nullptr ? nullptr : a.addend + first * a.addend_stride;
    gemm_int8(ctx, down_space, rows, a.inner, activated, a.inner, down, a.hidden,
              a.y + first * a.hidden, a.hidden,
              [bias = a.down_bias, addend, stride = a.addend_stride](
                  Vec<float> y, int64_t row, int64_t column, int64_t lanes) {
                if (bias != nullptr) y = y + load_lanes(bias + column, lanes);
                if (addend != nullptr) y = y + load_lanes(addend + row * stride + column, lanes);
                return y;
              });
  }
};

}  // namespace

int64_t linear_int8_forward_workspace(const LinearInt8Forward& args, const ExecContext& ctx) {
  return kernel_workspace<LinearInt8Kernel>(args, ctx);
}
Status linear_int8_forward(const LinearInt8Forward& args, const ExecContext& ctx) {
  return run_kernel<LinearInt8Kernel>(args, ctx);
}
int64_t feed_forward_int8_forward_workspace(const FeedForwardInt8Forward& args,
                                            const ExecContext& ctx) {
  return kernel_workspace<FeedForwardInt8Kernel>(args, ctx);
}
Status feed_forward_int8_forward(const FeedForwardInt8Forward& args, const ExecContext& ctx) {
  return run_kernel<FeedForwardInt8Kernel>(args, ctx);
}

}  // namespace xlmr::XLMR_ISA
