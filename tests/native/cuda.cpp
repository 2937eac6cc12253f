// What only the CUDA kernels promise, seen through the emulator: ids that the host could not look
// at, sizes that no grid or block holds.
#include "harness.h"

namespace test {
namespace {

constexpr int64_t kRows = 6, kHidden = 9, kWords = 5, kPositions = 4, kTypes = 2;

template <class T>
struct Embedding {
  std::vector<int64_t> ids = {0, 4, 2, 2, 1, 3}, positions = {0, 1, 2, 3, 2, 1},
                       types = {0, 1, 0, 1, 0, 1};
  std::vector<T> word, position, type, weight, bias, dy;

  explicit Embedding(Random& random)
      : word(random.values<T>(kWords * kHidden)),
        position(random.values<T>(kPositions * kHidden)),
        type(random.values<T>(kTypes * kHidden)),
        weight(random.values<T>(kHidden, 0.5, 1.0)),
        bias(random.values<T>(kHidden)),
        dy(random.values<T>(kRows * kHidden)) {}
};

template <class T>
struct Results {
  std::vector<T> y, dword, dposition, dtype;
};

// Forward, then backward into tables of zeros.
template <class T>
Results<T> run_embedding(TableRef table, const Embedding<T>& p) {
  const Guarded<int64_t> ids(p.ids, 1, kRows), positions(p.positions, 1, kRows),
      types(p.types, 1, kRows);
  const Guarded<T> word(p.word, kWords, kHidden), position(p.position, kPositions, kHidden),
      type(p.type, kTypes, kHidden), weight(p.weight, 1, kHidden), bias(p.bias, 1, kHidden),
      dy(p.dy, kRows, kHidden);
  Guarded<Arithmetic<T>> mean(kRows, 1), rstd(kRows, 1);
  Guarded<T> y(kRows, kHidden), dsum(kRows, kHidden), dword(kWords, kHidden),
      dposition(kPositions, kHidden), dtype(kTypes, kHidden);
  const auto set = [&](auto& args) {
    args.dtype = dtype_of<T>();
    args.rows = kRows;
    args.hidden = kHidden;
    args.input_ids = ids.data();
    args.position_ids = positions.data();
    args.token_type_ids = types.data();
    args.word_rows = kWords;
    args.position_rows = kPositions;
    args.token_type_rows = kTypes;
    args.word = word.data();
    args.position = position.data();
    args.token_type = type.data();
    args.weight = weight.data();
    args.mean = mean.data();
    args.rstd = rstd.data();
  };
  xlmr::EmbeddingForward forward{};
  set(forward);
  forward.eps = 1e-5;
  forward.bias = bias.data();
  forward.y = y.data();
  run_op(table.embedding_forward, forward, 1);
  xlmr::EmbeddingBackward backward{};
  set(backward);
  backward.padding_idx = -1;
  backward.dy = dy.data();
  backward.dy_stride = dy.stride();
  backward.dsum = dsum.data();
  for (Guarded<T>* gradient : {&dword, &dposition, &dtype}) {
    std::memset(gradient->data(), 0, gradient->values().size() * sizeof(T));
  }
  backward.dword = dword.data();
  backward.dposition = dposition.data();
  backward.dtoken_type = dtype.data();
  run_op(table.embedding_backward, backward, 1);
  for (const Guarded<T>* buffer : {&y, &dsum, &dword, &dposition, &dtype}) {
    CHECK(buffer->intact(), "an output was written outside of its elements");
  }
  CHECK(mean.intact() && rstd.intact(), "a statistic was written outside of its elements");
  return {y.values(), dword.values(), dposition.values(), dtype.values()};
}

// A row whose id, position or type is in no table is NaN; the others do not notice, and no table
// gets a gradient for it.
template <class T>
void check_ids(Line& line, TableRef table) {
  Random random(33);
  const Embedding<T> good(random);
  const Results<T> want = run_embedding(table, good);
  constexpr int64_t kBad = 3;  // the row
  struct Case {
    const char* name;
    std::vector<int64_t> Embedding<T>::* ids;
    int64_t rows;
    std::vector<T> Results<T>::* gradient;
  };
  const Case cases[] = {{"id", &Embedding<T>::ids, kWords, &Results<T>::dword},
                        {"position", &Embedding<T>::positions, kPositions, &Results<T>::dposition},
                        {"type", &Embedding<T>::types, kTypes, &Results<T>::dtype}};
  for (const Case& c : cases) {
    for (const int64_t id : {int64_t(-1), c.rows, std::numeric_limits<int64_t>::min(),
                             std::numeric_limits<int64_t>::max()}) {
      line.begin(text("%s %lld", c.name, (long long)id));
      Embedding<T> bad = good;
      const int64_t before = (bad.*c.ids)[kBad];
      (bad.*c.ids)[kBad] = id;
      const Results<T> got = run_embedding(table, bad);
      bool all_nan = true;
      for (const T value : slice(got.y, kBad * kHidden, kHidden)) all_nan &= std::isnan(value);
      CHECK(all_nan, "the row is not NaN");
      line.same_bits("rows before", slice(got.y, 0, kBad * kHidden),
                     slice(want.y, 0, kBad * kHidden));
      line.same_bits("rows behind", slice(got.y, (kBad + 1) * kHidden, 2 * kHidden),
                     slice(want.y, (kBad + 1) * kHidden, 2 * kHidden));
      // The table in question gets the gradients of all rows but this one.
      const std::vector<T>&gradient = got.*c.gradient, &of_all = want.*c.gradient;
      for (size_t i = 0; i < gradient.size(); ++i) {
        if (int64_t(i) / kHidden == before) {
          CHECK(std::isfinite(gradient[i]), "a gradient is not finite");
        } else if (!CHECK(gradient[i] == of_all[i], "a gradient changed: %g and %g",
                          double(gradient[i]), double(of_all[i]))) {
          break;
        }
      }
    }
  }
}

void expect_sentence(xlmr::Status status, const char* part) {
  CHECK(status != nullptr && std::strstr(status, part) != nullptr, "answered: %s",
        status == nullptr ? "done" : status);
}

// Nothing is touched where a launch is refused: all pointers are null.
template <class T>
void check_limits(Line& line, TableRef table) {
  const xlmr::ExecContext context;
  constexpr int64_t kMany = int64_t(1) << 40;
  line.begin("more blocks than a grid has");
  xlmr::LinearForward linear{};
  linear.dtype = dtype_of<T>();
  linear.rows = kMany;
  linear.in_features = linear.out_features = linear.parts = 1;
  expect_sentence(table.linear_forward.run(linear, context), "more blocks than a grid has");
  xlmr::LayerNormForward norm{};
  norm.dtype = dtype_of<T>();
  norm.rows = kMany;
  norm.hidden = 1;
  expect_sentence(table.layer_norm_forward.run(norm, context), "layer_norm_forward");
  xlmr::AttentionForward attention{};
  attention.dtype = dtype_of<T>();
  attention.batch = attention.num_heads = attention.max_seqlen = kMany;
  attention.head_size = 64;
  expect_sentence(table.attention_forward.run(attention, context), "more blocks than a grid has");
  line.begin("head size 129");
  attention.head_size = 129;
  expect_sentence(table.attention_forward.run(attention, context), "head sizes up to 128");
  xlmr::AttentionBackward backward{};
  backward.dtype = dtype_of<T>();
  backward.head_size = 129;
  expect_sentence(table.attention_backward.run(backward, context), "head sizes up to 128");
}

template <class T>
void run(TableRef table) {
  Line line(table, dtype_name<T>(), "cuda");
  check_ids<T>(line, table);
  check_limits<T>(line, table);
}

// A table of the CPU answers a sentence where 16 bits are asked for, and touches nothing.
void check_refusals(TableRef table) {
  const xlmr::ExecContext context;
  const auto check = [&](const auto& op, auto args) {
    for (const xlmr::DType dtype : {xlmr::DType::bfloat16, xlmr::DType::float16}) {
      args.dtype = dtype;
      CHECK(op.workspace(args, context) >= 0, "the query of a dtype without kernels");
      expect_sentence(op.run(args, context), "float32 and float64 only");
    }
  };
  check(table.pack_weight, xlmr::PackWeight{});
  check(table.linear_forward, xlmr::LinearForward{});
  check(table.linear_backward, xlmr::LinearBackward{});
  check(table.feed_forward_forward, xlmr::FeedForwardForward{});
  check(table.feed_forward_backward, xlmr::FeedForwardBackward{});
  check(table.attention_forward, xlmr::AttentionForward{});
  check(table.attention_backward, xlmr::AttentionBackward{});
  check(table.layer_norm_forward, xlmr::LayerNormForward{});
  check(table.layer_norm_backward, xlmr::LayerNormBackward{});
  check(table.embedding_forward, xlmr::EmbeddingForward{});
  check(table.embedding_backward, xlmr::EmbeddingBackward{});
}

}  // namespace

void test_cuda(TableRef table) {
  if (!selected("cuda")) return;
  if (emulates_cuda(table)) {
    for_types(table, [&](auto element) { run<decltype(element)>(table); });
  } else {
    tally().context = std::string(table.name) + " asked for 16 bits";
    check_refusals(table);
  }
}

}  // namespace test
