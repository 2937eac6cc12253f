#include "core/encoder.h"

#include <algorithm>
#include <cstring>

namespace xlmr {
namespace {

constexpr int64_t kAlign = 64;

// Buffers of one call, one behind the other. For the query the base is 0, and what take() answers
// are places in it.
class Layout {
 public:
  explicit Layout(const void* base)
      : base_((reinterpret_cast<uintptr_t>(base) + kAlign - 1) / kAlign * kAlign) {}

  // Room for a * b * c bytes; null, and an overflow, where that is no size.
  void* take(int64_t a, int64_t b = 1, int64_t c = 1) {
    int64_t bytes = 0;
    overflow_ = overflow_ || a < 0 || __builtin_mul_overflow(a, b, &bytes) ||
                __builtin_mul_overflow(bytes, c, &bytes) || bytes > INT64_MAX / 4 ||
                used_ > INT64_MAX / 4;
    if (overflow_) return nullptr;
    const uintptr_t piece = base_ + static_cast<uintptr_t>(used_);
    used_ += (bytes + kAlign - 1) / kAlign * kAlign;
    return reinterpret_cast<void*>(piece);
  }

  bool overflow() const { return overflow_; }
  int64_t total() const { return overflow_ ? -1 : used_ + kAlign; }

 private:
  uintptr_t base_;
  int64_t used_ = 0;
  bool overflow_ = false;
};

// One call. The ops run in the order of the methods below; a dry pass through the same methods
// finds the largest workspace that one of them asks for.
class Encoder {
 public:
  Encoder(Layout& layout, const KernelTable& table, const EncoderForward& args,
          const ExecContext& ctx)
      : table_(table), args_(args), ctx_(ctx), embedding_(args.embedding) {
    element_ = dtype_size(embedding_.dtype);
    // Where sequences are empty there may be more of them than tokens. At least one row, so that
    // what fits here fits in products with `hidden` too.
    const int64_t batch = args_.first_only ? args_.batch : 0;
    const int64_t most = std::max({rows(), batch, int64_t(1)});
    state_ = layout.take(rows(), hidden(), element_);
    context_ = layout.take(most, hidden(), element_);
    sum_ = layout.take(most, hidden(), element_);
    projected_ = layout.take(most, hidden(), 3 * element_);
    first_ = layout.take(batch, hidden(), element_);
    first_query_ = layout.take(batch, hidden(), element_);
    if (layout.overflow()) return;
    embedding_.y = state_;
    embedding_.mean = embedding_.rstd = nullptr;
    dry_ = true;
    run();
    dry_ = false;
    ctx_.workspace = layout.take(scratch_);
  }

  Status run() {
    if (Status error = step(table_.embedding_forward, embedding_)) return error;
    for (int64_t index = 0; index < args_.num_layers; ++index) {
      if (args_.states != nullptr && !dry_) {
        std::memcpy(at(args_.states, index * rows(), hidden()), state_, bytes(rows()));
      }
      const bool last = index + 1 == args_.num_layers;
      if (Status error =
              layer(args_.layers[index], last && args_.first_only, last ? args_.y : state_)) {
        return error;
      }
    }
    if (args_.first_only && !dry_) clear_empty();
    return nullptr;
  }

 private:
  int64_t rows() const { return embedding_.rows; }
  int64_t hidden() const { return embedding_.hidden; }
  bool bf16() const { return args_.weights == WeightFormat::bfloat16; }
  size_t bytes(int64_t rows) const { return static_cast<size_t>(rows * hidden() * element_); }
  char* at(void* base, int64_t row, int64_t width) const {
    return static_cast<char*>(base) + row * width * element_;
  }

  template <class Args>
  Status step(const Op<Args>& op, const Args& args) {
    if (!dry_) return op.run(args, ctx_);
    const int64_t needed = op.workspace(args, ctx_);
    scratch_ = needed < 0 || scratch_ < 0 ? -1 : std::max(scratch_, needed);
    return nullptr;
  }

  Status layer(const EncoderLayer& w, bool first_only, void* y) {
    const int64_t h = hidden();
    const int64_t out_rows = first_only ? args_.batch : rows();
    const void* residual = state_;
    if (first_only && !dry_) gather_first();
    if (first_only) residual = first_;
    if (Status error = project(w, first_only)) return error;
    if (Status error = attend(first_only)) return error;
    if (Status error = linear(out_rows, h, context_, h, w.attention_output_weight,
                              w.attention_output_bias, residual, sum_, h)) {
      return error;
    }
    if (Status error = norm(out_rows, w.attention_norm_weight, w.attention_norm_bias, context_)) {
      return error;
    }
    if (Status error = feed_forward(out_rows, w)) return error;
    return norm(out_rows, w.output_norm_weight, w.output_norm_bias, y);
  }

  // Query, key and value of all tokens; or the first tokens' query, and key and value of all.
  Status project(const EncoderLayer& w, bool first_only) {
    const int64_t h = hidden();
    if (w.query_key_value_weight != nullptr) {
      return linear(rows(), h, state_, 3 * h, w.query_key_value_weight, w.query_key_value_bias,
                    nullptr, projected_, 3 * h);
    }
    const char* bias = static_cast<const char*>(w.query_key_value_bias);
    const void* key_value_bias = bias == nullptr ? nullptr : bias + h * element_;
    void* query = first_only ? first_query_ : projected_;
    if (Status error = linear(first_only ? args_.batch : rows(), h, first_only ? first_ : state_, h,
                              w.query_weight, bias, nullptr, query, first_only ? h : 3 * h)) {
      return error;
    }
    return linear(rows(), h, state_, 2 * h, w.key_value_weight, key_value_bias, nullptr,
                  at(projected_, 1, h), 3 * h);
  }

  Status attend(bool first_only) {
    const int64_t h = hidden();
    AttentionForward a{};
    a.dtype = embedding_.dtype;
    a.batch = args_.batch;
    a.rows = rows();
    a.num_heads = args_.num_heads;
    a.head_size = h / args_.num_heads;
    a.max_seqlen = args_.max_seqlen;
    a.cu_seqlens = args_.cu_seqlens;
    a.scale = args_.scale;
    a.first_only = first_only;
    a.query = first_only ? first_query_ : projected_;
    a.query_stride = first_only ? h : 3 * h;
    a.key = at(projected_, 1, h);
    a.value = at(projected_, 2, h);
    a.key_stride = a.value_stride = 3 * h;
    a.out = context_;
    a.out_stride = h;
    return step(table_.attention_forward, a);
  }

  Status linear(int64_t rows, int64_t x_stride, const void* x, int64_t out, const void* weight,
                const void* bias, const void* addend, void* y, int64_t y_stride) {
    if (args_.weights == WeightFormat::int8) {
      LinearInt8Forward a{};
      a.activation = Activation::none;
      a.rows = rows;
      a.in_features = hidden();
      a.out_features = out;
      a.x = static_cast<const float*>(x);
      a.x_stride = x_stride;
      a.weight = weight;
      a.bias = static_cast<const float*>(bias);
      a.addend = static_cast<const float*>(addend);
      a.addend_stride = hidden();
      a.y = static_cast<float*>(y);
      a.y_stride = y_stride;
      return step(table_.int8.linear_forward, a);
    }
    LinearForward a{};
    a.dtype = embedding_.dtype;
    a.activation = Activation::none;
    a.rows = rows;
    a.in_features = hidden();
    a.out_features = out;
    a.parts = 1;
    a.x = x;
    a.x_stride = x_stride;
    a.packed = true;
    a.weight[0] = weight;
    a.bias[0] = bias;
    a.addend = addend;
    a.addend_stride = hidden();
    a.y[0] = y;
    a.y_stride = y_stride;
    return step(bf16() ? table_.bf16.linear_forward : table_.linear_forward, a);
  }

  // sum = FFN(context) + context
  Status feed_forward(int64_t rows, const EncoderLayer& w) {
    if (args_.weights == WeightFormat::int8) {
      FeedForwardInt8Forward a{};
      a.activation = args_.activation;
      a.rows = rows;
      a.hidden = hidden();
      a.inner = args_.inner;
      a.x = a.addend = static_cast<const float*>(context_);
      a.x_stride = a.addend_stride = hidden();
      a.up_weight = w.up_weight;
      a.up_bias = static_cast<const float*>(w.up_bias);
      a.down_weight = w.down_weight;
      a.down_bias = static_cast<const float*>(w.down_bias);
      a.y = static_cast<float*>(sum_);
      return step(table_.int8.feed_forward_forward, a);
    }
    FeedForwardForward a{};
    a.dtype = embedding_.dtype;
    a.activation = args_.activation;
    a.rows = rows;
    a.hidden = hidden();
    a.inner = args_.inner;
    a.x = a.addend = context_;
    a.x_stride = a.addend_stride = hidden();
    a.packed = true;
    a.up_weight = w.up_weight;
    a.up_bias = w.up_bias;
    a.down_weight = w.down_weight;
    a.down_bias = w.down_bias;
    a.y = sum_;
    return step(bf16() ? table_.bf16.feed_forward_forward : table_.feed_forward_forward, a);
  }

  // y = LayerNorm(sum)
  Status norm(int64_t rows, const void* weight, const void* bias, void* y) {
    LayerNormForward a{};
    a.dtype = embedding_.dtype;
    a.rows = rows;
    a.hidden = hidden();
    a.eps = embedding_.eps;
    a.x = sum_;
    a.x_stride = hidden();
    a.weight = weight;
    a.bias = bias;
    a.y = y;
    return step(table_.layer_norm_forward, a);
  }

  bool empty(int64_t sequence) const {
    return args_.cu_seqlens[sequence] == args_.cu_seqlens[sequence + 1];
  }

  void gather_first() {
    for (int64_t b = 0; b < args_.batch; ++b) {
      char* row = at(first_, b, hidden());
      if (empty(b)) {
        std::memset(row, 0, bytes(1));
      } else {
        std::memcpy(row, at(state_, args_.cu_seqlens[b], hidden()), bytes(1));
      }
    }
  }

  void clear_empty() {
    for (int64_t b = 0; b < args_.batch; ++b) {
      if (empty(b)) std::memset(at(args_.y, b, hidden()), 0, bytes(1));
    }
  }

  const KernelTable& table_;
  const EncoderForward& args_;
  ExecContext ctx_;
  EmbeddingForward embedding_;
  int64_t element_ = 0, scratch_ = 0;
  bool dry_ = false;
  void* state_;        // [N, hidden], a layer's input
  void* context_;      // [N or batch, hidden], the attention's output, then the FFN's input
  void* sum_;          // [N or batch, hidden], what a LayerNorm reads
  void* projected_;    // [N, 3, hidden]
  void* first_;        // [batch, hidden], the rows of `state` that go on
  void* first_query_;  // [batch, hidden]
};

}  // namespace

int64_t encoder_forward_workspace(const KernelTable& table, const EncoderForward& args,
                                  const ExecContext& ctx) {
  Layout layout(nullptr);
  Encoder(layout, table, args, ctx);
  return layout.total();
}

Status encoder_forward(const KernelTable& table, const EncoderForward& args,
                       const ExecContext& ctx) {
  Layout layout(ctx.workspace);
  return Encoder(layout, table, args, ctx).run();
}

}  // namespace xlmr
