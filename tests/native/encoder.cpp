// encoder_forward against the same ops called one by one over plain weights: the same bits.
#include "core/encoder.h"

#include <algorithm>
#include <numeric>

#include "bfloat16.h"
#include "packed.h"

namespace test {
namespace {

using xlmr::Activation;
using xlmr::WeightFormat;

template <class T>
struct Layer {
  std::vector<T> query, key, value, output, up, down;                    // weights
  std::vector<T> query_key_value_bias, output_bias, up_bias, down_bias;  // or empty
  std::vector<T> attention_norm[2], output_norm[2];                      // weight and bias
  bool query_apart = false;
};

template <class T>
struct Problem {
  std::vector<int32_t> lengths;
  int64_t hidden, heads, inner;
  Activation activation = Activation::gelu;
  double eps = 1e-5;
  bool first_only = false, keep_states = false;
  WeightFormat weights = WeightFormat::table;  // of the layers; T is float for the other two
  std::vector<Layer<T>> layers;
  std::vector<int64_t> ids, positions, types;  // ids or types may be empty
  std::vector<T> embeds;                       // instead of ids
  int64_t gap = 0;                             // of the embeds' stride
  std::vector<T> word, position, token_type, norm[2];

  int64_t rows() const { return std::accumulate(lengths.begin(), lengths.end(), int64_t(0)); }
  int64_t batch() const { return int64_t(lengths.size()); }
  int64_t longest() const {
    return lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end());
  }
  double scale() const { return 1 / std::sqrt(double(hidden / heads)); }
  std::vector<int32_t> offsets() const {
    std::vector<int32_t> out{0};
    for (int32_t length : lengths) out.push_back(out.back() + length);
    return out;
  }
  std::string sizes() const {
    std::string list, apart;
    for (int32_t length : lengths) list += text(" %d", int(length));
    for (const auto& layer : layers) apart += layer.query_apart ? "1" : "0";
    return text(
        "lengths=[%s ] hidden=%lld heads=%lld inner=%lld layers=%s activation=%d biases=%d ids=%d "
        "types=%d gap=%lld first_only=%d states=%d weights=%d",
        list.c_str(), (long long)hidden, (long long)heads, (long long)inner, apart.c_str(),
        int(activation), int(!layers[0].up_bias.empty()), int(embeds.empty()), int(!types.empty()),
        (long long)gap, int(first_only), int(keep_states), int(weights));
  }
};

template <class T>
Problem<T> make(Random& random, std::vector<int32_t> lengths, int64_t hidden, int64_t heads,
                int64_t inner, int64_t layers) {
  Problem<T> p;
  p.lengths = std::move(lengths);
  p.hidden = hidden;
  p.heads = heads;
  p.inner = inner;
  p.activation = random.pick(
      std::vector<Activation>{Activation::gelu, Activation::gelu_tanh, Activation::relu});
  const int64_t rows = p.rows();
  const bool biases = random.chance(0.8);
  const auto weight = [&](int64_t out, int64_t in) {
    return random.values<T>(out * in, 1 / std::sqrt(double(in)));
  };
  for (int64_t i = 0; i < layers; ++i) {
    Layer<T> layer;
    for (auto* w : {&layer.query, &layer.key, &layer.value, &layer.output}) {
      *w = weight(hidden, hidden);
    }
    layer.up = weight(inner, hidden);
    layer.down = weight(hidden, inner);
    if (biases) {
      layer.query_key_value_bias = random.values<T>(3 * hidden);
      layer.output_bias = random.values<T>(hidden);
      layer.up_bias = random.values<T>(inner);
      layer.down_bias = random.values<T>(hidden);
    }
    for (int k = 0; k < 2; ++k) {
      layer.attention_norm[k] = random.values<T>(hidden);
      layer.output_norm[k] = random.values<T>(hidden);
    }
    layer.query_apart = random.chance(0.4);
    p.layers.push_back(layer);
  }
  constexpr int64_t kWords = 11, kPositions = 7, kTypes = 2;
  const auto indices = [&](int64_t bound) {
    std::vector<int64_t> out;
    for (int64_t i = 0; i < rows; ++i) out.push_back(random.between(0, bound - 1));
    return out;
  };
  if (random.chance(0.7)) {
    p.ids = indices(kWords);
    p.word = random.values<T>(kWords * hidden);
  } else {
    p.embeds = random.values<T>(rows * hidden);
    p.gap = random.between(0, 5);
  }
  p.positions = indices(kPositions);
  if (random.chance(0.5)) p.types = indices(kTypes);
  p.position = random.values<T>(kPositions * hidden);
  p.token_type = random.values<T>(kTypes * hidden);
  for (auto& values : p.norm) values = random.values<T>(hidden);
  return p;
}

template <class T>
using Outputs = std::vector<std::vector<T>>;

template <class T>
std::vector<T> joined(const std::vector<const std::vector<T>*>& parts) {
  std::vector<T> out;
  for (const auto* part : parts) out.insert(out.end(), part->begin(), part->end());
  return out;
}

// Outputs: y, states (empty where they are not asked for).
template <class T>
Outputs<T> encode(TableRef table, const Problem<T>& p, int32_t threads) {
  const int64_t h = p.hidden, rows = p.rows();
  std::deque<Packed<T>> packed;
  std::deque<PackedInt8> packed_int8;
  std::deque<PackedBf16> packed_bf16;
  std::deque<Guarded<T>> plain;
  std::deque<Guarded<int64_t>> indices;
  const auto pack = [&](const std::vector<T>& weight, int64_t out, int64_t in) -> const void* {
    if constexpr (sizeof(T) == 4) {
      if (p.weights == WeightFormat::int8) {
        return packed_int8.emplace_back(quantized(weight, out, in)).data();
      }
      if (p.weights == WeightFormat::bfloat16) {
        return packed_bf16.emplace_back(weight, out, in).data();
      }
    }
    return packed.emplace_back(table, weight, out, in, threads).data();
  };
  const auto guard = [&](const std::vector<T>& values, int64_t count) -> const T* {
    if (values.empty()) return nullptr;
    plain.emplace_back(values, int64_t(values.size()) / count, count);
    return plain.back().data();
  };
  const auto guard_index = [&](const std::vector<int64_t>& values) -> const int64_t* {
    if (values.empty()) return nullptr;
    indices.emplace_back(values, 1, rows);
    return indices.back().data();
  };
  std::vector<xlmr::EncoderLayer> layers;
  for (const Layer<T>& layer : p.layers) {
    xlmr::EncoderLayer w{};
    if (layer.query_apart) {
      w.query_weight = pack(layer.query, h, h);
      w.key_value_weight = pack(joined<T>({&layer.key, &layer.value}), 2 * h, h);
    } else {
      w.query_key_value_weight =
          pack(joined<T>({&layer.query, &layer.key, &layer.value}), 3 * h, h);
    }
    w.query_key_value_bias = guard(layer.query_key_value_bias, 3 * h);
    w.attention_output_weight = pack(layer.output, h, h);
    w.attention_output_bias = guard(layer.output_bias, h);
    w.attention_norm_weight = guard(layer.attention_norm[0], h);
    w.attention_norm_bias = guard(layer.attention_norm[1], h);
    w.up_weight = pack(layer.up, p.inner, h);
    w.up_bias = guard(layer.up_bias, p.inner);
    w.down_weight = pack(layer.down, h, p.inner);
    w.down_bias = guard(layer.down_bias, h);
    w.output_norm_weight = guard(layer.output_norm[0], h);
    w.output_norm_bias = guard(layer.output_norm[1], h);
    layers.push_back(w);
  }
  const Guarded<int32_t> offsets(p.offsets(), 1, p.batch() + 1);
  const Guarded<T> embeds(p.embeds, p.embeds.empty() ? 0 : rows, h, h + p.gap);
  const Guarded<T> y(p.first_only ? p.batch() : rows, h);
  const Guarded<T> states(p.keep_states ? int64_t(layers.size()) * rows : 0, h);
  xlmr::EncoderForward args{};
  args.embedding.dtype = dtype_of<T>();
  args.embedding.rows = rows;
  args.embedding.hidden = h;
  args.embedding.eps = p.eps;
  args.embedding.input_ids = guard_index(p.ids);
  args.embedding.inputs_embeds = embeds.data();
  args.embedding.inputs_embeds_stride = embeds.stride();
  args.embedding.position_ids = guard_index(p.positions);
  args.embedding.token_type_ids = guard_index(p.types);
  args.embedding.word_rows = int64_t(p.word.size()) / h;
  args.embedding.position_rows = int64_t(p.position.size()) / h;
  args.embedding.token_type_rows = int64_t(p.token_type.size()) / h;
  args.embedding.word = guard(p.word, h);
  args.embedding.position = guard(p.position, h);
  args.embedding.token_type = guard(p.token_type, h);
  args.embedding.weight = guard(p.norm[0], h);
  args.embedding.bias = guard(p.norm[1], h);
  args.activation = p.activation;
  args.inner = p.inner;
  args.num_heads = p.heads;
  args.num_layers = int64_t(layers.size());
  args.batch = p.batch();
  args.max_seqlen = p.longest();
  args.scale = p.scale();
  args.cu_seqlens = offsets.data();
  args.layers = layers.data();
  args.weights = p.weights;
  args.first_only = p.first_only;
  args.y = y.data();
  args.states = states.data();
  run_on_workspace(
      [&](const xlmr::ExecContext& ctx) {
        return xlmr::encoder_forward_workspace(table, args, ctx);
      },
      [&](const xlmr::ExecContext& ctx) { return xlmr::encoder_forward(table, args, ctx); },
      threads);
  bool intact = offsets.intact() && embeds.intact();
  for (const auto& buffer : packed) intact = intact && buffer.intact();
  for (const auto& buffer : packed_int8) intact = intact && buffer.intact();
  for (const auto& buffer : packed_bf16) intact = intact && buffer.intact();
  for (const auto& buffer : plain) intact = intact && buffer.intact();
  for (const auto& buffer : indices) intact = intact && buffer.intact();
  CHECK(intact, "an input was changed");
  CHECK(y.intact(), "y was written outside of its elements");
  CHECK(states.intact(), "states were written outside of their elements");
  return {y.values(), states.values()};
}

// The ops one by one, over plain weights; every row goes through every layer.
template <class T>
struct Ops {
  TableRef table;
  const Problem<T>& p;
  int64_t rows = p.rows(), h = p.hidden;
  bool bf16 = p.weights == WeightFormat::bfloat16;

  std::vector<T> embed() const {
    std::vector<T> y(size_t(rows * h));
    xlmr::EmbeddingForward a{};
    a.dtype = dtype_of<T>();
    a.rows = rows;
    a.hidden = h;
    a.eps = p.eps;
    a.input_ids = p.ids.empty() ? nullptr : p.ids.data();
    a.inputs_embeds = p.embeds.empty() ? nullptr : p.embeds.data();
    a.inputs_embeds_stride = h;
    a.position_ids = p.positions.data();
    a.token_type_ids = p.types.empty() ? nullptr : p.types.data();
    a.word_rows = int64_t(p.word.size()) / h;
    a.position_rows = int64_t(p.position.size()) / h;
    a.token_type_rows = int64_t(p.token_type.size()) / h;
    a.word = p.word.empty() ? nullptr : p.word.data();
    a.position = p.position.data();
    a.token_type = p.token_type.data();
    a.weight = p.norm[0].data();
    a.bias = p.norm[1].data();
    a.y = y.data();
    run_op(table.embedding_forward, a, 1);
    return y;
  }

  std::vector<T> linear(const std::vector<T>& x, const std::vector<T>& weight, const T* bias,
                        const T* addend) const {
    std::vector<T> y(size_t(rows * h));
    if constexpr (sizeof(T) == 4) {
      if (p.weights == WeightFormat::int8) {
        const PackedInt8 packed(quantized(weight, h, h));
        xlmr::LinearInt8Forward a{};
        a.rows = rows;
        a.in_features = a.out_features = a.x_stride = a.y_stride = a.addend_stride = h;
        a.x = x.data();
        a.weight = packed.data();
        a.bias = bias;
        a.addend = addend;
        a.y = y.data();
        run_op(table.int8.linear_forward, a, 1);
        return y;
      }
    }
    xlmr::LinearForward a{};
    a.dtype = dtype_of<T>();
    a.rows = rows;
    a.in_features = a.out_features = a.x_stride = a.y_stride = a.addend_stride = h;
    a.parts = 1;
    a.x = x.data();
    a.weight[0] = weight.data();
    a.bias[0] = bias;
    a.addend = addend;
    a.y[0] = y.data();
    run_op(bf16 ? table.bf16.linear_forward : table.linear_forward, a, 1);
    return y;
  }

  std::vector<T> attention(const std::vector<T>& query, const std::vector<T>& key,
                           const std::vector<T>& value) const {
    std::vector<T> out(size_t(rows * h));
    const std::vector<int32_t> offsets = p.offsets();
    xlmr::AttentionForward a{};
    a.dtype = dtype_of<T>();
    a.batch = p.batch();
    a.rows = rows;
    a.num_heads = p.heads;
    a.head_size = h / p.heads;
    a.max_seqlen = p.longest();
    a.cu_seqlens = offsets.data();
    a.scale = p.scale();
    a.query = query.data();
    a.key = key.data();
    a.value = value.data();
    a.out = out.data();
    a.query_stride = a.key_stride = a.value_stride = a.out_stride = h;
    run_op(table.attention_forward, a, 1);
    return out;
  }

  std::vector<T> feed_forward(const std::vector<T>& x, const Layer<T>& layer) const {
    std::vector<T> y(size_t(rows * h));
    const T* up_bias = layer.up_bias.empty() ? nullptr : layer.up_bias.data();
    const T* down_bias = layer.down_bias.empty() ? nullptr : layer.down_bias.data();
    if constexpr (sizeof(T) == 4) {
      if (p.weights == WeightFormat::int8) {
        const PackedInt8 up(quantized(layer.up, p.inner, h)),
            down(quantized(layer.down, h, p.inner));
        xlmr::FeedForwardInt8Forward a{};
        a.activation = p.activation;
        a.rows = rows;
        a.hidden = h;
        a.inner = p.inner;
        a.x = a.addend = x.data();
        a.x_stride = a.addend_stride = h;
        a.up_weight = up.data();
        a.up_bias = up_bias;
        a.down_weight = down.data();
        a.down_bias = down_bias;
        a.y = y.data();
        run_op(table.int8.feed_forward_forward, a, 1);
        return y;
      }
    }
    xlmr::FeedForwardForward a{};
    a.dtype = dtype_of<T>();
    a.activation = p.activation;
    a.rows = rows;
    a.hidden = h;
    a.inner = p.inner;
    a.x = a.addend = x.data();
    a.x_stride = a.addend_stride = h;
    a.up_weight = layer.up.data();
    a.up_bias = up_bias;
    a.down_weight = layer.down.data();
    a.down_bias = down_bias;
    a.y = y.data();
    run_op(bf16 ? table.bf16.feed_forward_forward : table.feed_forward_forward, a, 1);
    return y;
  }

  std::vector<T> norm(const std::vector<T>& x, const std::vector<T> (&params)[2]) const {
    std::vector<T> y(size_t(rows * h));
    xlmr::LayerNormForward a{};
    a.dtype = dtype_of<T>();
    a.rows = rows;
    a.hidden = h;
    a.eps = p.eps;
    a.x = x.data();
    a.x_stride = h;
    a.weight = params[0].data();
    a.bias = params[1].data();
    a.y = y.data();
    run_op(table.layer_norm_forward, a, 1);
    return y;
  }

  // Outputs: every layer's input, one behind the other, and the last hidden states.
  Outputs<T> run() const {
    std::vector<T> states, state = embed();
    for (const Layer<T>& layer : p.layers) {
      states.insert(states.end(), state.begin(), state.end());
      const T* bias = layer.query_key_value_bias.data();
      const auto part = [&](int64_t i) { return bias == nullptr ? nullptr : bias + i * h; };
      const std::vector<T> context = attention(linear(state, layer.query, part(0), nullptr),
                                               linear(state, layer.key, part(1), nullptr),
                                               linear(state, layer.value, part(2), nullptr));
      const T* output_bias = layer.output_bias.empty() ? nullptr : layer.output_bias.data();
      const std::vector<T> attended =
          norm(linear(context, layer.output, output_bias, state.data()), layer.attention_norm);
      state = norm(feed_forward(attended, layer), layer.output_norm);
    }
    return {states, state};
  }
};

template <class T>
void check(Line& line, TableRef table, Problem<T> p) {
  const Outputs<T> want = Ops<T>{table, p}.run();
  const std::vector<int32_t> offsets = p.offsets();
  std::vector<T> first(size_t(p.batch() * p.hidden), T(0));
  for (int64_t b = 0; b < p.batch(); ++b) {
    if (p.lengths[size_t(b)] == 0) continue;
    std::copy_n(want[1].begin() + offsets[size_t(b)] * p.hidden, p.hidden,
                first.begin() + b * p.hidden);
  }
  for (const bool first_only : {false, true}) {
    p.first_only = first_only;
    if (first_only) p.layers.back().query_apart = true;
    for (const bool keep_states : {false, true}) {
      p.keep_states = keep_states;
      line.begin(p.sizes());
      const Outputs<T> got =
          run_on_threads(line, [&](int32_t threads) { return encode(table, p, threads); });
      line.same_bits("y", got[0], first_only ? first : want[1]);
      if (keep_states) line.same_bits("states", got[1], want[0]);
    }
  }
}

struct Sizes {
  std::vector<int32_t> lengths;
  int64_t hidden, heads, inner, layers;
};

Sizes random_sizes(Random& random) {
  std::vector<int32_t> lengths;
  for (int64_t k = random.between(0, 9); k > 0; --k) {
    lengths.push_back(random.chance(0.3) ? 0 : int32_t(random.between(0, 40)));
  }
  const int64_t heads = random.between(1, 4);
  const int64_t hidden = heads * random.between(1, 30), inner = random.between(1, 100);
  return {lengths, hidden, heads, inner, random.between(1, 3)};
}

template <class T>
void run(TableRef table, WeightFormat weights) {
  const char* name = weights == WeightFormat::int8       ? "encoder_int8"
                     : weights == WeightFormat::bfloat16 ? "encoder_bf16"
                                                         : "encoder";
  if (!selected(name)) return;
  Line line(table, dtype_name<T>(), name);
  std::vector<Sizes> cases = {
      {{}, 8, 2, 12, 2},
      {{0}, 8, 2, 12, 1},
      {{0, 0, 0}, 9, 3, 5, 2},
      {{1}, 1, 1, 1, 1},
      {{0, 0, 1, 0, 0, 0, 0}, 33, 3, 37, 2},  // more sequences than tokens
      {{5, 0, 3}, 30, 3, 37, 3},
      {{1, 13, 2, 27}, 64, 1, 129, 2},
  };
  if (!options().quick) {
    cases.push_back({{1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, 17, 1, 65, 2});
    cases.push_back({{130, 1, 0, 65}, 80, 2, 96, 2});
    // Products of more than one block of k; few, where they may be those of a twin.
    if (weights == WeightFormat::bfloat16) {
      cases.push_back({{20, 3}, 390, 5, 70, 1});
    } else {
      cases.push_back({{70, 3}, 390, 5, 401, 2});
    }
  }
  Random fuzz(options().seed);
  for (int64_t i = 0; i < options().fuzz; ++i) cases.push_back(random_sizes(fuzz));
  Random random(18);
  for (const Sizes& s : cases) {
    Problem<T> p = make<T>(random, s.lengths, s.hidden, s.heads, s.inner, s.layers);
    p.weights = weights;
    // A table without units for bfloat16 reads plain weights as they are: they are those numbers.
    if (weights == WeightFormat::bfloat16) {
      for (Layer<T>& layer : p.layers) {
        for (auto* w :
             {&layer.query, &layer.key, &layer.value, &layer.output, &layer.up, &layer.down}) {
          *w = rounded_to_bf16(*w);
        }
      }
    }
    check(line, table, p);
  }
}

}  // namespace

void test_encoder(TableRef table) {
  for_types(table, [&](auto element) { run<decltype(element)>(table, WeightFormat::table); });
  if (!emulates_cuda(table)) run<float>(table, WeightFormat::int8);
}

void test_encoder_bf16(TableRef table) { run<float>(table, WeightFormat::bfloat16); }

}  // namespace test
