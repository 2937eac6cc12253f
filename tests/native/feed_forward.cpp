// feed_forward_forward and feed_forward_backward, and the same of table.bf16.
#include "bfloat16.h"
#include "packed.h"

namespace test {
namespace {

using xlmr::Activation;

template <class T>
struct Problem {
  int64_t rows, hidden, inner;
  Activation activation = Activation::gelu;
  int64_t gap = 0;
  std::vector<T> x, up, up_bias, down, down_bias, hidden_addend, addend;  // biases may be empty
  std::vector<T> pre, dy;                                                 // the backward's
  // The forward's pre; the backward's dx, dup, dup_bias, ddown, ddown_bias, dpre.
  bool need_pre = true;
  bool packed = false;  // the forward's weights
  bool need[6] = {true, true, true, true, true, true};
  Products products;

  std::string sizes() const {
    return text(
        "rows=%lld hidden=%lld inner=%lld activation=%d biases=%d%d addends=%d%d gap=%lld "
        "pre=%d need=%d%d%d%d%d%d packed=%d bf16=%d",
        (long long)rows, (long long)hidden, (long long)inner, int(activation),
        int(!up_bias.empty()), int(!down_bias.empty()), int(!hidden_addend.empty()),
        int(!addend.empty()), (long long)gap, int(need_pre), int(need[0]), int(need[1]),
        int(need[2]), int(need[3]), int(need[4]), int(need[5]), int(packed), int(products.bf16));
  }
};

template <class T>
Problem<T> make(Random& random, Products products, int64_t rows, int64_t hidden, int64_t inner,
                Activation activation) {
  Problem<T> p;
  p.products = products;
  p.rows = rows;
  p.hidden = hidden;
  p.inner = inner;
  p.activation = activation;
  p.gap = random.chance(0.5) ? random.between(1, 19) : 0;
  p.x = random.values<T>(rows * hidden);
  p.up = random.values<T>(inner * hidden, 0.5);
  p.down = random.values<T>(hidden * inner, 0.5);
  if (random.chance(0.7)) p.up_bias = random.values<T>(inner);
  if (random.chance(0.7)) p.down_bias = random.values<T>(hidden);
  if (random.chance(0.4)) p.hidden_addend = random.values<T>(rows * inner);
  if (random.chance(0.4)) p.addend = random.values<T>(rows * hidden);
  p.pre = random.values<T>(rows * inner, 2.0);
  p.dy = random.values<T>(rows * hidden);
  p.need_pre = random.chance(0.6);
  const bool all = random.chance(0.5);
  for (bool& need : p.need) need = all || random.chance(0.6);
  if (products.bf16) {
    // Packing must not change weights that the table reads as they are otherwise.
    prepare(!products.rounds || random.chance(0.5), {&p.up, &p.down});
    prepare(random.chance(0.5), {&p.x, &p.dy});
  }
  return p;
}

template <class T>
using Outputs = std::vector<std::vector<T>>;

// Outputs: y, pre (empty where it is not asked for).
template <class T>
Outputs<T> forward(TableRef table, const Problem<T>& p, int32_t threads) {
  const Guarded<T> x(p.x, p.rows, p.hidden, p.hidden + p.gap);
  const Guarded<T> up(p.up, p.inner, p.hidden);
  const Guarded<T> up_bias(p.up_bias, p.up_bias.empty() ? 0 : 1, p.inner);
  const Guarded<T> down(p.down, p.hidden, p.inner);
  const Guarded<T> down_bias(p.down_bias, p.down_bias.empty() ? 0 : 1, p.hidden);
  const Guarded<T> hidden_addend(p.hidden_addend, p.hidden_addend.empty() ? 0 : p.rows, p.inner,
                                 p.inner + 2 * p.gap);
  const Guarded<T> addend(p.addend, p.addend.empty() ? 0 : p.rows, p.hidden, p.hidden + 3 * p.gap);
  Guarded<T> y(p.rows, p.hidden);
  Guarded<T> pre(p.need_pre ? p.rows : 0, p.inner);
  std::deque<Packed<T>> packed;
  std::deque<PackedBf16> packed_bf16;
  const void *up_weight = up.data(), *down_weight = down.data();
  if (p.packed && p.products.bf16) {
    if constexpr (std::is_same_v<T, float>) {
      up_weight = packed_bf16.emplace_back(p.up, p.inner, p.hidden).data();
      down_weight = packed_bf16.emplace_back(p.down, p.hidden, p.inner).data();
    }
  } else if (p.packed) {
    up_weight = packed.emplace_back(table, p.up, p.inner, p.hidden, threads).data();
    down_weight = packed.emplace_back(table, p.down, p.hidden, p.inner, threads).data();
  }
  xlmr::FeedForwardForward args{};
  args.dtype = dtype_of<T>();
  args.activation = p.activation;
  args.rows = p.rows;
  args.hidden = p.hidden;
  args.inner = p.inner;
  args.x = x.data();
  args.x_stride = x.stride();
  args.packed = p.packed;
  args.up_weight = up_weight;
  args.up_bias = up_bias.data();
  args.down_weight = down_weight;
  args.down_bias = down_bias.data();
  args.hidden_addend = hidden_addend.data();
  args.hidden_addend_stride = hidden_addend.stride();
  args.addend = addend.data();
  args.addend_stride = addend.stride();
  args.y = y.data();
  args.pre = pre.data();
  run_op(p.products.bf16 ? table.bf16.feed_forward_forward : table.feed_forward_forward, args,
         threads);
  CHECK(x.intact() && up.intact() && down.intact() && up_bias.intact() && down_bias.intact() &&
            hidden_addend.intact() && addend.intact(),
        "an input was changed");
  for (const auto& buffer : packed) CHECK(buffer.intact(), "a packed weight was changed");
  for (const auto& buffer : packed_bf16) CHECK(buffer.intact(), "a packed weight was changed");
  CHECK(y.intact(), "y was written outside of its elements");
  CHECK(pre.intact(), "pre was written outside of its elements");
  return {y.values(), pre.values()};
}

// Outputs: dx, dup, dup_bias, ddown, ddown_bias, dpre (empty where not asked for).
template <class T>
Outputs<T> backward(TableRef table, const Problem<T>& p, int32_t threads) {
  const Guarded<T> dy(p.dy, p.rows, p.hidden, p.hidden + p.gap);
  const Guarded<T> x(p.x, p.rows, p.hidden, p.hidden + 2 * p.gap);
  const Guarded<T> up(p.up, p.inner, p.hidden);
  const Guarded<T> down(p.down, p.hidden, p.inner);
  const Guarded<T> pre(p.pre, p.rows, p.inner);
  const Guarded<T> dx(p.need[0] ? p.rows : 0, p.hidden);
  const Guarded<T> dup(p.need[1] ? p.inner : 0, p.hidden);
  const Guarded<T> dup_bias(p.need[2] ? 1 : 0, p.inner);
  const Guarded<T> ddown(p.need[3] ? p.hidden : 0, p.inner);
  const Guarded<T> ddown_bias(p.need[4] ? 1 : 0, p.hidden);
  const Guarded<T> dpre(p.need[5] ? p.rows : 0, p.inner);
  xlmr::FeedForwardBackward args{};
  args.dtype = dtype_of<T>();
  args.activation = p.activation;
  args.rows = p.rows;
  args.hidden = p.hidden;
  args.inner = p.inner;
  args.dy = dy.data();
  args.dy_stride = dy.stride();
  args.x = x.data();
  args.x_stride = x.stride();
  args.up_weight = up.data();
  args.down_weight = down.data();
  args.pre = pre.data();
  args.dx = dx.data();
  args.dup_weight = dup.data();
  args.dup_bias = dup_bias.data();
  args.ddown_weight = ddown.data();
  args.ddown_bias = ddown_bias.data();
  args.dpre = dpre.data();
  run_op(p.products.bf16 ? table.bf16.feed_forward_backward : table.feed_forward_backward, args,
         threads);
  CHECK(dy.intact() && x.intact() && up.intact() && down.intact() && pre.intact(),
        "an input was changed");
  Outputs<T> out;
  for (const Guarded<T>* buffer : {&dx, &dup, &dup_bias, &ddown, &ddown_bias, &dpre}) {
    CHECK(buffer->intact(), "output %zu was written outside of its elements", out.size());
    out.push_back(buffer->values());
  }
  return out;
}

template <class T>
void check_forward(Line& line, TableRef table, const Problem<T>& p) {
  using R = Wide<T>;
  line.begin(p.sizes());
  const Outputs<T> got =
      run_on_threads(line, [&](int32_t threads) { return forward(table, p, threads); });
  const std::vector<T> x = operands(p.x, p.products), up = operands(p.up, p.products),
                       down = operands(p.down, p.products);
  std::vector<Num<R>> pre, y;
  for (int64_t row = 0; row < p.rows; ++row) {
    std::vector<Num<R>> act;
    for (int64_t i = 0; i < p.inner; ++i) {
      Sum<R> sum;
      for (int64_t k = 0; k < p.hidden; ++k) {
        sum.add_product(R(x[size_t(row * p.hidden + k)]), R(up[size_t(i * p.hidden + k)]));
      }
      if (!p.up_bias.empty()) sum.add(exact(R(p.up_bias[size_t(i)])));
      if (!p.hidden_addend.empty()) {
        sum.add(exact(R(p.hidden_addend[size_t(row * p.inner + i)])));
      }
      pre.push_back(sum.value());
      act.push_back(operand(stored<T>(activate(p.activation, pre.back())), p.products));
    }
    for (int64_t h = 0; h < p.hidden; ++h) {
      Sum<R> sum;
      for (int64_t i = 0; i < p.inner; ++i) {
        sum.add_product(act[size_t(i)], exact(R(down[size_t(h * p.inner + i)])));
      }
      if (!p.down_bias.empty()) sum.add(exact(R(p.down_bias[size_t(h)])));
      if (!p.addend.empty()) sum.add(exact(R(p.addend[size_t(row * p.hidden + h)])));
      y.push_back(sum.value());
    }
  }
  line.compare("y", got[0], y);
  if (p.need_pre) line.compare("pre", got[1], pre);
  Problem<T> packed = p;
  packed.packed = true;
  const Outputs<T> from_packed =
      run_on_threads(line, [&](int32_t threads) { return forward(table, packed, threads); });
  line.same_bits("y of packed weights", from_packed[0], got[0]);
  line.same_bits("pre of packed weights", from_packed[1], got[1]);
  for (int64_t count : {int64_t(1), p.rows / 2}) {
    if (count == 0 || count >= p.rows) continue;
    const int64_t first = (p.rows - count) / 2;
    Problem<T> some = p;
    some.rows = count;
    some.x = slice(p.x, first * p.hidden, count * p.hidden);
    some.hidden_addend = slice(p.hidden_addend, first * p.inner, count * p.inner);
    some.addend = slice(p.addend, first * p.hidden, count * p.hidden);
    line.same_bits("rows taken out of the batch", forward(table, some, 1)[0],
                   slice(got[0], first * p.hidden, count * p.hidden));
  }
}

template <class T>
void check_backward(Line& line, TableRef table, const Problem<T>& p) {
  using R = Wide<T>;
  line.begin(p.sizes());
  const Outputs<T> got =
      run_on_threads(line, [&](int32_t threads) { return backward(table, p, threads); });
  const std::vector<T> x = operands(p.x, p.products), dy = operands(p.dy, p.products),
                       up = operands(p.up, p.products), down = operands(p.down, p.products);
  std::vector<Num<R>> act, dpre, factor, want;  // act, and factor of dpre, in the products
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t i = 0; i < p.inner; ++i) {
      const Num<R> pre = exact(R(p.pre[size_t(row * p.inner + i)]));
      act.push_back(operand(stored<T>(activate(p.activation, pre)), p.products));
      Sum<R> sum;
      for (int64_t h = 0; h < p.hidden; ++h) {
        sum.add_product(R(dy[size_t(row * p.hidden + h)]), R(down[size_t(h * p.inner + i)]));
      }
      dpre.push_back(stored<T>(sum.value() * activation_slope(p.activation, pre)));
      factor.push_back(operand(dpre.back(), p.products));
    }
  }
  if (p.need[0]) {
    for (int64_t row = 0; row < p.rows; ++row) {
      for (int64_t k = 0; k < p.hidden; ++k) {
        Sum<R> sum;
        for (int64_t i = 0; i < p.inner; ++i) {
          sum.add_product(factor[size_t(row * p.inner + i)],
                          exact(R(up[size_t(i * p.hidden + k)])));
        }
        want.push_back(sum.value());
      }
    }
    line.compare("dx", got[0], want);
  }
  if (p.need[1]) {
    want.clear();
    for (int64_t i = 0; i < p.inner; ++i) {
      for (int64_t k = 0; k < p.hidden; ++k) {
        Sum<R> sum;
        for (int64_t row = 0; row < p.rows; ++row) {
          sum.add_product(factor[size_t(row * p.inner + i)],
                          exact(R(x[size_t(row * p.hidden + k)])));
        }
        want.push_back(sum.value());
      }
    }
    line.compare("dup_weight", got[1], want);
  }
  if (p.need[2]) {
    want.clear();
    for (int64_t i = 0; i < p.inner; ++i) {
      Sum<R> sum;
      for (int64_t row = 0; row < p.rows; ++row) sum.add(dpre[size_t(row * p.inner + i)]);
      want.push_back(sum.value());
    }
    line.compare("dup_bias", got[2], want);
  }
  if (p.need[3]) {
    want.clear();
    for (int64_t h = 0; h < p.hidden; ++h) {
      for (int64_t i = 0; i < p.inner; ++i) {
        Sum<R> sum;
        for (int64_t row = 0; row < p.rows; ++row) {
          sum.add_product(exact(R(dy[size_t(row * p.hidden + h)])), act[size_t(row * p.inner + i)]);
        }
        want.push_back(sum.value());
      }
    }
    line.compare("ddown_weight", got[3], want);
  }
  if (p.need[4]) {
    want.clear();
    for (int64_t h = 0; h < p.hidden; ++h) {
      Sum<R> sum;
      for (int64_t row = 0; row < p.rows; ++row) {
        sum.add(exact(R(p.dy[size_t(row * p.hidden + h)])));
      }
      want.push_back(sum.value());
    }
    line.compare("ddown_bias", got[4], want);
  }
  if (p.need[5]) line.compare("dpre", got[5], dpre);
}

// The first and the last `rows` of many have the bits that they have among all, for every number of
// rows up to two register tiles: each is cut into tiles in its own way.
template <class T>
void check_row_counts(Line& line, TableRef table, Products products, Random& random,
                      Activation activation) {
  // Tiles of bfloat16 have 32 rows, no other more than 13.
  const int64_t most = products.bf16 ? 67 : 27;
  Problem<T> p = make<T>(random, products, most, 33, 37, activation);
  line.begin("every number of rows: " + p.sizes());
  const std::vector<T> all = forward(table, p, 2)[0];
  for (int64_t rows = 1; rows < most; ++rows) {
    for (const int64_t first : {int64_t(0), most - rows}) {
      Problem<T> some = p;
      some.rows = rows;
      some.packed = rows % 2 == 0;
      some.x = slice(p.x, first * p.hidden, rows * p.hidden);
      some.hidden_addend = slice(p.hidden_addend, first * p.inner, rows * p.inner);
      some.addend = slice(p.addend, first * p.hidden, rows * p.hidden);
      line.same_bits(
          text("rows %lld and following %lld", (long long)first, (long long)rows).c_str(),
          forward(table, some, 1)[0], slice(all, first * p.hidden, rows * p.hidden));
    }
  }
}

// The activation over its whole range, through layers that pass numbers on unchanged; forward the
// value, backward (dpre with dy = 1) the slope. With flush to zero on, too.
template <class T>
void check_range(Line& line, TableRef table, Products products, Activation activation, bool slope) {
  using R = Wide<T>;
  Problem<T> p;
  p.products = products;
  p.hidden = p.inner = 1;
  p.activation = activation;
  p.up = p.down = {T(1)};
  for (double x = 1e-30; x < 40; x *= options().quick ? 1.5 : 1.004) {
    p.x.push_back(T(x));
    p.x.push_back(T(-x));
  }
  p.x.push_back(T(0));
  p.pre = p.x;
  p.rows = int64_t(p.x.size());
  p.dy.assign(p.x.size(), T(1));
  line.begin(text("activation=%d over its range", int(activation)));
  std::vector<Num<R>> want;
  for (T x : slope ? p.pre : operands(p.x, products)) {
    want.push_back(slope ? activation_slope(activation, exact(R(x)))
                         : operand(activate(activation, exact(R(x))), products));
  }
  for (const bool flush : {false, true}) {
    set_flush_to_zero(flush);
    const Outputs<T> got = slope ? backward(table, p, 2) : forward(table, p, 2);
    set_flush_to_zero(false);
    line.compare(flush ? "with flush to zero" : "value", slope ? got[5] : got[0], want);
  }
}

// A NaN in x reaches the outputs of its own row and no other.
template <class T>
void check_nan(Line& line, TableRef table, Products products, Random& random,
               Activation activation) {
  Problem<T> p = make<T>(random, products, 13, 17, 35, activation);
  line.begin("NaN in row 6: " + p.sizes());
  const std::vector<T> clean = forward(table, p, 2)[0];
  p.x[6 * 17 + 16] = std::numeric_limits<T>::quiet_NaN();
  const std::vector<T> dirty = forward(table, p, 2)[0];
  bool all_nan = true;
  for (int64_t h = 0; h < 17; ++h) all_nan = all_nan && std::isnan(dirty[size_t(6 * 17 + h)]);
  CHECK(all_nan, "a NaN in x did not reach every output of its row");
  line.same_bits("rows before a NaN", slice(clean, 0, 6 * 17), slice(dirty, 0, 6 * 17));
  line.same_bits("rows behind a NaN", slice(clean, 7 * 17, 6 * 17), slice(dirty, 7 * 17, 6 * 17));
}

template <class T>
void run(TableRef table, Products products) {
  const std::vector<Activation> activations = {Activation::gelu, Activation::gelu_tanh,
                                               Activation::relu};
  const std::vector<int64_t> edges = {0,  1,  2,  3,  4,  5,  6,  7,  8,   9,   12,
                                      13, 15, 16, 17, 23, 24, 25, 31, 32,  33,  47,
                                      48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129};
  const std::vector<int64_t> small = {1, 2, 3, 5, 7, 8, 9, 16, 17, 31, 33};
  struct Sizes {
    int64_t rows, hidden, inner;
  };
  std::vector<Sizes> cases;
  Random random(12);
  for (size_t i = 0; i < edges.size(); i += options().quick ? 6 : 1) {
    const int64_t edge = edges[i];
    cases.push_back({edge, random.pick(small), random.pick(small)});
    if (edge == 0) continue;
    cases.push_back({random.pick(small), edge, random.pick(small)});
    cases.push_back({random.pick(small), random.pick(small), edge});
  }
  if (!options().quick) {
    for (int64_t k : {255, 256, 257, 384, 385, 511, 512, 513}) {
      cases.push_back({5, k, 9});
      cases.push_back({k, 9, 5});
      cases.push_back({9, 5, k});
    }
    cases.push_back({67, 48, 195});
    cases.push_back({131, 33, 130});
    cases.push_back({1540, 7, 9});                        // more rows than go through at once
    if (kIs16Bits<T>) cases.push_back({1400, 24, 1530});  // of large tiles
  }
  Random fuzz(options().seed);
  for (int64_t i = 0; i < options().fuzz; ++i) {
    cases.push_back({fuzz.between(0, 120), fuzz.between(1, 100), fuzz.between(1, 150)});
  }
  const auto problem = [&](size_t i) {
    const Sizes& s = cases[i];
    return make<T>(random, products, s.rows, s.hidden, s.inner, activations[i % 3]);
  };
  const char* name = products.bf16 ? "feed_forward_bf16_forward" : "feed_forward_forward";
  if (selected(name)) {
    Line line(table, dtype_name<T>(), name);
    for (size_t i = 0; i < cases.size(); ++i) check_forward(line, table, problem(i));
    for (Activation activation : activations) {
      check_range<T>(line, table, products, activation, false);
      check_row_counts<T>(line, table, products, random, activation);
      check_nan<T>(line, table, products, random, activation);
    }
  }
  name = products.bf16 ? "feed_forward_bf16_backward" : "feed_forward_backward";
  if (selected(name) && (!products.bf16 || products.rounds)) {
    Line line(table, dtype_name<T>(), name);
    for (size_t i = 0; i < cases.size(); ++i) check_backward(line, table, problem(i));
    for (Activation activation : activations) {
      check_range<T>(line, table, products, activation, true);
    }
  }
}

}  // namespace

void test_feed_forward(TableRef table) {
  for_types(table, [&](auto element) { run<decltype(element)>(table, {}); });
}

void test_feed_forward_bf16(TableRef table) { run<float>(table, bf16_products(table)); }

}  // namespace test
