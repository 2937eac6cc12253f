// Dropout's mask, seen through the ops that use it, against the plain Philox: the same on every
// table, because every table is held against the same one.
#include "harness.h"
#include "philox.h"

namespace test {
namespace {

const double kProbabilities[] = {1e-12, 0.1, 0.5, 0.9, 0.999999};
const int64_t kSeeds[] = {0, 1, -1, std::numeric_limits<int64_t>::min(), 0x0123456789ABCDEF};
const int64_t kSites[] = {0, 1, 77, 0xFFFFFFFF};

struct Setting {
  double p;
  int64_t seed, site;
  xlmr::Dropout dropout() const { return {p, site, &seed}; }
  std::string name() const {
    return text("p=%g seed=%lld site=%lld", p, (long long)seed, (long long)site);
  }
};

// Compares where `values` is 0 with the mask, and the kept ones with `kept`.
template <class T>
void compare_mask(const std::vector<T>& values, double kept, int64_t columns, int64_t head,
                  int64_t first_row, int64_t first_column, const Setting& s) {
  int64_t wrong = 0, example = -1;
  for (int64_t i = 0; i < int64_t(values.size()); ++i) {
    const bool keep =
        keeps(s.p, s.seed, s.site, head, first_row + i / columns, first_column + i % columns);
    const double difference = std::fabs(double(values[size_t(i)]) - (keep ? kept : 0));
    if (difference > 16 * double(std::numeric_limits<T>::epsilon()) * kept) {
      ++wrong;
      example = i;
    }
  }
  CHECK(wrong == 0,
        "%lld of %zu elements are not as the mask says; e.g. row %lld column %lld is %g",
        (long long)wrong, values.size(), (long long)(first_row + example / columns),
        (long long)(first_column + example % columns),
        example < 0 ? 0.0 : double(values[size_t(example)]));
}

template <class T>
void through_layer_norm(Line& line, TableRef table, const Setting& s, int64_t rows,
                        int64_t hidden) {
  line.begin(text("layer_norm rows=%lld hidden=%lld ", (long long)rows, (long long)hidden) +
             s.name());
  const std::vector<T> ones(size_t(rows * hidden), T(1));
  const Guarded<T> x(ones, rows, hidden), weight(slice(ones, 0, hidden), 1, hidden);
  const Guarded<T> y(rows, hidden), sum(rows, hidden);
  const Guarded<Arithmetic<T>> mean(rows, 1), rstd(rows, 1);
  xlmr::LayerNormForward args{};
  args.dtype = dtype_of<T>();
  args.rows = rows;
  args.hidden = hidden;
  args.eps = 1e-5;
  args.dropout = s.dropout();
  args.x = x.data();
  args.x_stride = hidden;
  args.weight = weight.data();
  args.bias = weight.data();
  args.y = y.data();
  args.sum = sum.data();
  args.mean = mean.data();
  args.rstd = rstd.data();
  run_op(table.layer_norm_forward, args, 2);
  compare_mask(sum.values(), 1 / (1 - s.p), hidden, 0, 0, 0, s);
}

template <class T>
void through_embedding(Line& line, TableRef table, const Setting& s, int64_t rows, int64_t hidden) {
  line.begin(text("embedding rows=%lld hidden=%lld ", (long long)rows, (long long)hidden) +
             s.name());
  Random random(3);
  const Guarded<int64_t> ids(std::vector<int64_t>(size_t(rows), 0), 1, rows);
  const Guarded<T> row(random.values<T>(hidden), 1, hidden);
  const Guarded<T> zero(std::vector<T>(size_t(hidden), T(0)), 1, hidden);
  const Guarded<T> one(std::vector<T>(size_t(hidden), T(1)), 1, hidden);
  const Guarded<T> y(rows, hidden);
  xlmr::EmbeddingForward args{};
  args.dtype = dtype_of<T>();
  args.rows = rows;
  args.hidden = hidden;
  args.eps = 1e-5;
  args.dropout = s.dropout();
  args.input_ids = ids.data();
  args.position_ids = ids.data();
  args.word_rows = args.position_rows = args.token_type_rows = 1;
  args.word = row.data();
  args.position = row.data();
  args.token_type = row.data();
  args.weight = zero.data();
  args.bias = one.data();
  args.y = y.data();
  run_op(table.embedding_forward, args, 2);
  compare_mask(y.values(), 1 / (1 - s.p), hidden, 0, 0, 0, s);
}

// Equal scores and values that point out one key each: out shows the probabilities.
template <class T>
void through_attention(Line& line, TableRef table, const Setting& s, int32_t length) {
  constexpr int64_t kHeads = 2, kSize = 128, kWidth = kHeads * kSize;
  const int32_t before = 3;
  const int64_t rows = before + length;
  line.begin(text("attention length=%d ", int(length)) + s.name());
  const Guarded<int32_t> offsets({0, before, before + length}, 1, 3);
  const std::vector<T> zeros(size_t(rows * kWidth), T(0));
  for (int64_t base = 0; base < length; base += kSize) {
    std::vector<T> pointers = zeros;
    for (int64_t key = base; key < std::min<int64_t>(length, base + kSize); ++key) {
      for (int64_t head = 0; head < kHeads; ++head) {
        pointers[size_t((before + key) * kWidth + head * kSize + key - base)] = T(1);
      }
    }
    const Guarded<T> query(zeros, rows, kWidth), key(zeros, rows, kWidth);
    const Guarded<T> value(pointers, rows, kWidth), out(rows, kWidth);
    xlmr::AttentionForward args{};
    args.dtype = dtype_of<T>();
    args.batch = 2;
    args.rows = rows;
    args.num_heads = kHeads;
    args.head_size = kSize;
    args.max_seqlen = std::max(before, length);
    args.cu_seqlens = offsets.data();
    args.scale = 1;
    args.dropout = s.dropout();
    args.query = query.data();
    args.key = key.data();
    args.value = value.data();
    args.out = out.data();
    args.query_stride = args.key_stride = args.value_stride = args.out_stride = kWidth;
    run_op(table.attention_forward, args, 2);
    const int64_t columns = std::min<int64_t>(kSize, length - base);
    for (int64_t head = 0; head < kHeads; ++head) {
      const std::vector<T> seen = out.columns(head * kSize, columns);
      compare_mask(slice(seen, before * columns, length * columns), 1 / (1 - s.p) / double(length),
                   columns, head, before, base, s);
    }
  }
}

template <class T>
void run(TableRef table) {
  if (!selected("dropout")) return;
  Line line(table, dtype_name<T>(), "dropout mask");
  for (const double p : kProbabilities) {
    for (const int64_t seed : kSeeds) {
      for (const int64_t site : kSites) {
        if (options().quick && (seed != -1 || site != 77)) continue;
        const Setting s{p, seed, site};
        if (1 / (1 - p) > double(std::numeric_limits<T>::max())) continue;
        through_layer_norm<T>(line, table, s, 5, 37);
        through_embedding<T>(line, table, s, 6, 33);
        if (seed == -1 || site == 77) through_attention<T>(line, table, s, 67);
      }
    }
  }
  const Setting s{0.25, -5, 9};
  for (const int64_t hidden : {1, 2, 3, 4, 5, 31, 32, 33, 63, 64, 65, 127, 129}) {
    through_layer_norm<T>(line, table, s, 3, hidden);
    through_embedding<T>(line, table, s, 3, hidden);
    through_attention<T>(line, table, s, int32_t(hidden));
  }
  if (!options().quick) through_attention<T>(line, table, s, 130);
}

}  // namespace

void test_dropout(TableRef table) {
  for_types(table, [&](auto element) { run<decltype(element)>(table); });
}

}  // namespace test
