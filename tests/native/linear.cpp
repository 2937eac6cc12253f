// linear_forward and linear_backward, and the same of table.bf16.
#include "bfloat16.h"
#include "packed.h"

namespace test {
namespace {

using xlmr::Activation;

template <class T>
struct Problem {
  int64_t rows, in, out, parts;
  Activation activation = Activation::none;
  bool interleaved = false;  // the parts of y (or dy) are column blocks of one buffer
  int64_t gap = 0;           // what strides have beyond the width
  std::vector<T> x, weight[3], bias[3], addend;  // bias and addend may be empty
  std::vector<T> dy[3], y;                       // the backward's
  bool need_x = true, need_weight = true, need_bias = true;
  bool packed = false;  // the forward's weights
  Products products;

  std::string sizes() const {
    return text(
        "rows=%lld in=%lld out=%lld parts=%lld activation=%d bias=%d addend=%d "
        "interleaved=%d gap=%lld need=%d%d%d packed=%d bf16=%d",
        (long long)rows, (long long)in, (long long)out, (long long)parts, int(activation),
        int(!bias[0].empty()), int(!addend.empty()), int(interleaved), (long long)gap, int(need_x),
        int(need_weight), int(need_bias), int(packed), int(products.bf16));
  }
};

template <class T>
Problem<T> make(Random& random, Products products, int64_t rows, int64_t in, int64_t out,
                int64_t parts) {
  Problem<T> p;
  p.products = products;
  p.rows = rows;
  p.in = in;
  p.out = out;
  p.parts = parts;
  p.interleaved = random.chance(0.5);
  p.gap = random.chance(0.5) ? random.between(1, 19) : 0;
  p.x = random.values<T>(rows * in);
  const bool bias = random.chance(0.7);
  for (int64_t part = 0; part < parts; ++part) {
    p.weight[part] = random.values<T>(out * in, 0.5);
    if (bias) p.bias[part] = random.values<T>(out);
    p.dy[part] = random.values<T>(rows * out);
  }
  if (parts == 1) {
    if (random.chance(0.5)) p.addend = random.values<T>(rows * out);
    if (random.chance(0.4)) p.activation = Activation::tanh;
  }
  if (p.activation == Activation::tanh) {
    p.y = random.values<T>(rows * out);
    for (T& value : p.y) value = std::tanh(value);
  }
  p.need_x = random.chance(0.8);
  p.need_weight = random.chance(0.8);
  p.need_bias = random.chance(0.8);
  if (products.bf16) {
    // Packing must not change weights that the table reads as they are otherwise.
    prepare(!products.rounds || random.chance(0.5), {&p.weight[0], &p.weight[1], &p.weight[2]});
    prepare(random.chance(0.5), {&p.x, &p.dy[0], &p.dy[1], &p.dy[2]});
  }
  return p;
}

// The buffers of the parts: apart, or column blocks of one.
template <class T>
struct Parts {
  std::deque<Guarded<T>> buffers;
  T* pointer[3] = {};
  int64_t stride = 0;
  int64_t parts, out;
  bool interleaved;

  Parts(const Problem<T>& p, const std::vector<T>* values)
      : parts(p.parts), out(p.out), interleaved(p.interleaved) {
    const int64_t width = interleaved ? parts * out : out;
    stride = width + p.gap;
    const int64_t count = interleaved ? 1 : parts;
    for (int64_t b = 0; b < count; ++b) {
      if (values == nullptr) {
        buffers.emplace_back(p.rows, width, stride);
      } else if (!interleaved) {
        buffers.emplace_back(values[b], p.rows, width, stride);
      } else {
        std::vector<T> joined(size_t(p.rows * width));
        for (int64_t part = 0; part < parts; ++part) {
          for (int64_t i = 0; i < p.rows * out; ++i) {
            joined[size_t(i / out * width + part * out + i % out)] = values[part][size_t(i)];
          }
        }
        buffers.emplace_back(joined, p.rows, width, stride);
      }
    }
    for (int64_t part = 0; part < parts; ++part) {
      T* base = buffers[size_t(interleaved ? 0 : part)].data();
      pointer[part] = interleaved && base != nullptr ? base + part * out : base;
    }
  }
  std::vector<T> values(int64_t part) const {
    return interleaved ? buffers[0].columns(part * out, out) : buffers[size_t(part)].values();
  }
  bool intact() const {
    for (const auto& buffer : buffers) {
      if (!buffer.intact()) return false;
    }
    return true;
  }
};

template <class T>
using Outputs = std::vector<std::vector<T>>;

template <class T>
Outputs<T> forward(TableRef table, const Problem<T>& p, int32_t threads) {
  const Guarded<T> x(p.x, p.rows, p.in, p.in + p.gap);
  std::deque<Guarded<T>> weights, biases;
  std::deque<Packed<T>> packed;
  std::deque<PackedBf16> packed_bf16;
  const Guarded<T> addend(p.addend, p.addend.empty() ? 0 : p.rows, p.out, p.out + 2 * p.gap);
  const Parts<T> y(p, nullptr);
  xlmr::LinearForward args{};
  args.dtype = dtype_of<T>();
  args.activation = p.activation;
  args.rows = p.rows;
  args.in_features = p.in;
  args.out_features = p.out;
  args.parts = p.parts;
  args.x = x.data();
  args.x_stride = x.stride();
  args.packed = p.packed;
  for (int64_t part = 0; part < p.parts; ++part) {
    if (p.packed && p.products.bf16) {
      if constexpr (std::is_same_v<T, float>) {
        args.weight[part] = packed_bf16.emplace_back(p.weight[part], p.out, p.in).data();
      }
    } else if (p.packed) {
      packed.emplace_back(table, p.weight[part], p.out, p.in, threads);
      args.weight[part] = packed.back().data();
    } else {
      weights.emplace_back(p.weight[part], p.out, p.in);
      args.weight[part] = weights.back().data();
    }
    if (!p.bias[part].empty()) {
      biases.emplace_back(p.bias[part], 1, p.out);
      args.bias[part] = biases.back().data();
    }
    args.y[part] = y.pointer[part];
  }
  args.addend = addend.data();
  args.addend_stride = addend.stride();
  args.y_stride = y.stride;
  run_op(p.products.bf16 ? table.bf16.linear_forward : table.linear_forward, args, threads);
  CHECK(x.intact() && addend.intact(), "an input was changed");
  CHECK(y.intact(), "y was written outside of its elements");
  for (const auto& buffer : weights) CHECK(buffer.intact(), "a weight was changed");
  for (const auto& buffer : packed) CHECK(buffer.intact(), "a packed weight was changed");
  for (const auto& buffer : packed_bf16) CHECK(buffer.intact(), "a packed weight was changed");
  for (const auto& buffer : biases) CHECK(buffer.intact(), "a bias was changed");
  Outputs<T> out;
  for (int64_t part = 0; part < p.parts; ++part) out.push_back(y.values(part));
  return out;
}

// Outputs in the order dx, dweight x 3, dbias x 3, dz.
template <class T>
Outputs<T> backward(TableRef table, const Problem<T>& p, int32_t threads) {
  const bool is_tanh = p.activation == Activation::tanh;
  const Guarded<T> x(p.x, p.need_weight ? p.rows : 0, p.in, p.in + p.gap);
  const Parts<T> dy(p, p.dy);
  const Guarded<T> y(p.y, is_tanh ? p.rows : 0, p.out);
  Guarded<T> dx(p.need_x ? p.rows : 0, p.in);
  Guarded<T> dz(is_tanh ? p.rows : 0, p.out);
  std::deque<Guarded<T>> weights, dweights, dbiases;
  xlmr::LinearBackward args{};
  args.dtype = dtype_of<T>();
  args.activation = p.activation;
  args.rows = p.rows;
  args.in_features = p.in;
  args.out_features = p.out;
  args.parts = p.parts;
  for (int64_t part = 0; part < p.parts; ++part) {
    args.dy[part] = dy.pointer[part];
    weights.emplace_back(p.weight[part], p.need_x ? p.out : 0, p.in);
    args.weight[part] = weights.back().data();
    dweights.emplace_back(p.need_weight ? p.out : 0, p.in);
    args.dweight[part] = dweights.back().data();
    dbiases.emplace_back(p.need_bias ? 1 : 0, p.out);
    args.dbias[part] = dbiases.back().data();
  }
  args.dy_stride = dy.stride;
  args.x = x.data();
  args.x_stride = x.stride();
  args.y = y.data();
  args.dx = dx.data();
  args.dz = dz.data();
  run_op(p.products.bf16 ? table.bf16.linear_backward : table.linear_backward, args, threads);
  CHECK(x.intact() && y.intact() && dy.intact(), "an input was changed");
  CHECK(dx.intact() && dz.intact(), "dx or dz was written outside of its elements");
  Outputs<T> out{dx.values()};
  for (const auto& buffer : weights) CHECK(buffer.intact(), "a weight was changed");
  for (const auto& buffer : dweights) {
    CHECK(buffer.intact(), "dweight was written outside of its elements");
    out.push_back(buffer.values());
  }
  for (const auto& buffer : dbiases) {
    CHECK(buffer.intact(), "dbias was written outside of its elements");
    out.push_back(buffer.values());
  }
  out.push_back(dz.values());
  return out;
}

template <class T>
void check_forward(Line& line, TableRef table, const Problem<T>& p) {
  using R = Wide<T>;
  line.begin(p.sizes());
  const Outputs<T> got =
      run_on_threads(line, [&](int32_t threads) { return forward(table, p, threads); });
  const std::vector<T> x = operands(p.x, p.products);
  for (int64_t part = 0; part < p.parts; ++part) {
    const std::vector<T> weight = operands(p.weight[part], p.products);
    std::vector<Num<R>> want;
    for (int64_t row = 0; row < p.rows; ++row) {
      for (int64_t o = 0; o < p.out; ++o) {
        Sum<R> sum;
        for (int64_t k = 0; k < p.in; ++k) {
          sum.add_product(R(x[size_t(row * p.in + k)]), R(weight[size_t(o * p.in + k)]));
        }
        if (!p.bias[part].empty()) sum.add(exact(R(p.bias[part][size_t(o)])));
        if (!p.addend.empty()) sum.add(exact(R(p.addend[size_t(row * p.out + o)])));
        want.push_back(activate(p.activation, sum.value()));
      }
    }
    line.compare(text("y%lld", (long long)part).c_str(), got[size_t(part)], want);
  }
  Problem<T> packed = p;
  packed.packed = true;
  const Outputs<T> from_packed =
      run_on_threads(line, [&](int32_t threads) { return forward(table, packed, threads); });
  for (int64_t part = 0; part < p.parts; ++part) {
    line.same_bits("packed weights", from_packed[size_t(part)], got[size_t(part)]);
  }
  // A row alone, and a few rows from the middle, have the bits that they have in the batch.
  for (int64_t count : {int64_t(1), p.rows / 2}) {
    if (count == 0 || count >= p.rows) continue;
    const int64_t first = (p.rows - count) / 2;
    Problem<T> some = p;
    some.rows = count;
    some.x = slice(p.x, first * p.in, count * p.in);
    some.addend = slice(p.addend, first * p.out, count * p.out);
    const Outputs<T> alone = forward(table, some, 1);
    for (int64_t part = 0; part < p.parts; ++part) {
      line.same_bits("rows taken out of the batch", alone[size_t(part)],
                     slice(got[size_t(part)], first * p.out, count * p.out));
    }
  }
}

template <class T>
void check_backward(Line& line, TableRef table, const Problem<T>& p) {
  using R = Wide<T>;
  line.begin(p.sizes());
  const Outputs<T> got =
      run_on_threads(line, [&](int32_t threads) { return backward(table, p, threads); });
  std::vector<Num<R>> dz[3], factor[3];  // factor: dz in the products
  for (int64_t part = 0; part < p.parts; ++part) {
    for (int64_t i = 0; i < p.rows * p.out; ++i) {
      Num<R> value = exact(R(p.dy[part][size_t(i)]));
      if (p.activation == Activation::tanh) {
        const Num<R> y = exact(R(p.y[size_t(i)]));
        value = stored<T>(value * (exact(R(1)) - y * y));
      }
      dz[part].push_back(value);
      factor[part].push_back(operand(value, p.products));
    }
  }
  if (p.need_x) {
    std::vector<T> weight[3];
    for (int64_t part = 0; part < p.parts; ++part) {
      weight[part] = operands(p.weight[part], p.products);
    }
    std::vector<Num<R>> want;
    for (int64_t row = 0; row < p.rows; ++row) {
      for (int64_t k = 0; k < p.in; ++k) {
        Sum<R> sum;
        for (int64_t part = 0; part < p.parts; ++part) {
          for (int64_t o = 0; o < p.out; ++o) {
            sum.add_product(factor[part][size_t(row * p.out + o)],
                            exact(R(weight[part][size_t(o * p.in + k)])));
          }
        }
        want.push_back(sum.value());
      }
    }
    line.compare("dx", got[0], want);
  }
  const std::vector<T> x = operands(p.x, p.products);
  for (int64_t part = 0; part < p.parts; ++part) {
    if (p.need_weight) {
      std::vector<Num<R>> want;
      for (int64_t o = 0; o < p.out; ++o) {
        for (int64_t k = 0; k < p.in; ++k) {
          Sum<R> sum;
          for (int64_t row = 0; row < p.rows; ++row) {
            sum.add_product(factor[part][size_t(row * p.out + o)],
                            exact(R(x[size_t(row * p.in + k)])));
          }
          want.push_back(sum.value());
        }
      }
      line.compare(text("dweight%lld", (long long)part).c_str(), got[size_t(1 + part)], want);
    }
    if (p.need_bias) {
      std::vector<Num<R>> want;
      for (int64_t o = 0; o < p.out; ++o) {
        Sum<R> sum;
        for (int64_t row = 0; row < p.rows; ++row) sum.add(dz[part][size_t(row * p.out + o)]);
        want.push_back(sum.value());
      }
      line.compare(text("dbias%lld", (long long)part).c_str(), got[size_t(1 + p.parts + part)],
                   want);
    }
  }
  if (p.activation == Activation::tanh) line.compare("dz", got.back(), dz[0]);
}

// The first and the last `rows` of many have the bits that they have among all, for every number of
// rows up to two register tiles: each is cut into tiles in its own way.
template <class T>
void check_row_counts(Line& line, TableRef table, Products products, Random& random, int64_t in,
                      int64_t out) {
  // Tiles of bfloat16 have 32 rows, no other more than 13.
  const int64_t most = products.bf16 ? 67 : 27;
  Problem<T> p = make<T>(random, products, most, in, out, 1);
  line.begin("every number of rows: " + p.sizes());
  const std::vector<T> all = forward(table, p, 2)[0];
  for (int64_t rows = 1; rows < most; ++rows) {
    for (const int64_t first : {int64_t(0), most - rows}) {
      Problem<T> some = p;
      some.rows = rows;
      some.x = slice(p.x, first * in, rows * in);
      some.addend = slice(p.addend, first * out, rows * out);
      for (const bool packed : {false, true}) {
        some.packed = packed;
        line.same_bits(text("rows %lld and following %lld, packed=%d", (long long)first,
                            (long long)rows, int(packed))
                           .c_str(),
                       forward(table, some, 1)[0], slice(all, first * out, rows * out));
      }
    }
  }
}

// So many rows that they go through in several chunks.
template <class T>
void check_chunks(Line& line, TableRef table, Products products, Random& random) {
  constexpr int64_t kIn = 4200, kOut = 3;
  const int64_t rows = products.rounds ? 1030 : 510, from = rows - 70;  // by the bytes of a number
  Problem<T> p = make<T>(random, products, rows, kIn, kOut, 1);
  p.packed = true;
  line.begin("chunks of rows: " + p.sizes());
  Problem<T> last = p;
  last.rows = rows - from;
  last.x = slice(p.x, from * kIn, last.rows * kIn);
  last.addend = slice(p.addend, from * kOut, last.rows * kOut);
  line.same_bits("the last rows alone", forward(table, last, 1)[0],
                 slice(forward(table, p, 2)[0], from * kOut, last.rows * kOut));
}

// One NaN in x reaches the outputs of its own row and no other.
template <class T>
void check_nan(Line& line, TableRef table, Products products, Random& random) {
  Problem<T> p = make<T>(random, products, 19, 33, 21, 1);
  line.begin("NaN in row 7: " + p.sizes());
  const Outputs<T> clean = forward(table, p, 2);
  p.x[7 * 33 + 5] = std::numeric_limits<T>::quiet_NaN();
  const Outputs<T> dirty = forward(table, p, 2);
  bool all_nan = true;
  for (int64_t o = 0; o < 21; ++o) all_nan = all_nan && std::isnan(dirty[0][size_t(7 * 21 + o)]);
  CHECK(all_nan, "a NaN in x did not reach every output of its row");
  line.same_bits("rows before a NaN", slice(clean[0], 0, 7 * 21), slice(dirty[0], 0, 7 * 21));
  line.same_bits("rows behind a NaN", slice(clean[0], 8 * 21, 11 * 21),
                 slice(dirty[0], 8 * 21, 11 * 21));
}

// tanh over its whole range, through a layer that passes x on unchanged.
template <class T>
void check_tanh(Line& line, TableRef table, Products products) {
  using R = Wide<T>;
  Problem<T> p;
  p.products = products;
  p.in = p.out = p.parts = 1;
  p.activation = Activation::tanh;
  p.weight[0] = {T(1)};
  for (double x = 1e-30; x < 100; x *= options().quick ? 1.5 : 1.003) {
    p.x.push_back(T(x));
    p.x.push_back(T(-x));
  }
  for (T x : {T(0), T(1e30), T(-1e30), std::numeric_limits<T>::infinity(),
              T(-std::numeric_limits<T>::infinity())}) {
    p.x.push_back(x);
  }
  p.rows = int64_t(p.x.size());
  line.begin("tanh over its range");
  std::vector<Num<R>> want;
  for (T x : operands(p.x, products)) want.push_back(tanh(exact(R(x))));
  line.compare("tanh", forward(table, p, 1)[0], want);
}

struct Sizes {
  int64_t rows, in, out;
};

template <class T>
std::vector<Sizes> sizes_to_run(Random& random) {
  std::vector<int64_t> edges = {0,  1,  2,  3,  4,  5,  6,   7,   8,   9,   11,  12, 13, 15,
                                16, 17, 23, 24, 25, 31, 32,  33,  47,  48,  49,  63, 64, 65,
                                71, 72, 73, 95, 96, 97, 127, 128, 129, 143, 144, 145};
  const std::vector<int64_t> small = {1, 2, 3, 5, 7, 8, 9, 16, 17, 31, 33};
  std::vector<Sizes> cases;
  for (size_t i = 0; i < edges.size(); i += options().quick ? 6 : 1) {
    const int64_t edge = edges[i];
    cases.push_back({edge, random.pick(small), random.pick(small)});
    if (edge == 0) continue;  // the door asks for at least one feature
    cases.push_back({random.pick(small), edge, random.pick(small)});
    cases.push_back({random.pick(small), random.pick(small), edge});
  }
  if (!options().quick) {
    // Around the blocks that a GEMM is likely to cut its sizes into.
    for (int64_t k : {255, 256, 257, 383, 384, 385, 511, 512, 513, 769}) {
      cases.push_back({5, k, 9});
      cases.push_back({k, 9, 5});
      cases.push_back({9, 5, k});
    }
    cases.push_back({67, 130, 259});
    cases.push_back({131, 300, 67});
    cases.push_back({260, 65, 130});
    if (kIs16Bits<T>) {  // so many tiles that each product of the three is cut into large ones
      cases.push_back({1400, 40, 1530});
      cases.push_back({1400, 1530, 40});
      cases.push_back({40, 1530, 1400});
    }
  }
  Random fuzz(options().seed);
  for (int64_t i = 0; i < options().fuzz; ++i) {
    cases.push_back({fuzz.between(0, 150), fuzz.between(1, 150), fuzz.between(1, 150)});
  }
  return cases;
}

template <class T>
void run(TableRef table, Products products) {
  Random random(11);
  const std::vector<Sizes> cases = sizes_to_run<T>(random);
  const auto problem = [&](const Sizes& s, int64_t parts) {
    return make<T>(random, products, s.rows, s.in, s.out, parts);
  };
  // check(problem) for every size, in one part and in several.
  const auto for_sizes = [&](const auto& check) {
    int64_t parts = 0;
    for (const Sizes& s : cases) {
      parts = parts % 3 + 1;
      check(problem(s, parts));
      if (parts != 1 && !options().quick && !products.bf16) check(problem(s, 1));
    }
  };
  const char* name = products.bf16 ? "linear_bf16_forward" : "linear_forward";
  if (selected(name)) {
    Line line(table, dtype_name<T>(), name);
    for_sizes([&](const Problem<T>& p) { check_forward(line, table, p); });
    check_row_counts<T>(line, table, products, random, 37, 33);
    if (!options().quick) {
      check_row_counts<T>(line, table, products, random, 1, 7);
      check_row_counts<T>(line, table, products, random, 64, 64);
      check_row_counts<T>(line, table, products, random, 389, products.bf16 ? 32 : 65);
      if (!emulates_cuda(table)) check_chunks<T>(line, table, products, random);
    }
    check_nan<T>(line, table, products, random);
    check_tanh<T>(line, table, products);
  }
  name = products.bf16 ? "linear_bf16_backward" : "linear_backward";
  if (selected(name) && (!products.bf16 || products.rounds)) {
    Line line(table, dtype_name<T>(), name);
    for_sizes([&](const Problem<T>& p) { check_backward(line, table, p); });
    // So many rows that the gradient of a weight waits in memory between two spans of them.
    if (!options().quick && !emulates_cuda(table)) {
      Problem<T> p = problem({products.rounds ? 6200 : 3100, 3, 200}, 1);
      p.need_weight = true;
      p.need_x = false;
      check_backward(line, table, p);
    }
  }
}

}  // namespace

void test_linear(TableRef table) {
  for_types(table, [&](auto element) { run<decltype(element)>(table, {}); });
}

void test_linear_bf16(TableRef table) { run<float>(table, bf16_products(table)); }

}  // namespace test
