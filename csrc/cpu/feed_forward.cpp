// y = act(x W1^T + b1 [+ hidden_addend]) W2^T + b2 [+ addend], and its backward.
#include "cpu/bfloat16_ops.h"
#include "cpu/reduce.h"

namespace xlmr::XLMR_ISA {
namespace {

// Rows that go through both products before the next ones start, so that the inner activations
// of a long batch need not all exist at once: few where the weights are packed, more where every
// such part packs them again.
constexpr int64_t kForwardRows = 1536, kPackedForwardRows = 384;

template <class A>
struct FeedForwardForwardKernel {
  using T = typename A::Value;
  int64_t chunk;
  T* activated;  // [chunk, inner]
  GemmSpace<A> up_space, down_space;

  FeedForwardForwardKernel(Workspace& space, const FeedForwardForward& a, const ExecContext& ctx)
      : chunk(min_of(a.rows, a.packed ? kPackedForwardRows : kForwardRows)),
        activated(space.take<T>(chunk, a.inner)),
        up_space(space, ctx, chunk, padded<A>(a.hidden), A::kReadsPacked && a.packed),
        down_space(space, ctx, chunk, padded<A>(a.inner), A::kReadsPacked && a.packed) {}

  void run(const FeedForwardForward& a, const ExecContext& ctx) const {
    for (int64_t row = 0; row < a.rows; row += chunk) {
      run_rows(a, ctx, row, min_of(chunk, a.rows - row));
    }
  }

  void run_rows(const FeedForwardForward& a, const ExecContext& ctx, int64_t first,
                int64_t rows) const {
    const T* up_bias = static_cast<const T*>(a.up_bias);
    const T* down_bias = static_cast<const T*>(a.down_bias);
    const T* hidden_addend = static_cast<const T*>(a.hidden_addend);
    const T* addend = static_cast<const T*>(a.addend);
    T* pre = static_cast<T*>(a.pre);
    const Product<A> up = {rows,
                           a.inner,
                           1,
                           {{{static_cast<const T*>(a.x) + first * a.x_stride, a.x_stride, 1},
                             A::right(a.up_weight, a.inner, a.hidden),
                             a.hidden}},
                           activated,
                           a.inner,
                           packed_weight<A>(a.up_weight, a.packed)};
    with_feed_forward_activation(a.activation, [&](auto activation) {
      gemm(ctx, up_space, &up, 1, [&](int, Vec<T> z, int64_t row, int64_t column, int64_t lanes) {
        row += first;
        if (up_bias != nullptr) z = z + load_lanes(up_bias + column, lanes);
        if (hidden_addend != nullptr) {
          z = z + load_lanes(hidden_addend + row * a.hidden_addend_stride + column, lanes);
        }
        if (pre != nullptr) store_lanes(pre + row * a.inner + column, z, lanes);
        return activate<decltype(activation)::value>(z);
      });
    });
    const Product<A> down = {
        rows,
        a.hidden,
        1,
        {{{activated, a.inner, 1}, A::right(a.down_weight, a.hidden, a.inner), a.inner}},
        static_cast<T*>(a.y) + first * a.hidden,
        a.hidden,
        packed_weight<A>(a.down_weight, a.packed)};
    gemm(ctx, down_space, &down, 1, [&](int, Vec<T> y, int64_t row, int64_t column, int64_t lanes) {
      if (down_bias != nullptr) y = y + load_lanes(down_bias + column, lanes);
      if (addend != nullptr) {
        y = y + load_lanes(addend + (first + row) * a.addend_stride + column, lanes);
      }
      return y;
    });
  }
};

template <class A>
struct FeedForwardBackwardKernel {
  using T = typename A::Value;
  T* dpre;       // [N, inner], where the caller gave none
  T* activated;  // [N, inner], act(pre) again; only for dW2
  GemmSpace<A> inner_space, dx_space, dup_space, ddown_space;

  FeedForwardBackwardKernel(Workspace& space, const FeedForwardBackward& a, const ExecContext& ctx)
      : dpre(a.dpre != nullptr ? nullptr : space.take<T>(a.rows, a.inner)),
        activated(a.ddown_weight == nullptr ? nullptr : space.take<T>(a.rows, a.inner)),
        inner_space(space, ctx, a.rows, padded<A>(a.hidden)),
        dx_space(space, ctx, a.dx ? a.rows : 0, a.dx ? padded<A>(a.inner) : 0),
        dup_space(space, ctx, a.dup_weight ? a.inner : 0, a.dup_weight ? padded<A>(a.rows) : 0),
        ddown_space(space, ctx, a.ddown_weight ? a.hidden : 0,
                    a.ddown_weight ? padded<A>(a.rows) : 0) {}

  void run(const FeedForwardBackward& a, const ExecContext& ctx) const {
    const MatrixView<T> dy{static_cast<const T*>(a.dy), a.dy_stride, 1};
    const MatrixView<T> x{static_cast<const T*>(a.x), a.x_stride, 1};
    const T* pre = static_cast<const T*>(a.pre);
    T* dz = a.dpre != nullptr ? static_cast<T*>(a.dpre) : dpre;

    // dpre = (dy W2) * act'(pre); act(pre) falls out on the way.
    if (a.dx != nullptr || a.dup_weight != nullptr || a.dup_bias != nullptr || a.dpre != nullptr ||
        a.ddown_weight != nullptr) {
      const Product<A> inner = {
          a.rows, a.inner, 1, {{dy, {static_cast<const T*>(a.down_weight), a.inner, 1}, a.hidden}},
          dz,     a.inner};
      with_feed_forward_activation(a.activation, [&](auto activation) {
        gemm(ctx, inner_space, &inner, 1,
             [&](int, Vec<T> da, int64_t row, int64_t column, int64_t lanes) {
               const Vec<T> z = load_lanes(pre + row * a.inner + column, lanes);
               const auto act = activate_with_slope<decltype(activation)::value>(z);
               if (activated != nullptr) {
                 store_lanes(activated + row * a.inner + column, act.value, lanes);
               }
               return da * act.slope;
             });
      });
    }
    const MatrixView<T> dz_view{dz, a.inner, 1};
    if (a.dx != nullptr) {
      const Product<A> product = {
          a.rows,
          a.hidden,
          1,
          {{dz_view, {static_cast<const T*>(a.up_weight), a.hidden, 1}, a.inner}},
          static_cast<T*>(a.dx),
          a.hidden};
      gemm(ctx, dx_space, &product, 1, [](int, Vec<T> v, int64_t, int64_t, int64_t) { return v; });
    }
    if (a.dup_weight != nullptr) {
      weight_gradient(ctx, dup_space, a.rows, dz_view, a.inner, x, a.hidden,
                      static_cast<T*>(a.dup_weight));
    }
    if (a.dup_bias != nullptr) {
      column_sums(ctx, a.rows, a.inner, dz, a.inner, static_cast<T*>(a.dup_bias));
    }
    if (a.ddown_weight != nullptr) {
      weight_gradient(ctx, ddown_space, a.rows, dy, a.hidden, {activated, a.inner, 1}, a.inner,
                      static_cast<T*>(a.ddown_weight));
    }
    if (a.ddown_bias != nullptr) {
      column_sums(ctx, a.rows, a.hidden, dy.data, dy.row, static_cast<T*>(a.ddown_bias));
    }
  }
};

template <class T>
using ExactFeedForwardForward = FeedForwardForwardKernel<Exact<T>>;
template <class T>
using ExactFeedForwardBackward = FeedForwardBackwardKernel<Exact<T>>;

}  // namespace

#if !defined(XLMR_ISA_BF16)
XLMR_DEFINE_OP(feed_forward_forward, FeedForwardForward, ExactFeedForwardForward)
XLMR_DEFINE_OP(feed_forward_backward, FeedForwardBackward, ExactFeedForwardBackward)
#else
XLMR_DEFINE_BF16_OP(feed_forward_bf16_backward, feed_forward_backward, FeedForwardBackward,
                    FeedForwardBackwardKernel)
#endif
XLMR_DEFINE_BF16_OP(feed_forward_bf16_forward, feed_forward_forward, FeedForwardForward,
                    FeedForwardForwardKernel)

}  // namespace xlmr::XLMR_ISA
