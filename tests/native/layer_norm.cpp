// layer_norm_forward and layer_norm_backward.
#include "harness.h"
#include "norm_reference.h"
#include "philox.h"

namespace test {
namespace {

constexpr int64_t kSeed = 0x0123456789ABCDEF;

template <class T>
struct Problem {
  int64_t rows, hidden;
  double eps = 1e-5;
  double p = 0;
  int64_t site = 5;
  int64_t gap = 0;
  bool need_sum = true, need_stats = true, need_params = true;
  std::vector<T> x, residual, weight, bias;  // residual may be empty
  std::vector<T> dy, sum;                    // the backward's, as the next two
  std::vector<Arithmetic<T>> mean, rstd;

  std::string sizes() const {
    return text("rows=%lld hidden=%lld p=%g residual=%d gap=%lld need=%d%d%d", (long long)rows,
                (long long)hidden, p, int(!residual.empty()), (long long)gap, int(need_sum),
                int(need_stats), int(need_params));
  }
};

template <class T>
Problem<T> make(Random& random, int64_t rows, int64_t hidden, double p, double offset = 0) {
  Problem<T> out;
  out.rows = rows;
  out.hidden = hidden;
  out.p = p;
  out.gap = random.chance(0.5) ? random.between(1, 19) : 0;
  out.need_sum = random.chance(0.6);
  out.need_stats = random.chance(0.6);
  out.need_params = random.chance(0.7);
  out.x = random.values<T>(rows * hidden, 1.0, offset);
  if (random.chance(0.6)) out.residual = random.values<T>(rows * hidden);
  out.weight = random.values<T>(hidden, 0.5, 1.0);
  out.bias = random.values<T>(hidden);
  out.dy = random.values<T>(rows * hidden);
  out.sum = random.values<T>(rows * hidden, 1.0, offset);
  for (int64_t row = 0; row < rows; ++row) {
    double total = 0, squares = 0;
    for (int64_t i = 0; i < hidden; ++i) total += out.sum[size_t(row * hidden + i)];
    for (int64_t i = 0; i < hidden; ++i) {
      const double d = out.sum[size_t(row * hidden + i)] - total / double(hidden);
      squares += d * d;
    }
    using Statistic = Arithmetic<T>;
    out.mean.push_back(Statistic(total / double(hidden)));
    out.rstd.push_back(Statistic(1 / std::sqrt(squares / double(hidden) + out.eps)));
  }
  return out;
}

template <class T>
using Outputs = std::vector<std::vector<T>>;

// Outputs: y, sum; mean, rstd (empty where not asked for).
template <class T>
WithStatistics<T> forward(TableRef table, const Problem<T>& p, int32_t threads) {
  const Guarded<T> x(p.x, p.rows, p.hidden, p.hidden + p.gap);
  const Guarded<T> residual(p.residual, p.residual.empty() ? 0 : p.rows, p.hidden,
                            p.hidden + 2 * p.gap);
  const Guarded<T> weight(p.weight, 1, p.hidden), bias(p.bias, 1, p.hidden);
  const Guarded<int64_t> seed(std::vector<int64_t>{kSeed}, 1, 1);
  const Guarded<T> y(p.rows, p.hidden);
  const Guarded<T> sum(p.need_sum ? p.rows : 0, p.hidden);
  const Guarded<Arithmetic<T>> mean(p.need_stats ? p.rows : 0, 1);
  const Guarded<Arithmetic<T>> rstd(p.need_stats ? p.rows : 0, 1);
  xlmr::LayerNormForward args{};
  args.dtype = dtype_of<T>();
  args.rows = p.rows;
  args.hidden = p.hidden;
  args.eps = p.eps;
  args.dropout.p = p.p;
  args.dropout.site = p.site;
  args.dropout.seed = p.p > 0 ? seed.data() : nullptr;
  args.x = x.data();
  args.x_stride = x.stride();
  args.residual = residual.data();
  args.residual_stride = residual.stride();
  args.weight = weight.data();
  args.bias = bias.data();
  args.y = y.data();
  args.sum = sum.data();
  args.mean = mean.data();
  args.rstd = rstd.data();
  run_op(table.layer_norm_forward, args, threads);
  CHECK(x.intact() && residual.intact() && weight.intact() && bias.intact() && seed.intact(),
        "an input was changed");
  CHECK(y.intact() && sum.intact(), "y or sum was written outside of its elements");
  CHECK(mean.intact() && rstd.intact(), "a statistic was written outside of its elements");
  return {{y.values(), sum.values()}, {mean.values(), rstd.values()}};
}

// Outputs: dsum, dx (empty where p is 0), dweight, dbias.
template <class T>
Outputs<T> backward(TableRef table, const Problem<T>& p, int32_t threads) {
  const Guarded<T> dy(p.dy, p.rows, p.hidden, p.hidden + p.gap);
  const Guarded<T> sum(p.sum, p.rows, p.hidden, p.hidden + 2 * p.gap);
  const Guarded<Arithmetic<T>> mean(p.mean, p.rows, 1), rstd(p.rstd, p.rows, 1);
  const Guarded<T> weight(p.weight, 1, p.hidden);
  const Guarded<int64_t> seed(std::vector<int64_t>{kSeed}, 1, 1);
  const Guarded<T> dsum(p.rows, p.hidden), dx(p.p > 0 ? p.rows : 0, p.hidden);
  const Guarded<T> dweight(p.need_params ? 1 : 0, p.hidden), dbias(p.need_params ? 1 : 0, p.hidden);
  xlmr::LayerNormBackward args{};
  args.dtype = dtype_of<T>();
  args.rows = p.rows;
  args.hidden = p.hidden;
  args.dropout.p = p.p;
  args.dropout.site = p.site;
  args.dropout.seed = p.p > 0 ? seed.data() : nullptr;
  args.dy = dy.data();
  args.dy_stride = dy.stride();
  args.sum = sum.data();
  args.sum_stride = sum.stride();
  args.mean = mean.data();
  args.rstd = rstd.data();
  args.weight = weight.data();
  args.dsum = dsum.data();
  args.dx = dx.data();
  args.dweight = dweight.data();
  args.dbias = dbias.data();
  run_op(table.layer_norm_backward, args, threads);
  CHECK(dy.intact() && sum.intact() && mean.intact() && rstd.intact() && weight.intact() &&
            seed.intact(),
        "an input was changed");
  Outputs<T> out;
  for (const Guarded<T>* buffer : {&dsum, &dx, &dweight, &dbias}) {
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
  // What is rounded to 16 bits counts from there on: y and the statistics owe nothing for it.
  std::vector<T> rounded_sums;
  if (kIs16Bits<T>) {
    Problem<T> with_sum = p;
    with_sum.need_sum = true;
    const WithStatistics<T> kept = forward(table, with_sum, 1);
    line.same_bits("y beside the sum", kept[0], got[0]);
    rounded_sums = kept[1];
  }
  std::vector<Num<R>> y, sums, mean, rstd;
  const Num<R> keep = rounded(R(1 / (1 - p.p)));
  for (int64_t row = 0; row < p.rows; ++row) {
    std::vector<Num<R>> sum;
    for (int64_t i = 0; i < p.hidden; ++i) {
      const size_t at = size_t(row * p.hidden + i);
      Num<R> s = exact(R(p.x[at]));
      if (p.p > 0) s = keeps(p.p, kSeed, p.site, 0, row, i) ? s * keep : exact(R(0));
      if (!p.residual.empty()) s = s + exact(R(p.residual[at]));
      sums.push_back(s);
      sum.push_back(kIs16Bits<T> ? exact(R(rounded_sums[at])) : s);
    }
    const RowNorm<R> norm =
        norm_row(sum, p.eps, R(std::numeric_limits<Arithmetic<T>>::epsilon() / 2));
    mean.push_back(norm.mean);
    rstd.push_back(norm.rstd);
    for (int64_t i = 0; i < p.hidden; ++i) {
      y.push_back(norm.normal[size_t(i)] * exact(R(p.weight[size_t(i)])) +
                  exact(R(p.bias[size_t(i)])));
    }
  }
  line.compare("y", got[0], y);
  if (kIs16Bits<T>) line.compare("sum", rounded_sums, sums);
  if (p.need_sum) line.compare("sum", got[1], sums);
  if (p.need_stats) {
    line.compare("mean", got.statistics[0], mean);
    line.compare("rstd", got.statistics[1], rstd);
  }
  // A row alone has the bits that it has in the batch. (Dropout depends on the row's number.)
  if (p.p > 0 || p.rows < 2) return;
  const int64_t middle = p.rows / 2;
  Problem<T> alone = p;
  alone.rows = 1;
  alone.x = slice(p.x, middle * p.hidden, p.hidden);
  alone.residual = slice(p.residual, middle * p.hidden, p.hidden);
  line.same_bits("a row alone", forward(table, alone, 1)[0],
                 slice(got[0], middle * p.hidden, p.hidden));
}

template <class T>
void check_backward(Line& line, TableRef table, const Problem<T>& p) {
  using R = Wide<T>;
  line.begin(p.sizes());
  const Outputs<T> got =
      run_on_threads(line, [&](int32_t threads) { return backward(table, p, threads); });
  std::vector<Num<R>> dsum, dx, dweight, dbias;
  std::vector<Sum<R>> weight_sums(size_t(p.hidden)), bias_sums(size_t(p.hidden));
  const Num<R> keep = rounded(R(1 / (1 - p.p)));
  for (int64_t row = 0; row < p.rows; ++row) {
    const Num<R> mean = exact(R(p.mean[size_t(row)])), rstd = exact(R(p.rstd[size_t(row)]));
    std::vector<Num<R>> g, h;
    for (int64_t i = 0; i < p.hidden; ++i) {
      const size_t at = size_t(row * p.hidden + i);
      const Num<R> dy = exact(R(p.dy[at]));
      g.push_back(dy * exact(R(p.weight[size_t(i)])));
      h.push_back((exact(R(p.sum[at])) - mean) * rstd);
      weight_sums[size_t(i)].add_product(dy, h.back());
      bias_sums[size_t(i)].add(dy);
    }
    const auto row_gradient = norm_row_gradient(g, h, rstd);
    for (int64_t i = 0; i < p.hidden; ++i) {
      dsum.push_back(row_gradient[size_t(i)]);
      if (p.p > 0) {
        dx.push_back(keeps(p.p, kSeed, p.site, 0, row, i) ? dsum.back() * keep : exact(R(0)));
      }
    }
  }
  line.compare("dsum", got[0], dsum);
  if (p.p > 0) line.compare("dx", got[1], dx);
  if (p.need_params) {
    for (int64_t i = 0; i < p.hidden; ++i) {
      dweight.push_back(weight_sums[size_t(i)].value());
      dbias.push_back(bias_sums[size_t(i)].value());
    }
    line.compare("dweight", got[2], dweight);
    line.compare("dbias", got[3], dbias);
  }
}

template <class T>
void run(TableRef table) {
  const std::vector<int64_t> edges = {1,  2,  3,  4,  5,  7,  8,   9,   15,  16,  17,  31, 32,
                                      33, 63, 64, 65, 96, 97, 127, 128, 129, 255, 256, 257};
  const std::vector<int64_t> small = {1, 2, 3, 5, 8, 9, 17};
  struct Sizes {
    int64_t rows, hidden;
    double p, offset;
  };
  std::vector<Sizes> cases = {{0, 8, 0, 0}, {0, 9, 0.1, 0}};
  Random random(14);
  for (size_t i = 0; i < edges.size(); i += options().quick ? 5 : 1) {
    for (const double p : {0.0, 0.1}) {
      cases.push_back({edges[i], random.pick(small), p, 0});
      cases.push_back({random.pick(small), edges[i], p, 0});
    }
  }
  // Rows whose mean is far larger than their spread: a one-pass variance would fail.
  cases.push_back({3, 64, 0, 300});
  cases.push_back({3, 65, 0, -3000});
  if (!options().quick) {
    cases.push_back({9, 768, 0, 0});
    cases.push_back({9, 1025, 0.1, 0});
    cases.push_back({513, 33, 0.5, 0});
    cases.push_back({1030, 7, 0, 0});
    cases.push_back({9, 33, 0.999, 0});
  }
  Random fuzz(options().seed);
  for (int64_t i = 0; i < options().fuzz; ++i) {
    cases.push_back({fuzz.between(0, 200), fuzz.between(1, 300),
                     fuzz.chance(0.5) ? fuzz.uniform() : 0, 10 * fuzz.normal()});
  }
  if (selected("layer_norm_forward")) {
    Line line(table, dtype_name<T>(), "layer_norm_forward");
    for (const Sizes& s : cases) {
      check_forward(line, table, make<T>(random, s.rows, s.hidden, s.p, s.offset));
    }
    // A constant row has variance 0: y is the bias, as eps keeps rstd finite.
    Problem<T> p = make<T>(random, 3, 33, 0);
    std::fill(p.x.begin(), p.x.end(), T(0.5));
    p.residual.clear();
    line.begin("constant rows: " + p.sizes());
    const std::vector<T> y = forward(table, p, 1)[0];
    for (int64_t row = 0; row < 3; ++row) {
      for (int64_t i = 0; i < 33; ++i) {
        const T value = y[size_t(row * 33 + i)];
        // rstd is 1 / sqrt(1e-5) = 316, and the mean may be off by its rounding.
        const double tolerance = 1e4 * std::numeric_limits<Arithmetic<T>>::epsilon() +
                                 (kIs16Bits<T> ? std::numeric_limits<T>::epsilon() : 0);
        CHECK(std::fabs(value - p.bias[size_t(i)]) <= tolerance, "y is %g, expected the bias %g",
              double(value), double(p.bias[size_t(i)]));
      }
    }
    // A NaN stays in its row.
    p = make<T>(random, 7, 33, 0);
    line.begin("NaN in row 3: " + p.sizes());
    const std::vector<T> clean = forward(table, p, 2)[0];
    p.x[3 * 33 + 32] = std::numeric_limits<T>::quiet_NaN();
    const std::vector<T> dirty = forward(table, p, 2)[0];
    CHECK(std::isnan(dirty[3 * 33]), "a NaN gave a number");
    line.same_bits("rows before a NaN", slice(clean, 0, 3 * 33), slice(dirty, 0, 3 * 33));
    line.same_bits("rows behind a NaN", slice(clean, 4 * 33, 3 * 33), slice(dirty, 4 * 33, 3 * 33));
  }
  if (selected("layer_norm_backward")) {
    Line line(table, dtype_name<T>(), "layer_norm_backward");
    for (const Sizes& s : cases) {
      check_backward(line, table, make<T>(random, s.rows, s.hidden, s.p, s.offset));
    }
  }
}

}  // namespace

void test_layer_norm(TableRef table) {
  for_types(table, [&](auto element) { run<decltype(element)>(table); });
}

}  // namespace test
