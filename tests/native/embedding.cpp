// embedding_forward and embedding_backward.
#include "norm_reference.h"
#include "packed.h"
#include "philox.h"

namespace test {
namespace {

constexpr int64_t kSeed = 42;
constexpr int64_t kWords = 23, kPositions = 11, kTypes = 2;

template <class T>
struct Problem {
  int64_t rows, hidden;
  double eps = 1e-5;
  double p = 0;
  int64_t site = 0;
  int64_t gap = 0;
  int64_t padding_idx = 1;
  bool need_stats = true, need_params = true, need_word = true, need_position = true,
       need_type = true;
  std::vector<int64_t> ids, positions, types;  // types may be empty
  std::vector<T> embeds;                       // instead of ids, where not empty
  std::vector<T> word, position, type, weight, bias;
  std::vector<int8_t> word_q;  // instead of `word`, where not empty
  std::vector<float> word_scale;
  std::vector<T> dy, dword, dposition, dtype;  // gradients as they are before
  std::vector<Arithmetic<T>> mean, rstd;

  bool by_id() const { return embeds.empty(); }
  std::string sizes() const {
    return text(
        "rows=%lld hidden=%lld p=%g by_id=%d types=%d gap=%lld padding=%lld "
        "need=%d%d%d%d%d",
        (long long)rows, (long long)hidden, p, int(by_id()), int(!types.empty()), (long long)gap,
        (long long)padding_idx, int(need_stats), int(need_params), int(need_word),
        int(need_position), int(need_type));
  }
};

template <class R, class T>
std::vector<Num<R>> row_sum(const Problem<T>& p, int64_t row) {
  std::vector<Num<R>> out;
  for (int64_t i = 0; i < p.hidden; ++i) {
    const T word = p.by_id() ? p.word[size_t(p.ids[size_t(row)] * p.hidden + i)]
                             : p.embeds[size_t(row * p.hidden + i)];
    const int64_t type = p.types.empty() ? 0 : p.types[size_t(row)];
    const T of_position = p.position[size_t(p.positions[size_t(row)] * p.hidden + i)];
    const T of_type = p.type[size_t(type * p.hidden + i)];
    if constexpr (kIs16Bits<T>) {  // the number that the sum is rounded to counts
      out.push_back(exact(R(T((float(word) + float(of_type)) + float(of_position)))));
      continue;
    }
    // Any order of the three: two roundings of at most the sum of the magnitudes.
    Sum<R> sum;
    sum.add(exact(R(word)));
    sum.add(exact(R(of_position)));
    sum.add(exact(R(of_type)));
    out.push_back(sum.value());
  }
  return out;
}

template <class T>
Problem<T> make(Random& random, int64_t rows, int64_t hidden, double p, bool by_id) {
  using R = Wide<T>;
  Problem<T> out;
  out.rows = rows;
  out.hidden = hidden;
  out.p = p;
  out.gap = random.chance(0.5) ? random.between(1, 19) : 0;
  out.padding_idx = random.chance(0.7) ? 1 : -1;
  out.need_stats = random.chance(0.7);
  out.need_params = random.chance(0.7);
  out.need_word = by_id && random.chance(0.8);
  out.need_position = random.chance(0.8);
  out.need_type = random.chance(0.8);
  const bool types = random.chance(0.5);
  for (int64_t row = 0; row < rows; ++row) {
    // Few words, so that ids meet in one row; the first and the last row of each table, too.
    out.ids.push_back(row == 0 ? kWords - 1 : random.between(0, kWords / 2));
    out.positions.push_back(row == 0 ? kPositions - 1 : random.between(0, kPositions - 1));
    if (types) out.types.push_back(random.between(0, kTypes - 1));
  }
  out.word = random.values<T>(kWords * hidden);
  out.position = random.values<T>(kPositions * hidden);
  out.type = random.values<T>(kTypes * hidden);
  out.weight = random.values<T>(hidden, 0.5, 1.0);
  out.bias = random.values<T>(hidden);
  if (!by_id) out.embeds = random.values<T>(rows * hidden);
  out.dy = random.values<T>(rows * hidden);
  out.dword = random.values<T>(kWords * hidden);
  out.dposition = random.values<T>(kPositions * hidden);
  out.dtype = random.values<T>(kTypes * hidden);
  for (int64_t row = 0; row < rows; ++row) {
    const RowNorm<R> norm = norm_row(row_sum<R>(out, row), out.eps, R(0));
    out.mean.push_back(Arithmetic<T>(norm.mean.v));
    out.rstd.push_back(Arithmetic<T>(norm.rstd.v));
  }
  return out;
}

// The buffers that both directions read.
template <class T>
struct Inputs {
  Guarded<int64_t> ids, positions, types, seed;
  Guarded<T> embeds, word, position, type, weight;

  explicit Inputs(const Problem<T>& p)
      : ids(p.ids, p.by_id() ? 1 : 0, p.rows),
        positions(p.positions, 1, p.rows),
        types(p.types, p.types.empty() ? 0 : 1, p.rows),
        seed(std::vector<int64_t>{kSeed}, 1, 1),
        embeds(p.embeds, p.by_id() ? 0 : p.rows, p.hidden, p.hidden + p.gap),
        word(p.word, p.by_id() ? kWords : 0, p.hidden),
        position(p.position, kPositions, p.hidden),
        type(p.type, kTypes, p.hidden),
        weight(p.weight, 1, p.hidden) {}
  template <class Args>
  void set(Args& args, const Problem<T>& p) const {
    args.dtype = dtype_of<T>();
    args.rows = p.rows;
    args.hidden = p.hidden;
    args.dropout.p = p.p;
    args.dropout.site = p.site;
    args.dropout.seed = p.p > 0 ? seed.data() : nullptr;
    args.input_ids = ids.data();
    args.inputs_embeds = embeds.data();
    args.inputs_embeds_stride = embeds.stride();
    args.position_ids = positions.data();
    args.token_type_ids = types.data();
    args.word_rows = kWords;
    args.position_rows = kPositions;
    args.token_type_rows = kTypes;
    args.word = word.data();
    args.position = position.data();
    args.token_type = type.data();
    args.weight = weight.data();
  }
  bool intact() const {
    return ids.intact() && positions.intact() && types.intact() && seed.intact() &&
           embeds.intact() && word.intact() && position.intact() && type.intact() &&
           weight.intact();
  }
};

template <class T>
using Outputs = std::vector<std::vector<T>>;

// Outputs: y; mean, rstd.
template <class T>
WithStatistics<T> forward(TableRef table, const Problem<T>& p, int32_t threads) {
  const Inputs<T> inputs(p);
  const Guarded<T> bias(p.bias, 1, p.hidden);
  const Guarded<int8_t> word_q(p.word_q, p.word_q.empty() ? 0 : kWords, p.hidden);
  const Guarded<float> word_scale(p.word_scale, p.word_scale.empty() ? 0 : 1, kWords);
  const Guarded<T> y(p.rows, p.hidden);
  const Guarded<Arithmetic<T>> mean(p.need_stats ? p.rows : 0, 1);
  const Guarded<Arithmetic<T>> rstd(p.need_stats ? p.rows : 0, 1);
  xlmr::EmbeddingForward args{};
  inputs.set(args, p);
  if (!p.word_q.empty()) args.word = word_q.data();
  args.word_scale = word_scale.data();
  args.eps = p.eps;
  args.bias = bias.data();
  args.y = y.data();
  args.mean = mean.data();
  args.rstd = rstd.data();
  run_op(table.embedding_forward, args, threads);
  CHECK(inputs.intact() && bias.intact() && word_q.intact() && word_scale.intact(),
        "an input was changed");
  CHECK(y.intact(), "y was written outside of its elements");
  CHECK(mean.intact() && rstd.intact(), "a statistic was written outside of its elements");
  return {{y.values()}, {mean.values(), rstd.values()}};
}

// Outputs: dsum, dword, dposition, dtoken_type, dweight, dbias (empty where not asked for).
template <class T>
Outputs<T> backward(TableRef table, const Problem<T>& p, int32_t threads) {
  const Inputs<T> inputs(p);
  const Guarded<T> dy(p.dy, p.rows, p.hidden, p.hidden + 2 * p.gap);
  const Guarded<Arithmetic<T>> mean(p.mean, p.rows, 1), rstd(p.rstd, p.rows, 1);
  const Guarded<T> dsum(p.rows, p.hidden);
  Guarded<T> dword(p.need_word ? kWords : 0, p.hidden);
  Guarded<T> dposition(p.need_position ? kPositions : 0, p.hidden);
  Guarded<T> dtype(p.need_type ? kTypes : 0, p.hidden);
  if (p.need_word) dword.fill(p.dword);
  if (p.need_position) dposition.fill(p.dposition);
  if (p.need_type) dtype.fill(p.dtype);
  const Guarded<T> dweight(p.need_params ? 1 : 0, p.hidden), dbias(p.need_params ? 1 : 0, p.hidden);
  xlmr::EmbeddingBackward args{};
  inputs.set(args, p);
  args.padding_idx = p.padding_idx;
  args.dy = dy.data();
  args.dy_stride = dy.stride();
  args.mean = mean.data();
  args.rstd = rstd.data();
  args.dsum = dsum.data();
  args.dword = dword.data();
  args.dposition = dposition.data();
  args.dtoken_type = dtype.data();
  args.dweight = dweight.data();
  args.dbias = dbias.data();
  run_op(table.embedding_backward, args, threads);
  CHECK(inputs.intact() && dy.intact() && mean.intact() && rstd.intact(), "an input was changed");
  Outputs<T> out;
  for (const Guarded<T>* buffer :
       {&dsum, static_cast<const Guarded<T>*>(&dword), static_cast<const Guarded<T>*>(&dposition),
        static_cast<const Guarded<T>*>(&dtype), &dweight, &dbias}) {
    CHECK(buffer->intact(), "output %zu was written outside of its elements", out.size());
    out.push_back(buffer->values());
  }
  return out;
}

template <class T>
void check_forward(Line& line, TableRef table, const Problem<T>& p) {
  using R = Wide<T>;
  line.begin(p.sizes());
  const WithStatistics<T> got =
      run_on_threads(line, [&](int32_t threads) { return forward(table, p, threads); });
  std::vector<Num<R>> y, mean, rstd;
  const Num<R> keep = rounded(R(1 / (1 - p.p)));
  for (int64_t row = 0; row < p.rows; ++row) {
    const RowNorm<R> norm =
        norm_row(row_sum<R>(p, row), p.eps, R(std::numeric_limits<Arithmetic<T>>::epsilon() / 2));
    mean.push_back(norm.mean);
    rstd.push_back(norm.rstd);
    for (int64_t i = 0; i < p.hidden; ++i) {
      Num<R> value =
          norm.normal[size_t(i)] * exact(R(p.weight[size_t(i)])) + exact(R(p.bias[size_t(i)]));
      if (p.p > 0) value = keeps(p.p, kSeed, p.site, 0, row, i) ? value * keep : exact(R(0));
      y.push_back(value);
    }
  }
  line.compare("y", got[0], y);
  if (p.need_stats) {
    line.compare("mean", got.statistics[0], mean);
    line.compare("rstd", got.statistics[1], rstd);
  }
  if (p.p > 0 || p.rows < 2) return;
  const int64_t middle = p.rows / 2;
  Problem<T> alone = p;
  alone.rows = 1;
  alone.ids = slice(p.ids, middle, 1);
  alone.positions = slice(p.positions, middle, 1);
  alone.types = slice(p.types, middle, 1);
  alone.embeds = slice(p.embeds, middle * p.hidden, p.hidden);
  line.same_bits("a row alone", forward(table, alone, 1)[0],
                 slice(got[0], middle * p.hidden, p.hidden));
}

// Adds row by row in ascending order, in the arithmetic of the tested type, and rounds to that type
// at the end: the very bits that the op owes.
template <class T>
std::vector<T> scattered(const std::vector<T>& before, const std::vector<T>& dsum,
                         const std::vector<int64_t>& index, int64_t rows, int64_t hidden,
                         int64_t padding_idx) {
  std::vector<Arithmetic<T>> table(before.begin(), before.end());
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t target = index.empty() ? 0 : index[size_t(row)];
    if (target == padding_idx) continue;
    for (int64_t i = 0; i < hidden; ++i) {
      table[size_t(target * hidden + i)] += dsum[size_t(row * hidden + i)];
    }
  }
  return {table.begin(), table.end()};
}

template <class T>
void check_backward(Line& line, TableRef table, const Problem<T>& p) {
  using R = Wide<T>;
  line.begin(p.sizes());
  const Outputs<T> got =
      run_on_threads(line, [&](int32_t threads) { return backward(table, p, threads); });
  std::vector<Num<R>> dsum, dweight, dbias;
  std::vector<Sum<R>> weight_sums(size_t(p.hidden)), bias_sums(size_t(p.hidden));
  const Num<R> keep = rounded(R(1 / (1 - p.p)));
  for (int64_t row = 0; row < p.rows; ++row) {
    const Num<R> mean = exact(R(p.mean[size_t(row)])), rstd = exact(R(p.rstd[size_t(row)]));
    const std::vector<Num<R>> sum = row_sum<R>(p, row);
    std::vector<Num<R>> g, h;
    for (int64_t i = 0; i < p.hidden; ++i) {
      Num<R> dy = exact(R(p.dy[size_t(row * p.hidden + i)]));
      if (p.p > 0) dy = keeps(p.p, kSeed, p.site, 0, row, i) ? dy * keep : exact(R(0));
      g.push_back(dy * exact(R(p.weight[size_t(i)])));
      h.push_back((sum[size_t(i)] - mean) * rstd);
      weight_sums[size_t(i)].add_product(dy, h.back());
      bias_sums[size_t(i)].add(dy);
    }
    for (const Num<R>& value : norm_row_gradient(g, h, rstd)) dsum.push_back(value);
  }
  line.compare("dsum", got[0], dsum);
  if (p.need_word) {
    line.same_bits("dword and the sum in ascending order", got[1],
                   scattered(p.dword, got[0], p.ids, p.rows, p.hidden, p.padding_idx));
  }
  if (p.need_position) {
    line.same_bits("dposition and the sum in ascending order", got[2],
                   scattered(p.dposition, got[0], p.positions, p.rows, p.hidden, p.padding_idx));
  }
  if (p.need_type) {
    line.same_bits("dtoken_type and the sum in ascending order", got[3],
                   scattered(p.dtype, got[0], p.types, p.rows, p.hidden, -1));
  }
  if (p.need_params) {
    for (int64_t i = 0; i < p.hidden; ++i) {
      dweight.push_back(weight_sums[size_t(i)].value());
      dbias.push_back(bias_sums[size_t(i)].value());
    }
    line.compare("dweight", got[4], dweight);
    line.compare("dbias", got[5], dbias);
  }
}

// A word table of 8 bits gives the bits of the floats that it stands for; embeds go before it.
// Those floats fit into 16 bits where their scales are powers of two.
template <class T>
void check_int8_words(Line& line, TableRef table, Problem<T> p) {
  line.begin("int8 words " + p.sizes());
  Int8Values words = quantized(std::vector<float>(p.word.begin(), p.word.end()), kWords, p.hidden);
  if (kIs16Bits<T>) {
    for (float& scale : words.scale) scale = std::exp2(std::round(std::log2(scale)));
  }
  for (size_t i = 0; i < words.q.size(); ++i) {
    p.word[i] = T(words.q[i]) * T(words.scale[i / size_t(p.hidden)]);
  }
  const WithStatistics<T> want = forward(table, p, 1);
  p.word_q = words.q;
  p.word_scale = words.scale;
  const WithStatistics<T> got =
      run_on_threads(line, [&](int32_t threads) { return forward(table, p, threads); });
  line.same_bits("int8 words", got[0], want[0]);
  for (size_t k = 0; k < 2; ++k) {
    line.same_bits("int8 words", got.statistics[k], want.statistics[k]);
  }
}

template <class T>
void run(TableRef table) {
  const std::vector<int64_t> edges = {1,  2,  3,  4,  5,  7,  8,   9,   15,  16,  17,  31, 32,
                                      33, 63, 64, 65, 96, 97, 127, 128, 129, 255, 256, 257};
  const std::vector<int64_t> small = {1, 2, 3, 5, 8, 9, 17};
  struct Sizes {
    int64_t rows, hidden;
    double p;
    bool by_id;
  };
  std::vector<Sizes> cases = {{0, 8, 0, true}, {0, 9, 0.1, true}};
  Random random(15);
  for (size_t i = 0; i < edges.size(); i += options().quick ? 5 : 1) {
    for (const double p : {0.0, 0.1}) {
      cases.push_back({edges[i], random.pick(small), p, random.chance(0.7)});
      cases.push_back({random.pick(small), edges[i], p, random.chance(0.7)});
    }
  }
  if (!options().quick) {
    cases.push_back({9, 768, 0, true});
    cases.push_back({9, 1025, 0.1, false});
    cases.push_back({513, 33, 0.5, true});
    cases.push_back({1030, 7, 0, false});
  }
  Random fuzz(options().seed);
  for (int64_t i = 0; i < options().fuzz; ++i) {
    cases.push_back({fuzz.between(0, 200), fuzz.between(1, 300),
                     fuzz.chance(0.5) ? fuzz.uniform() : 0, fuzz.chance(0.7)});
  }
  if (selected("embedding_forward")) {
    Line line(table, dtype_name<T>(), "embedding_forward");
    for (const Sizes& s : cases) {
      const Problem<T> p = make<T>(random, s.rows, s.hidden, s.p, s.by_id);
      check_forward(line, table, p);
      check_int8_words(line, table, p);
    }
  }
  if (selected("embedding_backward")) {
    Line line(table, dtype_name<T>(), "embedding_backward");
    for (const Sizes& s : cases) {
      check_backward(line, table, make<T>(random, s.rows, s.hidden, s.p, s.by_id));
    }
  }
}

}  // namespace

void test_embedding(TableRef table) {
  for_types(table, [&](auto element) { run<decltype(element)>(table); });
}

}  // namespace test
