// The ops in bfloat16 of every table; and tables over plain C++ twins of the instructions, on any
// processor. Where the processor has the instructions, a twin has the bits of the real table.
#include "bfloat16.h"
#include "core/cpu_features.h"
#include "core/dispatch.h"
#include "packed.h"

namespace xlmr {
namespace avx512_bf16_twin {
extern const Bf16Ops bf16_ops;
}
namespace amx_twin {
extern const Bf16Ops bf16_ops;
}
namespace amx_tiles_twin {
extern const Bf16Ops bf16_ops;
}
}  // namespace xlmr

namespace test {
namespace {

struct Problem {
  int64_t rows, in, out;
  std::vector<float> x, weight, dy;
};

// Numbers of one size; or of sizes so far apart that sums round away, overflow and vanish.
std::vector<float> numbers(Random& random, int64_t count, bool spread) {
  std::vector<float> out = random.values<float>(count);
  if (!spread) return out;
  for (float& x : out) x = std::ldexp(x, int(random.between(-75, 66)));
  return out;
}

// y of plain and of packed weights, dx, dweight: what is a product and nothing else.
std::vector<std::vector<float>> products(TableRef table, const Problem& p) {
  const PackedBf16 packed(p.weight, p.out, p.in);
  std::vector<float> y(size_t(p.rows * p.out)), from_packed(y), dx(size_t(p.rows * p.in)),
      dweight(size_t(p.out * p.in));
  xlmr::LinearForward forward{};
  forward.dtype = xlmr::DType::float32;
  forward.rows = p.rows;
  forward.in_features = forward.x_stride = p.in;
  forward.out_features = forward.y_stride = p.out;
  forward.parts = 1;
  forward.x = p.x.data();
  forward.weight[0] = p.weight.data();
  forward.y[0] = y.data();
  run_op(table.bf16.linear_forward, forward, 2);
  forward.packed = true;
  forward.weight[0] = packed.data();
  forward.y[0] = from_packed.data();
  run_op(table.bf16.linear_forward, forward, 1);
  xlmr::LinearBackward backward{};
  backward.dtype = xlmr::DType::float32;
  backward.rows = p.rows;
  backward.in_features = backward.x_stride = p.in;
  backward.out_features = backward.dy_stride = p.out;
  backward.parts = 1;
  backward.dy[0] = p.dy.data();
  backward.x = p.x.data();
  backward.weight[0] = p.weight.data();
  backward.dx = dx.data();
  backward.dweight[0] = dweight.data();
  run_op(table.bf16.linear_backward, backward, 2);
  std::vector<std::vector<float>> out{y, from_packed, dx, dweight};
  for (auto& values : out) {
    for (float& value : values) {
      if (std::isnan(value)) value = std::numeric_limits<float>::quiet_NaN();  // any NaN
    }
  }
  return out;
}

void check_same_bits(TableRef table, TableRef twin) {
  const std::string name = std::string("the bits of ") + twin.name;
  if (!selected("bf16_same_bits")) return;
  Line line(table, "float32", name.c_str());
  Random random(43);
  const std::vector<int64_t> rows = {1, 2, 5, 12, 13, 16, 17, 31, 32, 33, 48, 67};
  const std::vector<int64_t> ins = {1, 2, 3, 31, 32, 33, 63, 100, 384, 385, 801};
  const std::vector<int64_t> outs = {1, 3, 16, 17, 31, 32, 33, 65, 97};
  for (int i = 0; i < (options().quick ? 12 : 80); ++i) {
    Problem p{random.pick(rows), random.pick(ins), random.pick(outs), {}, {}, {}};
    const bool spread = i % 2 == 1;
    p.x = numbers(random, p.rows * p.in, spread);
    p.weight = numbers(random, p.out * p.in, spread);
    p.dy = numbers(random, p.rows * p.out, spread);
    line.begin(text("rows=%lld in=%lld out=%lld spread=%d", (long long)p.rows, (long long)p.in,
                    (long long)p.out, int(spread)));
    const auto got = products(table, p), want = products(twin, p);
    const char* const outputs[] = {"y", "y of packed weights", "dx", "dweight"};
    for (size_t k = 0; k < got.size(); ++k) line.same_bits(outputs[k], got[k], want[k]);
  }
}

// The table of that name, where the processor runs it.
const xlmr::KernelTable* find(const char* name) {
  for (const xlmr::TableInfo& info : xlmr::built_tables()) {
    if (info.table->name == std::string(name) &&
        xlmr::missing_feature(info.required, xlmr::cpu_features()) == nullptr) {
      return info.table;
    }
  }
  return nullptr;
}

}  // namespace

void test_bf16(TableRef table) {
  if (emulates_cuda(table)) {
    const char* want = "weights packed in bfloat16 are for the CPU only";
    const xlmr::ExecContext context;
    tally().context = "weights packed in bfloat16 on CUDA";
    xlmr::LinearForward linear{};
    xlmr::FeedForwardForward feed_forward{};
    linear.packed = feed_forward.packed = true;
    const auto check = [&](xlmr::Status said) {
      CHECK(said != nullptr && said == std::string(want), "an op ran");
    };
    check(table.bf16.linear_forward.run(linear, context));
    check(table.bf16.feed_forward_forward.run(feed_forward, context));
    CHECK(table.bf16.linear_backward.run == table.linear_backward.run, "another backward");
    CHECK(table.bf16.feed_forward_backward.run == table.feed_forward_backward.run,
          "another backward");
    return;
  }
  test_workspace_bf16(table);
  test_linear_bf16(table);
  test_feed_forward_bf16(table);
  test_encoder_bf16(table);
}

int test_bf16_twins() {
  const xlmr::KernelTable& baseline = *find("baseline");
  const auto twin_of = [&](const char* name, const xlmr::Bf16Ops& ops) {
    return xlmr::with_bf16(baseline, name, ops);
  };
  const std::vector<xlmr::KernelTable> twins = {
      twin_of("avx512_bf16_twin", xlmr::avx512_bf16_twin::bf16_ops),
      twin_of("amx_twin", xlmr::amx_twin::bf16_ops),
  };
  const std::string& only = options().table;
  // Twins are slow, and how work is cut for threads is the same code in all tables.
  const int32_t threads = options().threads;
  options().threads = std::min(threads, 2);
  int ran = 0;
  for (const xlmr::KernelTable& twin : twins) {
    const std::string name = twin.name;
    if (!only.empty() && only != name) continue;
    ++ran;
    test_bf16(twin);
    // The real table, which has the name of its twin but for the end.
    const auto* real = find(name.substr(0, name.size() - std::strlen("_twin")).c_str());
    if (real != nullptr) check_same_bits(*real, twin);
  }
#if defined(XLMR_HAVE_AVX512_BF16)
  // What is around the tiles of AMX, as it runs there.
  if ((only.empty() || only == "amx_tiles_twin") && find("avx512_bf16") != nullptr) {
    ++ran;
    check_same_bits(twin_of("amx_tiles_twin", xlmr::amx_tiles_twin::bf16_ops), twins[1]);
  }
#endif
  options().threads = threads;
  return ran;
}

}  // namespace test
