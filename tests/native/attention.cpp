// attention_forward and attention_backward.
#include "attention_reference.h"

namespace test {
namespace {

using namespace attention;

template <class T>
using Outputs = std::vector<std::vector<T>>;

// q, k and v, or their gradients. Of the gradients, the key's and the value's share one stride.
template <class T>
struct Triple {
  std::deque<Guarded<T>> buffers;
  struct Place {
    size_t buffer;
    int64_t column;
  } place[3];
  T* pointer[3] = {};
  int64_t stride[3] = {};
  int64_t width;

  Triple(const Problem<T>& p, const std::vector<T>* const* values) : width(p.width()) {
    // Which of the three begins a buffer of its own; the others lie beside the one before.
    const bool apart[3] = {true, !p.joined || p.first_only, !p.joined};
    for (int i = 0; i < 3; ++i) {
      if (!apart[i]) {
        place[i] = {place[i - 1].buffer, place[i - 1].column + width};
        continue;
      }
      int count = 1;
      while (i + count < 3 && !apart[i + count]) ++count;
      const int64_t rows = i == 0 ? p.query_rows() : p.rows();
      const int64_t gap = p.gap * (values != nullptr || i == 0 ? i + 1 : 2);
      buffers.emplace_back(rows, count * width, count * width + gap);
      place[i] = {buffers.size() - 1, 0};
      if (values == nullptr) continue;
      std::vector<T> all;
      for (int64_t row = 0; row < rows; ++row) {
        for (int part = i; part < i + count; ++part) {
          const auto begin = values[part]->begin() + row * width;
          all.insert(all.end(), begin, begin + width);
        }
      }
      buffers.back().fill(all);
    }
    for (int i = 0; i < 3; ++i) {
      const Guarded<T>& buffer = buffers[place[i].buffer];
      pointer[i] = buffer.data() == nullptr ? nullptr : buffer.data() + place[i].column;
      stride[i] = buffer.stride();
    }
  }
  std::vector<T> values(int i) const {
    return buffers[place[i].buffer].columns(place[i].column, width);
  }
  bool intact() const {
    return std::all_of(buffers.begin(), buffers.end(),
                       [](const Guarded<T>& buffer) { return buffer.intact(); });
  }
};

template <class Args, class T>
void set_common(Args& args, const Problem<T>& p, const Guarded<int32_t>& offsets,
                const int64_t* seed) {
  args.dtype = dtype_of<T>();
  args.batch = p.batch();
  args.rows = p.rows();
  args.num_heads = p.heads;
  args.head_size = p.size;
  args.max_seqlen = 0;
  for (int32_t length : p.lengths) args.max_seqlen = std::max(args.max_seqlen, int64_t(length));
  args.cu_seqlens = offsets.data();
  args.scale = p.scale;
  args.dropout.p = p.p;
  args.dropout.site = p.site;
  args.dropout.seed = p.p > 0 ? seed : nullptr;
  args.first_only = p.first_only;
}

// Outputs: out [N, heads * size]; lse [heads, N] (empty where it is not asked for).
template <class T>
WithStatistics<T> forward(TableRef table, const Problem<T>& p, int32_t threads) {
  const int64_t rows = p.query_rows();
  const Guarded<int32_t> offsets(p.offsets(), 1, p.batch() + 1);
  const Guarded<int64_t> seed(std::vector<int64_t>{kSeed}, 1, 1);
  const std::vector<T>* inputs[3] = {&p.query, &p.key, &p.value};
  const Triple<T> qkv(p, inputs);
  const Guarded<T> out(rows, p.width(), p.width() + p.gap);
  const Guarded<Arithmetic<T>> lse(p.need_lse ? p.heads : 0, rows);
  xlmr::AttentionForward args{};
  set_common(args, p, offsets, seed.data());
  args.query = qkv.pointer[0];
  args.query_stride = qkv.stride[0];
  args.key = qkv.pointer[1];
  args.key_stride = qkv.stride[1];
  args.value = qkv.pointer[2];
  args.value_stride = qkv.stride[2];
  args.out = out.data();
  args.out_stride = out.stride();
  args.lse = lse.data();
  run_op(table.attention_forward, args, threads);
  CHECK(offsets.intact() && seed.intact() && qkv.intact(), "an input was changed");
  CHECK(out.intact(), "out was written outside of its elements");
  CHECK(lse.intact(), "lse was written outside of its elements");
  return {{out.values()}, {lse.values()}};
}

// Outputs: dquery, dkey, dvalue.
template <class T>
Outputs<T> backward(TableRef table, const Problem<T>& p, const std::vector<T>& out_values,
                    const std::vector<Arithmetic<T>>& lse_values, int32_t threads) {
  const int64_t rows = p.query_rows();
  const Guarded<int32_t> offsets(p.offsets(), 1, p.batch() + 1);
  const Guarded<int64_t> seed(std::vector<int64_t>{kSeed}, 1, 1);
  const std::vector<T>* inputs[3] = {&p.query, &p.key, &p.value};
  const Triple<T> qkv(p, inputs);
  const Guarded<T> dout(p.dout, rows, p.width(), p.width() + 2 * p.gap);
  const Guarded<T> out(out_values, rows, p.width(), p.width() + p.gap);
  const Guarded<Arithmetic<T>> lse(lse_values, p.heads, rows);
  const Triple<T> dqkv(p, nullptr);
  xlmr::AttentionBackward args{};
  set_common(args, p, offsets, seed.data());
  args.dout = dout.data();
  args.dout_stride = dout.stride();
  args.query = qkv.pointer[0];
  args.query_stride = qkv.stride[0];
  args.key = qkv.pointer[1];
  args.key_stride = qkv.stride[1];
  args.value = qkv.pointer[2];
  args.value_stride = qkv.stride[2];
  args.out = out.data();
  args.out_stride = out.stride();
  args.lse = lse.data();
  args.dquery = dqkv.pointer[0];
  args.dkey = dqkv.pointer[1];
  args.dvalue = dqkv.pointer[2];
  args.dquery_stride = dqkv.stride[0];
  args.dkv_stride = dqkv.stride[1];
  run_op(table.attention_backward, args, threads);
  CHECK(offsets.intact() && seed.intact() && qkv.intact() && dout.intact() && out.intact() &&
            lse.intact(),
        "an input was changed");
  CHECK(dqkv.intact(), "a gradient was written outside of its elements");
  return {dqkv.values(0), dqkv.values(1), dqkv.values(2)};
}

template <class T>
void check_forward(Line& line, TableRef table, const Problem<T>& p) {
  line.begin(p.sizes());
  const WithStatistics<T> got =
      run_on_threads(line, [&](int32_t threads) { return forward(table, p, threads); });
  const auto ref = reference(p, false);
  line.compare("out", got[0], ref.out);
  if (p.need_lse) line.compare("lse", got.statistics[0], ref.lse);
  // A sequence alone has the bits that it has in the batch. (Dropout depends on the packed row.)
  if (p.p > 0 || p.lengths.size() < 2 || p.first_only) return;
  int64_t first = 0;
  for (int32_t length : p.lengths) {
    Problem<T> alone = p;
    alone.lengths = {length};
    alone.query = slice(p.query, first * p.width(), length * p.width());
    alone.key = slice(p.key, first * p.width(), length * p.width());
    alone.value = slice(p.value, first * p.width(), length * p.width());
    line.same_bits("a sequence taken out of the batch", forward(table, alone, 1)[0],
                   slice(got[0], first * p.width(), length * p.width()));
    first += length;
  }
}

template <class T>
void check_backward(Line& line, TableRef table, const Problem<T>& p) {
  line.begin(p.sizes());
  const auto ref = reference(p, true);
  std::vector<T> out;
  std::vector<Arithmetic<T>> lse;
  for (const auto& value : ref.out) out.push_back(T(value.v));
  for (const auto& value : ref.lse) lse.push_back(Arithmetic<T>(value.v));
  const Outputs<T> got =
      run_on_threads(line, [&](int32_t threads) { return backward(table, p, out, lse, threads); });
  line.compare("dquery", got[0], ref.dquery);
  line.compare("dkey", got[1], ref.dkey);
  line.compare("dvalue", got[2], ref.dvalue);
}

// The first tokens alone have the bits that they have beside all others: their out and lse, and
// the gradients where the other tokens' dout is 0.
template <class T>
void check_first_only(Line& line, TableRef table, const Problem<T>& given) {
  Problem<T> p = given;
  const std::vector<int32_t> offsets = p.offsets();
  const int64_t w = p.width(), rows = p.rows(), batch = p.batch();
  std::fill(p.dout.begin(), p.dout.end(), T(0));
  for (int64_t b = 0; b < batch; ++b) {
    if (p.lengths[size_t(b)] == 0) continue;
    const int64_t at = offsets[size_t(b)] * w;
    std::copy_n(given.dout.begin() + at, w, p.dout.begin() + at);
  }
  p.need_lse = true;
  const Problem<T> first = first_tokens(p);
  line.begin("beside all tokens: " + first.sizes());
  const WithStatistics<T> all = forward(table, p, 2), alone = forward(table, first, 2);
  const auto &lse_all = all.statistics[0], &lse_alone = alone.statistics[0];
  const Outputs<T> dall = backward(table, p, all[0], lse_all, 2);
  const Outputs<T> dalone = backward(table, first, alone[0], lse_alone, 2);
  // Of `all`'s rows those that ask, and 0 for sequences without one.
  const auto gather = [&](const auto& from, int64_t columns, int64_t at) {
    std::decay_t<decltype(from)> to(size_t(batch * columns), 0);
    for (int64_t b = 0; b < batch; ++b) {
      if (p.lengths[size_t(b)] == 0) continue;
      std::copy_n(from.begin() + at + offsets[size_t(b)] * columns, columns,
                  to.begin() + b * columns);
    }
    return to;
  };
  line.same_bits("out", alone[0], gather(all[0], w, 0));
  std::vector<Arithmetic<T>> lse;
  for (int64_t head = 0; head < p.heads; ++head) {
    const auto of_head = gather(lse_all, 1, head * rows);
    lse.insert(lse.end(), of_head.begin(), of_head.end());
  }
  line.same_bits("lse", lse_alone, lse);
  // The other tokens add +-0 to the gradients: numbers stay as they are, the sign of a 0 may not.
  const auto unsigned_zeros = [](std::vector<T> values) {
    for (T& value : values) value = value == 0 ? T(0) : value;
    return values;
  };
  line.same_bits("dquery", unsigned_zeros(dalone[0]), unsigned_zeros(gather(dall[0], w, 0)));
  line.same_bits("dkey", unsigned_zeros(dalone[1]), unsigned_zeros(dall[1]));
  line.same_bits("dvalue", unsigned_zeros(dalone[2]), unsigned_zeros(dall[2]));
}

// Scores so large that all but the greatest vanish: the value of the greatest key comes out as it
// is, and every number stays finite.
template <class T>
void check_extreme(Line& line, TableRef table, Random& random) {
  constexpr double kEpsilon = std::numeric_limits<Arithmetic<T>>::epsilon();
  const double most = double(std::numeric_limits<T>::max()) / 16;
  for (const double size : {1e4, 1e18, most}) {
    if (size > most) continue;
    Problem<T> p = make<T>(random, {70, 3}, 2, 8, 0);
    p.need_lse = true;
    line.begin(text("scores up to %g: ", size) + p.sizes());
    p.scale = 1;
    for (int64_t i = 0; i < p.rows() * p.width(); ++i) {
      const bool leader = i % p.size == 0;
      p.query[size_t(i)] = leader ? T(1) : T(0);
      const int64_t row = i / p.width();
      // Key 37 of the first sequence and key 1 of the second lead; the others go far below.
      p.key[size_t(i)] = leader ? T(row == 37 || row == 71 ? size : -size) : T(0);
    }
    const WithStatistics<T> got = forward(table, p, 2);
    for (int64_t i = 0; i < p.rows() * p.width(); ++i) {
      const int64_t row = i / p.width();
      const int64_t leader = row < 70 ? 37 : 71;
      const T want = p.value[size_t(leader * p.width() + i % p.width())];
      if (!CHECK(got[0][size_t(i)] == want, "out[%lld] is %g, expected the value %g", (long long)i,
                 double(got[0][size_t(i)]), double(want))) {
        break;
      }
    }
    for (const auto lse : got.statistics[0]) {
      const double difference = std::fabs(double(lse) - double(T(size)));
      if (!CHECK(difference <= 4 * kEpsilon * size, "lse is %g, expected %g", double(lse), size)) {
        break;
      }
    }
    const Outputs<T> gradients = backward(table, p, got[0], got.statistics[0], 2);
    bool finite = true;
    for (const auto& gradient : gradients) {
      for (T value : gradient) finite = finite && std::isfinite(value);
    }
    CHECK(finite, "a gradient is not finite");
  }
  // All scores equal: the mean of the values.
  Problem<T> p = make<T>(random, {65}, 1, 8, 0);
  std::fill(p.query.begin(), p.query.end(), T(0));
  std::fill(p.value.begin(), p.value.end(), T(1));
  line.begin("equal scores: " + p.sizes());
  line.compare("out", forward(table, p, 1)[0], reference(p, false).out);
}

// A NaN in one sequence reaches no other; a NaN in one query row reaches no other row.
template <class T>
void check_nan(Line& line, TableRef table, Random& random) {
  Problem<T> p = make<T>(random, {5, 70, 1, 9}, 2, 32, 0);
  line.begin("NaN: " + p.sizes());
  const T nan = std::numeric_limits<T>::quiet_NaN();
  const std::vector<T> clean = forward(table, p, 2)[0];
  const int64_t w = p.width();
  Problem<T> dirty = p;
  dirty.query[size_t(40 * w)] = nan;  // head 0 of row 40
  std::vector<T> got = forward(table, dirty, 2)[0];
  line.same_bits("rows before a NaN query", slice(clean, 0, 40 * w), slice(got, 0, 40 * w));
  line.same_bits("the other head of its row", slice(clean, 40 * w + 32, 45 * w - 32),
                 slice(got, 40 * w + 32, 45 * w - 32));
  CHECK(std::isnan(got[size_t(40 * w)]), "a NaN query gave a number");
  for (std::vector<T>* values : {&dirty.key, &dirty.value}) {
    dirty.query = p.query;
    dirty.key = p.key;
    dirty.value = p.value;
    (*values)[size_t(40 * w + 3)] = nan;
    got = forward(table, dirty, 2)[0];
    line.same_bits("the sequence before a NaN", slice(clean, 0, 5 * w), slice(got, 0, 5 * w));
    line.same_bits("the sequences behind a NaN", slice(clean, 75 * w, 10 * w),
                   slice(got, 75 * w, 10 * w));
    CHECK(std::isnan(got[size_t(5 * w + 3)]), "a NaN in a key or value gave a number");
  }
}

template <class T>
void run(TableRef table) {
  struct Sizes {
    std::vector<int32_t> lengths;
    int64_t heads, size;
    double p;
  };
  const std::vector<int64_t> head_sizes = {1,  2,  3,  7,  8,  9,  15, 16,  17,
                                           31, 32, 33, 64, 65, 80, 96, 127, 128};
  std::vector<Sizes> cases = {
      {{}, 2, 64, 0}, {{}, 2, 64, 0.1}, {{0}, 2, 64, 0},         {{0, 0}, 1, 8, 0.5},
      {{1}, 1, 1, 0}, {{1}, 12, 64, 0}, {{1, 1, 1}, 2, 32, 0.1}, {{0, 1, 0, 5, 0}, 2, 8, 0},
  };
  Random random(13);
  const std::vector<int64_t> lengths = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49};
  for (size_t i = 0; i < head_sizes.size(); i += options().quick ? 5 : 1) {
    for (const double p : {0.0, 0.1}) {
      cases.push_back({{int32_t(random.pick(lengths)), 0, int32_t(random.pick(lengths)),
                        int32_t(random.pick(lengths))},
                       random.between(1, 3),
                       head_sizes[i],
                       p});
    }
  }
  const std::vector<int32_t> edges = {63, 64, 65, 95, 96, 97, 127, 128, 129, 130, 191, 192, 193};
  for (size_t i = 0; i < edges.size(); i += options().quick ? 8 : 1) {
    cases.push_back({{edges[i]}, 1, 32, 0});
    cases.push_back({{3, edges[i], 1}, 1, 8, 0.3});
  }
  if (!options().quick) {
    for (int64_t size : {1, 8, 32, 64, 80, 128}) {
      cases.push_back({{0, 1, 63, 64, 65, 130}, 2, size, size == 64 ? 0.1 : 0.0});
    }
    cases.push_back({{130, 0, 1, 65}, 2, 64, 0.5});
    cases.push_back({{257, 2}, 1, 16, 0});
    cases.push_back({{33}, 2, 64, 0.99});
  }
  // More sequences than tokens.
  cases.push_back({{0, 0, 1, 0, 0, 0}, 2, 9, 0});
  Random fuzz(options().seed);
  for (int64_t i = 0; i < options().fuzz; ++i) {
    Sizes s{{}, fuzz.between(1, 4), fuzz.between(1, 128), fuzz.chance(0.5) ? fuzz.uniform() : 0};
    for (int64_t k = fuzz.between(0, 5); k > 0; --k) {
      s.lengths.push_back(int32_t(fuzz.between(0, 90)));
    }
    cases.push_back(s);
  }
  if (selected("attention_forward")) {
    Line line(table, dtype_name<T>(), "attention_forward");
    for (const Sizes& s : cases) {
      check_forward(line, table, make<T>(random, s.lengths, s.heads, s.size, s.p));
    }
    check_extreme<T>(line, table, random);
    check_nan<T>(line, table, random);
  }
  if (selected("attention_backward")) {
    Line line(table, dtype_name<T>(), "attention_backward");
    for (const Sizes& s : cases) {
      check_backward(line, table, make<T>(random, s.lengths, s.heads, s.size, s.p));
    }
  }
  if (selected("attention_first_only")) {
    Line line(table, dtype_name<T>(), "attention_first_only");
    for (const Sizes& s : cases) {
      const Problem<T> p = make<T>(random, s.lengths, s.heads, s.size, s.p);
      check_forward(line, table, first_tokens(p));
      check_backward(line, table, first_tokens(p));
      check_first_only(line, table, p);
    }
  }
}

}  // namespace

void test_attention(TableRef table) {
  for_types(table, [&](auto element) { run<decltype(element)>(table); });
}

}  // namespace test
