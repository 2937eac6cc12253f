// What every op's tests share: the options, random inputs, and running one op under guard.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "guarded.h"
#include "numerics.h"
#include "ops.h"

namespace test {

struct Options {
  bool quick = false;   // a sample of the sizes; for valgrind
  int32_t threads = 3;  // at most; every case runs on 1, 2 and 3
  int64_t fuzz = 0;     // random cases more, for every op
  uint64_t seed = 1;    // of the random cases
  std::string table;    // only this one
  std::string op;       // only ops whose name contains this
};

Options& options();

// Small numbers without order (splitmix64), the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits();
  int64_t between(int64_t low, int64_t high);  // both included
  bool chance(double p) { return uniform() < p; }
  double uniform();  // in [0, 1)
  double normal();   // roughly: the sum of four uniforms, variance 1
  template <class C>
  auto pick(const C& values) -> typename C::value_type {
    return values[size_t(between(0, int64_t(values.size()) - 1))];
  }
  template <class T>
  std::vector<T> values(int64_t count, double scale = 1.0, double offset = 0.0) {
    std::vector<T> out(static_cast<size_t>(count));
    for (T& value : out) value = T(normal() * scale + offset);
    return out;
  }

 private:
  uint64_t state_;
};

template <class T>
constexpr xlmr::DType dtype_of() {
  if (std::is_same_v<T, Bfloat16>) return xlmr::DType::bfloat16;
  if (std::is_same_v<T, Float16>) return xlmr::DType::float16;
  return sizeof(T) == 4 ? xlmr::DType::float32 : xlmr::DType::float64;
}
template <class T>
constexpr const char* dtype_name() {
  if (std::is_same_v<T, Bfloat16>) return "bfloat16";
  if (std::is_same_v<T, Float16>) return "float16";
  return sizeof(T) == 4 ? "float32" : "float64";
}

// The floating-point control bits of the calling thread (rounding, flush to zero, traps).
uint32_t control_bits();
void set_flush_to_zero(bool on);

// Calls run(context) on a workspace of the very size that query(context) answers.
template <class Query, class Run>
void run_on_workspace(const Query& query, const Run& run, int32_t threads) {
  xlmr::ExecContext context;
  context.num_threads = threads;
  const int64_t bytes = query(context);
  if (!CHECK(bytes >= 0, "workspace query answered %lld", static_cast<long long>(bytes))) return;
  const Block workspace(size_t(bytes), Block::next_placement(), 8);
  if (bytes > 0) std::memset(workspace.data(), 0xFF, size_t(bytes));
  context.workspace = workspace.data();
  const uint32_t control = control_bits();
  const xlmr::Status status = run(context);
  CHECK(control_bits() == control, "the floating-point control word was changed");
  CHECK(status == nullptr, "status: %s", status);
  CHECK(workspace.intact(), "wrote outside of the workspace of %lld bytes",
        static_cast<long long>(bytes));
}

template <class Args>
void run_op(const xlmr::Op<Args>& op, const Args& args, int32_t threads) {
  run_on_workspace([&](const xlmr::ExecContext& context) { return op.workspace(args, context); },
                   [&](const xlmr::ExecContext& context) { return op.run(args, context); },
                   threads);
}

using TableRef = const xlmr::KernelTable&;

// Whether the table is that of the CUDA kernels: it has no 8-bit products and knows no threads, but
// it has kernels of 16-bit types.
inline bool emulates_cuda(TableRef table) { return std::strcmp(table.name, "simt") == 0; }

// f(T()) for every type that the table has kernels of.
template <class F>
void for_types(TableRef table, const F& f) {
  f(float());
  f(double());
  if (!emulates_cuda(table)) return;
  f(Bfloat16());
  f(Float16());
}

// One line of the report: the largest error of an op, in parts of its tolerance.
class Line {
 public:
  Line(TableRef table, const char* dtype, const char* op);
  ~Line();
  Line(const Line&) = delete;
  Line& operator=(const Line&) = delete;

  // Begins a case; `sizes` says which, in case it fails.
  void begin(const std::string& sizes);

  template <class T>
  void compare(const char* output, const std::vector<T>& got,
               const std::vector<Num<Wide<T>>>& want) {
    if (!CHECK(got.size() == want.size(), "%s: %zu elements, expected %zu", output, got.size(),
               want.size())) {
      return;
    }
    int64_t where = 0;
    const double error = worst_error(got, want, &where);
    if (error > worst_) worst_ = error;
    CHECK(error <= 1, "%s[%lld] is %.9g, expected %.9g: %.3g times the tolerance", output,
          static_cast<long long>(where), where < 0 ? 0.0 : double(got[size_t(where)]),
          where < 0 ? 0.0 : double(want[size_t(where)].v), error);
  }

  template <class T>
  void same_bits(const char* what, const std::vector<T>& a, const std::vector<T>& b) {
    size_t where = 0;
    while (where < a.size() && where < b.size() &&
           std::memcmp(&a[where], &b[where], sizeof(T)) == 0) {
      ++where;
    }
    const bool same = a.size() == b.size() && where == a.size();
    CHECK(same, "%s: bits differ at %zu of %zu: %.9g and %.9g", what, where, a.size(),
          where < a.size() ? double(a[where]) : 0.0, where < b.size() ? double(b[where]) : 0.0);
  }

 private:
  std::string name_;
  int64_t cases_ = 0;
  double worst_ = 0;
};

// What an op wrote: tensors of its type, and statistics.
template <class T>
struct WithStatistics {
  std::vector<std::vector<T>> values;
  std::vector<std::vector<Arithmetic<T>>> statistics;
  const std::vector<T>& operator[](size_t i) const { return values[i]; }
};

template <class T>
void same_outputs(Line& line, int32_t threads, const std::vector<std::vector<T>>& a,
                  const std::vector<std::vector<T>>& b) {
  for (size_t k = 0; k < a.size(); ++k) {
    line.same_bits(text("output %zu on %d threads", k, int(threads)).c_str(), a[k], b[k]);
  }
}
template <class T>
void same_outputs(Line& line, int32_t threads, const WithStatistics<T>& a,
                  const WithStatistics<T>& b) {
  same_outputs(line, threads, a.values, b.values);
  same_outputs(line, threads, a.statistics, b.statistics);
}

// Whether the op is to be run at all.
bool selected(const char* op);

template <class T>
std::vector<T> slice(const std::vector<T>& values, int64_t begin, int64_t count) {
  if (values.empty()) return {};
  return {values.begin() + begin, values.begin() + begin + count};
}

// Runs `execute(threads)`, which answers a list of outputs, on 1, 2 and 3 threads, requires the
// same bits, and answers the first.
template <class Execute>
auto run_on_threads(Line& line, Execute execute) {
  auto first = execute(1);
  for (int32_t threads = 2; threads <= options().threads; ++threads) {
    same_outputs(line, threads, first, execute(threads));
  }
  return first;
}

// The tests, one function for each op area.
void test_core();
void test_cpu_budget();
void test_workspace(TableRef table);
void test_workspace_bf16(TableRef table);
void test_linear(TableRef table);
void test_linear_bf16(TableRef table);
void test_feed_forward(TableRef table);
void test_feed_forward_bf16(TableRef table);
void test_attention(TableRef table);
void test_layer_norm(TableRef table);
void test_embedding(TableRef table);
void test_dropout(TableRef table);
void test_packing(TableRef table);
void test_encoder(TableRef table);
void test_encoder_bf16(TableRef table);
void test_int8_layout();
void test_int8(TableRef table);
void test_bf16_layout();
void test_bf16_units();
void test_bf16(TableRef table);  // all ops in bfloat16
int test_bf16_twins();           // the tables that it ran
void test_callers(TableRef table);
void test_cuda(TableRef table);

}  // namespace test
