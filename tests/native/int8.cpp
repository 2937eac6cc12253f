// Linear and feed-forward over 8-bit weights against plain loops: the same integers and, but for
// tanh and GELU, the same bits on every table.
#include "packed.h"

namespace test {
namespace {

using xlmr::Activation;

struct QuantizedRow {
  std::vector<int32_t> q;
  float scale, centre;
};

// As ops.h defines it, in its order of roundings.
QuantizedRow quantize(const float* x, int64_t k) {
  float highest = x[0], lowest = x[0];
  bool finite = true;
  for (int64_t i = 0; i < k; ++i) {
    finite = finite && std::isfinite(x[i]);
    highest = std::fmax(highest, x[i]);
    lowest = std::fmin(lowest, x[i]);
  }
  QuantizedRow row{std::vector<int32_t>(size_t(k), 0), 0.0f, 0.0f};
  if (!finite) {
    row.scale = std::numeric_limits<float>::quiet_NaN();
    return row;
  }
  row.centre = 0.5f * highest + 0.5f * lowest;
  const float range = 0.5f * highest - 0.5f * lowest;
  if (range < 0x1p-100f) return row;
  const float factor = 127.0f / range;
  row.scale = range / 127.0f;
  int32_t most = 0;
  for (int64_t i = 0; i < k; ++i) {
    const float off = x[i] - row.centre;
    row.q[size_t(i)] = int32_t(std::lrint(off * factor));
    most = std::max(most, std::abs(row.q[size_t(i)]));
  }
  CHECK(most <= 127, "%d is no 8-bit step", most);
  return row;
}

int64_t dot(const QuantizedRow& row, const Int8Values& w, int64_t channel) {
  int64_t sum = 0;
  const int8_t* q = w.q.data() + channel * w.in;
  for (int64_t k = 0; k < w.in; ++k) sum += row.q[size_t(k)] * q[k];
  return sum;
}

// Of a channel's q, over k.
std::vector<float> sums_of(const Int8Values& w) {
  std::vector<float> sums;
  for (int64_t o = 0; o < w.out; ++o) {
    int32_t sum = 0;
    for (int64_t k = 0; k < w.in; ++k) sum += w.q[size_t(o * w.in + k)];
    sums.push_back(float(sum));
  }
  return sums;
}

// x [rows, in] W^T + bias + addend; the last two may be empty.
std::vector<float> product(const std::vector<float>& x, const Int8Values& w,
                           const std::vector<float>& bias, const std::vector<float>& addend) {
  std::vector<float> y;
  const std::vector<float> sums = sums_of(w);
  const int64_t rows = int64_t(x.size()) / w.in;
  for (int64_t row = 0; row < rows; ++row) {
    const QuantizedRow quantized_row = quantize(x.data() + row * w.in, w.in);
    for (int64_t o = 0; o < w.out; ++o) {
      const float scale = w.scale[size_t(o)], sum = scale * sums[size_t(o)];
      const float moving = float(int32_t(dot(quantized_row, w, o))) * (quantized_row.scale * scale);
      const float still = quantized_row.centre * sum;
      float v = moving + still;
      if (!bias.empty()) v = v + bias[size_t(o)];
      if (!addend.empty()) v = v + addend[size_t(row * w.out + o)];
      y.push_back(v);
    }
  }
  return y;
}

// The same bits, or NaN both.
void check_same(Line& line, const char* what, std::vector<float> got,
                const std::vector<float>& want) {
  for (size_t i = 0; i < got.size() && i < want.size(); ++i) {
    if (std::isnan(got[i]) && std::isnan(want[i])) got[i] = want[i];
  }
  line.same_bits(what, got, want);
}

// --- Linear --------------------------------------------------------------------------------------

struct Linear {
  int64_t rows;
  Int8Values w;
  std::vector<float> x, bias, addend;  // the last two may be empty
  Activation activation = Activation::none;
  int64_t gap = 0;

  std::string sizes() const {
    return text("rows=%lld in=%lld out=%lld activation=%d bias=%d addend=%d gap=%lld",
                (long long)rows, (long long)w.in, (long long)w.out, int(activation),
                int(!bias.empty()), int(!addend.empty()), (long long)gap);
  }
};

// Weights of all sizes, among them the largest and rows of zeros; x with rows of any size, too.
Linear make_linear(Random& random, int64_t rows, int64_t in, int64_t out) {
  Linear p;
  p.rows = rows;
  p.w = {out, in, {}, {}};
  for (int64_t o = 0; o < out; ++o) {
    const int64_t kind = random.between(0, 5);
    for (int64_t k = 0; k < in; ++k) {
      const int64_t q = kind == 0   ? 0
                        : kind == 1 ? (random.chance(0.5) ? 127 : -127)
                        : kind == 2 ? 127
                                    : random.between(-127, 127);
      p.w.q.push_back(int8_t(q));
    }
    p.w.scale.push_back(kind == 0 ? 0.0f : float(0.001 + random.uniform()));
  }
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t kind = random.between(0, 11);
    for (int64_t k = 0; k < in; ++k) {
      const double value = kind == 0   ? 0.0
                           : kind == 1 ? (random.chance(0.5) ? 3.0 : -3.0)
                           : kind == 2 ? -2.5
                           : kind == 3 ? random.normal() * 1e-41
                           : kind == 4 ? random.normal() * 1e30
                           : kind == 5 ? 50 + random.normal()
                           : kind == 6 ? -random.uniform()
                           : kind == 7 ? (random.chance(0.5) ? 3.4e38 : -3.4e38)
                                       : random.normal();
      p.x.push_back(float(value));
    }
  }
  if (random.chance(0.7)) p.bias = random.values<float>(out);
  if (random.chance(0.4)) p.addend = random.values<float>(rows * out);
  p.gap = random.chance(0.5) ? random.between(1, 19) : 0;
  return p;
}

std::vector<float> forward(TableRef table, const Linear& p, int32_t threads) {
  const Guarded<float> x(p.x, p.rows, p.w.in, p.w.in + p.gap);
  const PackedInt8 weight(p.w);
  const Guarded<float> bias(p.bias, p.bias.empty() ? 0 : 1, p.w.out);
  const Guarded<float> addend(p.addend, p.addend.empty() ? 0 : p.rows, p.w.out,
                              p.w.out + 2 * p.gap);
  Guarded<float> y(p.rows, p.w.out, p.w.out + 3 * p.gap);
  xlmr::LinearInt8Forward args{};
  args.activation = p.activation;
  args.rows = p.rows;
  args.in_features = p.w.in;
  args.out_features = p.w.out;
  args.x = x.data();
  args.x_stride = x.stride();
  args.weight = weight.data();
  args.bias = bias.data();
  args.addend = addend.data();
  args.addend_stride = addend.stride();
  args.y = y.data();
  args.y_stride = y.stride();
  run_op(table.int8.linear_forward, args, threads);
  CHECK(x.intact() && weight.intact() && bias.intact() && addend.intact(), "an input was changed");
  CHECK(y.intact(), "y was written outside of its elements");
  return y.values();
}

void check_linear(Line& line, TableRef table, Linear p) {
  line.begin(p.sizes());
  const auto run = [&](int32_t threads) {
    return std::vector<std::vector<float>>{forward(table, p, threads)};
  };
  const std::vector<float> want = product(p.x, p.w, p.bias, p.addend);
  check_same(line, "y", run_on_threads(line, run)[0], want);
  p.activation = Activation::tanh;
  line.begin(p.sizes());
  std::vector<Num<double>> after;
  for (const float z : want) after.push_back(activate(Activation::tanh, exact(double(z))));
  line.compare("tanh y", run_on_threads(line, run)[0], after);
}

// A row with NaN or infinity is NaN; the others do not notice.
void check_strange_rows(Line& line, TableRef table, Random& random) {
  Linear p = make_linear(random, 14, 21, 19);
  constexpr float infinity = std::numeric_limits<float>::infinity();
  p.x[2 * 21 + 20] = std::numeric_limits<float>::quiet_NaN();
  p.x[5 * 21] = infinity;
  p.x[13 * 21 + 7] = -infinity;
  p.x[13 * 21 + 8] = std::numeric_limits<float>::quiet_NaN();
  line.begin("rows with NaN and infinity");
  const std::vector<float> y = forward(table, p, 2);
  check_same(line, "y", y, product(p.x, p.w, p.bias, p.addend));
  for (const int64_t row : {2, 5, 13}) {
    for (int64_t o = 0; o < 19; ++o) {
      CHECK(std::isnan(y[size_t(row * 19 + o)]), "row %lld is not NaN", (long long)row);
    }
  }
}

void run_linear(TableRef table) {
  if (!selected("linear_int8")) return;
  Line line(table, "int8", "linear_int8");
  Random random(31);
  const std::vector<int64_t> rows = {0, 1, 2, 3, 5, 6, 7, 8, 11, 12, 13, 17, 24, 25, 37};
  const std::vector<int64_t> ins = {1, 3, 4, 5, 8, 15, 16, 17, 33, 64, 131};
  const std::vector<int64_t> outs = {1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 95, 97};
  size_t turn = 0;
  for (const int64_t in : ins) {
    for (const int64_t out : outs) {
      if (++turn % (options().quick ? 13 : 1) != 0) continue;
      check_linear(line, table, make_linear(random, rows[turn % rows.size()], in, out));
    }
  }
  check_strange_rows(line, table, random);
  if (!options().quick) {
    check_linear(line, table, make_linear(random, 150, 77, 130));
    // Several tasks of rows.
    check_linear(line, table, make_linear(random, 211, 5000, 21));
    // The most steps, every value the largest: the sums reach 127 * 127 * 2^17. Rows in two chunks.
    Linear p = make_linear(random, 67, xlmr::kInt8MaxFeatures, 3);
    for (int64_t k = 0; k < p.w.in; ++k) {
      p.w.q[size_t(k)] = 127;
      p.w.q[size_t(p.w.in + k)] = -127;
      p.x[size_t(k)] = -1.0f;
      p.x[size_t(p.w.in + k)] = 1.0f;
    }
    check_linear(line, table, p);
  }
  Random fuzz(options().seed);
  for (int64_t i = 0; i < options().fuzz; ++i) {
    check_linear(
        line, table,
        make_linear(fuzz, fuzz.between(0, 60), fuzz.between(1, 200), fuzz.between(1, 120)));
  }
}

// --- Feed-forward --------------------------------------------------------------------------------

struct FeedForward {
  int64_t rows;
  Int8Values up, down;
  std::vector<float> x, up_bias, down_bias, addend;  // all but x may be empty
  Activation activation;
  int64_t gap = 0;

  std::string sizes() const {
    return text("rows=%lld hidden=%lld inner=%lld activation=%d biases=%d%d addend=%d gap=%lld",
                (long long)rows, (long long)up.in, (long long)up.out, int(activation),
                int(!up_bias.empty()), int(!down_bias.empty()), int(!addend.empty()),
                (long long)gap);
  }
};

FeedForward make_feed_forward(Random& random, int64_t rows, int64_t hidden, int64_t inner,
                              Activation activation) {
  FeedForward p;
  p.rows = rows;
  p.activation = activation;
  p.up = quantized(random.values<float>(inner * hidden, 1.5 / std::sqrt(double(hidden))), inner,
                   hidden);
  p.down = quantized(random.values<float>(hidden * inner), hidden, inner);
  p.x = random.values<float>(rows * hidden);
  if (random.chance(0.7)) p.up_bias = random.values<float>(inner, 0.5);
  if (random.chance(0.7)) p.down_bias = random.values<float>(hidden);
  if (random.chance(0.5)) p.addend = random.values<float>(rows * hidden);
  p.gap = random.chance(0.5) ? random.between(1, 19) : 0;
  return p;
}

std::vector<float> forward(TableRef table, const FeedForward& p, int32_t threads) {
  const int64_t hidden = p.up.in, inner = p.up.out;
  const Guarded<float> x(p.x, p.rows, hidden, hidden + p.gap);
  const PackedInt8 up(p.up), down(p.down);
  const Guarded<float> up_bias(p.up_bias, p.up_bias.empty() ? 0 : 1, inner);
  const Guarded<float> down_bias(p.down_bias, p.down_bias.empty() ? 0 : 1, hidden);
  const Guarded<float> addend(p.addend, p.addend.empty() ? 0 : p.rows, hidden, hidden + 2 * p.gap);
  Guarded<float> y(p.rows, hidden);
  xlmr::FeedForwardInt8Forward args{};
  args.activation = p.activation;
  args.rows = p.rows;
  args.hidden = hidden;
  args.inner = inner;
  args.x = x.data();
  args.x_stride = x.stride();
  args.up_weight = up.data();
  args.up_bias = up_bias.data();
  args.down_weight = down.data();
  args.down_bias = down_bias.data();
  args.addend = addend.data();
  args.addend_stride = addend.stride();
  args.y = y.data();
  run_op(table.int8.feed_forward_forward, args, threads);
  CHECK(x.intact() && up.intact() && down.intact() && up_bias.intact() && down_bias.intact() &&
            addend.intact(),
        "an input was changed");
  CHECK(y.intact(), "y was written outside of its elements");
  return y.values();
}

// The second product of activations that are known up to their error: a value so near to a half
// that its rounding is open may be a step off.
std::vector<Num<double>> second_product(const FeedForward& p,
                                        const std::vector<Num<double>>& hidden) {
  constexpr double unit = std::numeric_limits<float>::epsilon() / 2;
  std::vector<Num<double>> y;
  const std::vector<float> sums = sums_of(p.down);
  const int64_t inner = p.down.in;
  for (int64_t row = 0; row < p.rows; ++row) {
    const Num<double>* h = hidden.data() + row * inner;
    double highest = h[0].v, lowest = h[0].v, error = 0;
    for (int64_t k = 0; k < inner; ++k) {
      highest = std::fmax(highest, h[k].v);
      lowest = std::fmin(lowest, h[k].v);
      error = std::fmax(error, h[k].e * unit);
    }
    const double centre = highest / 2 + lowest / 2, range = highest / 2 - lowest / 2;
    const double scale = range / 127;
    // Of the centre and of half the range, from their extremes and from three roundings.
    const double shift = error + 3 * unit * std::fmax(std::fabs(highest), std::fabs(lowest));
    const double relative = range > 0 ? shift / range + 3 * unit : 0;
    QuantizedRow quantized_row{{}, 0, 0};
    std::vector<double> steps;  // by which a value may be off
    for (int64_t k = 0; k < inner; ++k) {
      const double value = range > 0 ? (h[k].v - centre) / scale : 0;
      const double off =
          range > 0 ? (h[k].e * unit + shift) / scale + std::fabs(value) * 2 * relative : 0;
      quantized_row.q.push_back(int32_t(std::lrint(value)));
      steps.push_back(std::ceil(off - (0.5 - std::fabs(value - std::rint(value)))));
    }
    for (int64_t o = 0; o < p.down.out; ++o) {
      double slack = 0;
      for (int64_t k = 0; k < inner; ++k) {
        slack += std::fmax(steps[size_t(k)], 0) * std::abs(int(p.down.q[size_t(o * inner + k)]));
      }
      const double channel = double(p.down.scale[size_t(o)]), factor = scale * channel;
      const double moving = double(dot(quantized_row, p.down, o)) * factor;
      const double total = double(sums[size_t(o)]) * channel, still = centre * total;
      const double size = std::fabs(moving) + std::fabs(still);
      Num<double> sum{
          moving + still,
          (slack * factor + std::fabs(moving) * relative + shift * std::fabs(total)) / unit +
              5 * size};
      if (!p.down_bias.empty()) sum = sum + exact(double(p.down_bias[size_t(o)]));
      if (!p.addend.empty()) sum = sum + exact(double(p.addend[size_t(row * p.down.out + o)]));
      y.push_back(sum);
    }
  }
  return y;
}

void check_feed_forward(Line& line, TableRef table, const FeedForward& p) {
  line.begin(p.sizes());
  const std::vector<float> got = run_on_threads(line, [&](int32_t threads) {
    return std::vector<std::vector<float>>{forward(table, p, threads)};
  })[0];
  std::vector<float> pre = product(p.x, p.up, p.up_bias, {});
  if (p.activation == Activation::relu) {
    for (float& z : pre) z = z > 0 ? z : 0;
    check_same(line, "y", got, product(pre, p.down, p.down_bias, p.addend));
  } else {
    std::vector<Num<double>> hidden;
    for (const float z : pre) hidden.push_back(activate(p.activation, exact(double(z))));
    line.compare("y", got, second_product(p, hidden));
  }
  // A row alone.
  if (p.rows < 2) return;
  FeedForward alone = p;
  const int64_t row = p.rows / 2, width = p.up.in;
  alone.rows = 1;
  alone.x = slice(p.x, row * width, width);
  if (!p.addend.empty()) alone.addend = slice(p.addend, row * width, width);
  line.same_bits("a row alone", forward(table, alone, 1), slice(got, row * width, width));
}

void run_feed_forward(TableRef table) {
  if (!selected("feed_forward_int8")) return;
  Line line(table, "int8", "feed_forward_int8");
  Random random(32);
  const std::vector<int64_t> rows = {0, 1, 2, 5, 6, 7, 12, 13, 16, 25};
  const std::vector<int64_t> sizes = {1, 3, 4, 15, 16, 17, 31, 33, 48, 65};
  size_t turn = 0;
  for (const Activation activation : {Activation::gelu, Activation::gelu_tanh, Activation::relu}) {
    for (const int64_t hidden : sizes) {
      for (const int64_t inner : sizes) {
        if (++turn % (options().quick ? 29 : 3) != 0) continue;
        check_feed_forward(
            line, table,
            make_feed_forward(random, rows[turn % rows.size()], hidden, inner, activation));
      }
    }
    // More rows than go through at once.
    if (!options().quick) {
      check_feed_forward(line, table, make_feed_forward(random, 261, 24, 100, activation));
    }
  }
  Random fuzz(options().seed);
  for (int64_t i = 0; i < options().fuzz; ++i) {
    check_feed_forward(
        line, table,
        make_feed_forward(fuzz, fuzz.between(0, 40), fuzz.between(1, 90), fuzz.between(1, 130),
                          fuzz.pick(std::vector<Activation>{Activation::gelu, Activation::relu})));
  }
}

// --- Layout --------------------------------------------------------------------------------------

void check_layout(Random& random, int64_t out, int64_t in) {
  tally().context =
      text("the layout of int8 weights, out=%lld in=%lld", (long long)out, (long long)in);
  const Int8Values w = make_linear(random, 0, in, out).w;
  const PackedInt8 packed(w);
  const int64_t channels = (out + 15) / 16 * 16, depth = (in + 3) / 4 * 4;
  const auto* bytes = reinterpret_cast<const int8_t*>(packed.values().data());
  CHECK(int64_t(packed.values().size()) == channels * depth / 4 + 2 * channels, "size");
  for (int64_t o = 0; o < channels; ++o) {
    int32_t sum = 0;
    for (int64_t k = 0; k < depth; ++k) {
      const int8_t want = o < out && k < in ? w.q[size_t(o * in + k)] : int8_t(0);
      const int64_t at = ((o / 16 * (depth / 4) + k / 4) * 16 + o % 16) * 4 + k % 4;
      CHECK(bytes[at] == want, "weight %lld, %lld", (long long)o, (long long)k);
      sum += want;
    }
    float scale = -1;
    int32_t got = -1;
    std::memcpy(&scale, bytes + channels * depth + 4 * o, 4);
    std::memcpy(&got, bytes + channels * depth + 4 * channels + 4 * o, 4);
    CHECK(scale == (o < out ? w.scale[size_t(o)] : 0.0f), "scale %lld", (long long)o);
    CHECK(got == sum, "sum %lld", (long long)o);
  }
}

void check_layout_size() {
  tally().context = "packed_int8_bytes";
  const std::vector<int64_t> sizes = sizes_up_to_overflow({1, 3, 4, 5, 15, 16, 17, 100});
  for (const int64_t out : sizes) {
    for (const int64_t in : sizes) {
      const __int128 exact_bytes =
          (__int128(out) + 15) / 16 * 16 * ((__int128(in) + 3) / 4 * 4 + 8);
      const bool fits = exact_bytes <= std::numeric_limits<int64_t>::max();
      const int64_t bytes = xlmr::packed_int8_bytes(out, in);
      if (!CHECK(bytes == (fits ? int64_t(exact_bytes) : -1), "[%lld, %lld] takes %lld",
                 (long long)out, (long long)in, (long long)bytes)) {
        return;
      }
    }
  }
}

}  // namespace

void test_int8_layout() {
  if (!selected("int8_layout")) return;
  check_layout_size();
  Random random(30);
  for (const int64_t out : {1, 15, 16, 17, 33}) {
    for (const int64_t in : {1, 3, 4, 5, 64, 67}) check_layout(random, out, in);
  }
  std::printf("int8_layout: sizes, weights, scales, sums\n");
}

void test_int8(TableRef table) {
  if (emulates_cuda(table)) {
    const char* want = "8-bit products run on the CPU only";
    const xlmr::ExecContext context;
    tally().context = "8-bit products on CUDA";
    CHECK(table.int8.linear_forward.run({}, context) == std::string(want), "linear ran");
    CHECK(table.int8.feed_forward_forward.run({}, context) == std::string(want),
          "feed-forward ran");
    std::printf("%-10s int8     not run: %s\n", table.name, want);
    return;
  }
  run_linear(table);
  run_feed_forward(table);
}

}  // namespace test
