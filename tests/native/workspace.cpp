// Workspace queries on sizes that no memory holds: they grow with the sizes and answer -1 from
// where int64 overflows; they never wrap round to a small number.
#include "core/encoder.h"
#include "harness.h"

namespace test {
namespace {

// Queries must not follow pointers; these are not null, so that every output counts as asked for.
template <class T>
T* somewhere() {
  return reinterpret_cast<T*>(uintptr_t(4096));
}

// The sizes around every power of two, ascending.
std::vector<int64_t> growing_sizes() {
  std::vector<int64_t> out{1, 2, 3};
  for (int exponent = 2; exponent < 63; ++exponent) {
    const int64_t power = int64_t(1) << exponent;
    for (const int64_t size : {power, power + 1, power + (power - 1)}) out.push_back(size);
  }
  return out;
}

// query(size) answers the bytes that are needed where `which` is so large.
template <class Query>
void check_growth(const Query& query, const char* name, const char* which, bool several) {
  int64_t previous = 0;
  bool overflowed = false;
  for (const int64_t size : growing_sizes()) {
    const int64_t bytes = query(size);
    // Half: work may be cut differently, but a wrapped product is far away.
    const bool right = bytes == -1 || (!overflowed && bytes >= previous / 2);
    if (!CHECK(right, "%s: %s = %lld needs %lld bytes; the size before answered %lld", name, which,
               static_cast<long long>(size), static_cast<long long>(bytes),
               static_cast<long long>(overflowed ? -1 : previous))) {
      return;
    }
    overflowed = bytes == -1;
    previous = bytes;
  }
  // Products of several such sizes cannot fit, where the op needs memory that grows at all.
  if (several) {
    CHECK(overflowed || previous < (1 << 30), "%s: %s of 2^63 - 1 fit into %lld bytes", name, which,
          static_cast<long long>(previous));
  }
}

xlmr::ExecContext context_of_three() {
  xlmr::ExecContext context;
  context.num_threads = 3;
  return context;
}

template <class Args>
void check_op(const xlmr::Op<Args>& op, const Args& args, const char* name,
              const std::vector<int64_t Args::*>& sizes) {
  if (!selected(name)) return;
  tally().context = std::string("workspace query of ") + name;
  tally().shown = 0;
  const auto check = [&](const std::vector<int64_t Args::*>& grown, const char* which) {
    Args large = args;
    const auto query = [&](int64_t size) {
      for (int64_t Args::* member : grown) large.*member = size;
      return op.workspace(large, context_of_three());
    };
    check_growth(query, name, which, grown.size() > 1);
  };
  for (size_t i = 0; i < sizes.size(); ++i) check({sizes[i]}, text("size %zu", i).c_str());
  check(sizes, "all sizes");
}

// The products of linear and feed-forward: a table's own, or those of its bfloat16.
struct ProductOps {
  const xlmr::Op<xlmr::LinearForward>& linear_forward;
  const xlmr::Op<xlmr::LinearBackward>& linear_backward;
  const xlmr::Op<xlmr::FeedForwardForward>& feed_forward_forward;
  const xlmr::Op<xlmr::FeedForwardBackward>& feed_forward_backward;
  const char* names[4];
};

void check_products(const ProductOps& ops, xlmr::DType dtype, bool packed) {
  void* data = somewhere<void>();
  for (int64_t parts = 1; parts <= 3; ++parts) {
    xlmr::LinearForward forward{};
    forward.dtype = dtype;
    forward.rows = forward.in_features = forward.out_features = 17;
    forward.parts = parts;
    forward.packed = packed;
    forward.x = data;
    xlmr::LinearBackward backward{};
    backward.dtype = dtype;
    backward.rows = backward.in_features = backward.out_features = 17;
    backward.parts = parts;
    backward.x = backward.dx = data;
    for (int64_t part = 0; part < parts; ++part) {
      forward.weight[part] = forward.bias[part] = forward.y[part] = data;
      backward.weight[part] = backward.dy[part] = data;
      backward.dweight[part] = backward.dbias[part] = data;
    }
    check_op(ops.linear_forward, forward, ops.names[0],
             {&xlmr::LinearForward::rows, &xlmr::LinearForward::in_features,
              &xlmr::LinearForward::out_features});
    check_op(ops.linear_backward, backward, ops.names[1],
             {&xlmr::LinearBackward::rows, &xlmr::LinearBackward::in_features,
              &xlmr::LinearBackward::out_features});
  }
  {
    using Args = xlmr::FeedForwardForward;
    Args args{};
    args.dtype = dtype;
    args.activation = xlmr::Activation::gelu;
    args.rows = args.hidden = args.inner = 17;
    args.packed = packed;
    args.x = args.up_weight = args.down_weight = args.y = data;
    for (void* pre : {static_cast<void*>(nullptr), data}) {
      args.pre = pre;
      check_op(ops.feed_forward_forward, args, ops.names[2],
               {&Args::rows, &Args::hidden, &Args::inner});
    }
  }
  {
    using Args = xlmr::FeedForwardBackward;
    Args args{};
    args.dtype = dtype;
    args.activation = xlmr::Activation::gelu;
    args.rows = args.hidden = args.inner = 17;
    args.dy = args.x = args.up_weight = args.down_weight = args.pre = data;
    args.dx = args.dup_weight = args.dup_bias = args.ddown_weight = args.ddown_bias = data;
    for (void* dpre : {static_cast<void*>(nullptr), data}) {
      args.dpre = dpre;
      check_op(ops.feed_forward_backward, args, ops.names[3],
               {&Args::rows, &Args::hidden, &Args::inner});
    }
  }
}

void check_encoder(TableRef table, xlmr::DType dtype, bool first_only, xlmr::WeightFormat weights) {
  const bool bf16 = weights == xlmr::WeightFormat::bfloat16;
  if (!selected(bf16 ? "encoder_bf16" : "encoder")) return;
  tally().context = "workspace query of encoder_forward";
  tally().shown = 0;
  const xlmr::EncoderLayer layer{};
  xlmr::EncoderForward args{};
  args.embedding.dtype = dtype;
  args.embedding.rows = args.embedding.hidden = 17;
  args.inner = args.num_heads = args.batch = args.max_seqlen = 17;
  args.num_layers = 1;
  args.layers = &layer;
  args.first_only = first_only;
  args.weights = weights;
  const auto check = [&](const std::vector<int>& grown, const char* which) {
    xlmr::EncoderForward large = args;
    int64_t* sizes[] = {&large.embedding.rows, &large.embedding.hidden, &large.inner, &large.batch,
                        &large.max_seqlen};
    const auto query = [&](int64_t size) {
      for (int index : grown) *sizes[index] = size;
      return xlmr::encoder_forward_workspace(table, large, context_of_three());
    };
    check_growth(query, "encoder_forward", which, grown.size() > 1);
  };
  for (int i = 0; i < 5; ++i) check({i}, text("size %d", i).c_str());
  check({0, 1, 2, 3, 4}, "all sizes");
  args.embedding.rows = 0;
  check({1}, "hidden without rows");
}

}  // namespace

void test_workspace(TableRef table) {
  void* data = somewhere<void>();
  for_types(table, [&](auto element) {
    constexpr xlmr::DType dtype = dtype_of<decltype(element)>();
    for (const bool packed : {false, true}) {
      check_products(
          {table.linear_forward,
           table.linear_backward,
           table.feed_forward_forward,
           table.feed_forward_backward,
           {"linear_forward", "linear_backward", "feed_forward_forward", "feed_forward_backward"}},
          dtype, packed);
    }
    {
      xlmr::PackWeight args{dtype, 17, 17, data, data};
      check_op(table.pack_weight, args, "pack_weight",
               {&xlmr::PackWeight::out_features, &xlmr::PackWeight::in_features});
    }
    for (const bool first_only : {false, true}) {
      check_encoder(table, dtype, first_only, xlmr::WeightFormat::table);
      if (dtype == xlmr::DType::float32) {
        check_encoder(table, dtype, first_only, xlmr::WeightFormat::int8);
      }
    }
    {
      xlmr::LinearInt8Forward linear{};
      linear.rows = linear.in_features = linear.out_features = 17;
      check_op(table.int8.linear_forward, linear, "linear_int8_forward",
               {&xlmr::LinearInt8Forward::rows, &xlmr::LinearInt8Forward::in_features,
                &xlmr::LinearInt8Forward::out_features});
      using Args = xlmr::FeedForwardInt8Forward;
      Args args{};
      args.activation = xlmr::Activation::gelu;
      args.rows = args.hidden = args.inner = 17;
      check_op(table.int8.feed_forward_forward, args, "feed_forward_int8_forward",
               {&Args::rows, &Args::hidden, &Args::inner});
    }
    {
      using Args = xlmr::AttentionForward;
      Args args{};
      args.dtype = dtype;
      args.batch = args.rows = args.num_heads = args.max_seqlen = 17;
      args.head_size = 64;
      args.cu_seqlens = somewhere<int32_t>();
      args.query = args.key = args.value = args.out = args.lse = data;
      check_op(table.attention_forward, args, "attention_forward",
               {&Args::batch, &Args::rows, &Args::num_heads, &Args::max_seqlen});
    }
    {
      using Args = xlmr::AttentionBackward;
      Args args{};
      args.dtype = dtype;
      args.batch = args.rows = args.num_heads = args.max_seqlen = 17;
      args.head_size = 64;
      args.cu_seqlens = somewhere<int32_t>();
      args.dout = args.query = args.key = args.value = args.out = args.lse = data;
      args.dquery = args.dkey = args.dvalue = data;
      check_op(table.attention_backward, args, "attention_backward",
               {&Args::batch, &Args::rows, &Args::num_heads, &Args::max_seqlen});
    }
    const int64_t seed = 1;
    const xlmr::Dropout dropout{0.1, 0, &seed};
    {
      using Args = xlmr::LayerNormForward;
      Args args{};
      args.dtype = dtype;
      args.rows = args.hidden = 17;
      args.dropout = dropout;
      args.x = args.weight = args.bias = args.y = data;
      check_op(table.layer_norm_forward, args, "layer_norm_forward", {&Args::rows, &Args::hidden});
    }
    {
      using Args = xlmr::LayerNormBackward;
      Args args{};
      args.dtype = dtype;
      args.rows = args.hidden = 17;
      args.dropout = dropout;
      args.dy = args.sum = args.mean = args.rstd = args.weight = data;
      args.dsum = args.dx = args.dweight = args.dbias = data;
      check_op(table.layer_norm_backward, args, "layer_norm_backward",
               {&Args::rows, &Args::hidden});
    }
    {
      using Args = xlmr::EmbeddingForward;
      Args args{};
      args.dtype = dtype;
      args.rows = args.hidden = 17;
      args.dropout = dropout;
      args.input_ids = args.position_ids = somewhere<int64_t>();
      args.word = args.position = args.token_type = args.weight = args.bias = args.y = data;
      check_op(table.embedding_forward, args, "embedding_forward", {&Args::rows, &Args::hidden});
    }
    {
      using Args = xlmr::EmbeddingBackward;
      Args args{};
      args.dtype = dtype;
      args.rows = args.hidden = 17;
      args.dropout = dropout;
      args.input_ids = args.position_ids = somewhere<int64_t>();
      args.dy = args.word = args.position = args.token_type = args.weight = data;
      args.mean = args.rstd = args.dsum = args.dword = args.dposition = args.dtoken_type = data;
      args.dweight = args.dbias = data;
      check_op(table.embedding_backward, args, "embedding_backward", {&Args::rows, &Args::hidden});
    }
  });
}

void test_workspace_bf16(TableRef table) {
  for (const bool packed : {false, true}) {
    check_products({table.bf16.linear_forward,
                    table.bf16.linear_backward,
                    table.bf16.feed_forward_forward,
                    table.bf16.feed_forward_backward,
                    {"linear_bf16_forward", "linear_bf16_backward", "feed_forward_bf16_forward",
                     "feed_forward_bf16_backward"}},
                   xlmr::DType::float32, packed);
  }
  for (const bool first_only : {false, true}) {
    check_encoder(table, xlmr::DType::float32, first_only, xlmr::WeightFormat::bfloat16);
  }
}

}  // namespace test
