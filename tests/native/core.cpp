// What the ops stand on: random numbers, threads, fork, the choice of a table.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <stdexcept>
#include <thread>

#include "core/cpu_features.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/philox.h"
#include "harness.h"
#include "philox.h"

namespace test {
namespace {

void check_philox() {
  tally().context = "philox";
  CHECK((philox({0, 0, 0, 0}, 0, 0) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}),
        "known answer, all zeros");
  constexpr uint32_t ones = 0xFFFFFFFF;
  CHECK((philox({ones, ones, ones, ones}, ones, ones) ==
         Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}),
        "known answer, all ones");
  for (const double p : {0.0, 1e-12, 0.1, 0.5, 0.75, 0.999999, 1 - 0x1p-33, 1.0}) {
    const double exact = p * 4294967296.0;
    const double threshold = xlmr::dropout_threshold(p);
    CHECK(threshold <= exact && (threshold + 1 > exact || threshold == 4294967295.0),
          "threshold of %g is %.0f", p, threshold);
  }
  int64_t kept = 0;
  for (int64_t i = 0; i < 40000; ++i) kept += keeps(0.1, 7, 1, i % 3, i / 200, i % 200) ? 1 : 0;
  // Ten standard deviations of the binomial.
  CHECK(kept > 36000 - 600 && kept < 36000 + 600, "p = 0.1 kept %lld of 40000",
        static_cast<long long>(kept));
}

struct Counters {
  std::vector<std::atomic<int32_t>> runs;
  std::atomic<int32_t> strangers{0};  // thread numbers outside of [0, limit)
  std::atomic<int32_t> nested{0};
  int32_t limit;
  explicit Counters(size_t tasks, int32_t threads) : runs(tasks), limit(threads) {}
};

void count(void* arg, int64_t task, int32_t thread) {
  auto* counters = static_cast<Counters*>(arg);
  counters->runs[size_t(task)].fetch_add(1);
  if (thread < 0 || thread >= counters->limit) counters->strangers.fetch_add(1);
}

void count_nested(void* arg, int64_t task, int32_t thread) {
  count(arg, task, thread);
  xlmr::parallel_tasks(
      3, 5,
      [](void* outer, int64_t, int32_t inner_thread) {
        auto* counters = static_cast<Counters*>(outer);
        counters->nested.fetch_add(1);
        // Runs serially there: the scratch of thread 0 belongs to one caller only.
        if (inner_thread != 0) counters->strangers.fetch_add(1);
      },
      arg);
}

void check_threads() {
  for (const int32_t threads : {1, 2, 3, 64}) {
    for (const int64_t tasks : {0, 1, 2, 3, 100, 1000}) {
      tally().context =
          text("parallel_tasks threads=%d tasks=%lld", int(threads), static_cast<long long>(tasks));
      Counters counters(size_t(tasks), threads);
      xlmr::parallel_tasks(threads, tasks, count, &counters);
      bool once = true;
      for (const auto& runs : counters.runs) once = once && runs.load() == 1;
      CHECK(once, "a task was not run exactly once");
      CHECK(counters.strangers.load() == 0, "a thread number out of range");
    }
  }
  tally().context = "parallel_tasks inside of parallel_tasks";
  Counters counters(20, 3);
  xlmr::parallel_tasks(3, 20, count_nested, &counters);
  CHECK(counters.nested.load() == 100, "%d inner tasks ran, expected 100",
        int(counters.nested.load()));
  CHECK(counters.strangers.load() == 0, "an inner region used threads of its own");
}

void check_fork() {
  tally().context = "a forked child";
  Counters warm(16, 3);
  xlmr::parallel_tasks(3, 16, count, &warm);  // the parent has a team now
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);  // a child that hangs is killed
    Counters counters(16, 3);
    xlmr::parallel_tasks(3, 16, count, &counters);
    bool once = true;
    for (const auto& runs : counters.runs) once = once && runs.load() == 1;
    _exit(once ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "hung or failed: wait status %d", status);
}

void check_dispatch() {
  tally().context = "dispatch";
  const uint32_t have = xlmr::cpu_features();
  CHECK(xlmr::missing_feature(0, 0) == nullptr, "nothing required, yet something is missing");
  CHECK(xlmr::missing_feature(xlmr::kFeatureAvx2, 0) == std::string("AVX2"), "AVX2 is not missed");
  CHECK(xlmr::missing_feature(have, have) == nullptr, "what is there is missing");
  const auto& tables = xlmr::built_tables();
  // Emulated CUDA, where it is built, stands first: the slowest.
  const size_t first = tables.size() > 1 && emulates_cuda(*tables[0].table) ? 1 : 0;
  CHECK(tables.size() > first && tables[first].table->name == std::string("baseline"),
        "the CPU's first table is not baseline");
  const xlmr::KernelTable* fastest = nullptr;
  for (const xlmr::TableInfo& info : tables) {
    const bool runs = xlmr::missing_feature(info.required, have) == nullptr;
    if (runs) fastest = info.table;
    bool chosen = false;
    try {
      chosen = xlmr::choose_table(info.table->name).table == info.table;
    } catch (const std::runtime_error& error) {
      CHECK(std::strstr(error.what(), info.table->name) != nullptr, "unclear: %s", error.what());
    }
    CHECK(chosen == runs, "forcing %s", info.table->name);
  }
  CHECK(!emulates_cuda(*fastest), "emulated CUDA was chosen by default");
  CHECK(xlmr::choose_table(nullptr).table == fastest, "not the fastest table by default");
  CHECK(xlmr::choose_table("").table == fastest, "an empty name is not the default");
  std::string message;
  try {
    xlmr::choose_table("no_such_table");
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  CHECK(message.find("no_such_table") != std::string::npos &&
            message.find("baseline") != std::string::npos,
        "an unknown table gave: %s", message.c_str());
  xlmr::set_active("baseline");
  CHECK(xlmr::active().table == tables[first].table, "set_active had no effect");
  xlmr::set_active(nullptr);
}

// Several callers at once, each with a team of its own: the bits of one caller alone.
void check_concurrent_callers() {
  tally().context = "four threads calling linear_forward at once";
  constexpr int64_t kRows = 67, kSize = 130;
  Random random(21);
  const std::vector<float> x = random.values<float>(kRows * kSize);
  const std::vector<float> weight = random.values<float>(kSize * kSize);
  const xlmr::KernelTable& table = *xlmr::active().table;
  // Plain memory: the guarded kind and the tally are for one thread.
  const auto call = [&](std::vector<float>& y) {
    y.assign(size_t(kRows * kSize), -1);
    xlmr::LinearForward args{};
    args.dtype = xlmr::DType::float32;
    args.rows = kRows;
    args.in_features = args.out_features = kSize;
    args.parts = 1;
    args.x = x.data();
    args.x_stride = args.y_stride = kSize;
    args.weight[0] = weight.data();
    args.y[0] = y.data();
    xlmr::ExecContext context;
    context.num_threads = 2;
    std::vector<char> workspace(size_t(table.linear_forward.workspace(args, context)) + 64);
    const uintptr_t address = reinterpret_cast<uintptr_t>(workspace.data());
    context.workspace = workspace.data() + (64 - address % 64) % 64;
    table.linear_forward.run(args, context);
  };
  std::vector<float> alone;
  call(alone);
  std::vector<std::vector<float>> results(4);
  std::vector<std::thread> callers;
  for (auto& result : results) {
    callers.emplace_back([&call, &result] {
      for (int i = 0; i < 10; ++i) call(result);
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const auto& result : results) {
    CHECK(std::memcmp(result.data(), alone.data(), alone.size() * sizeof(float)) == 0,
          "bits differ from those of one caller alone");
  }
}

}  // namespace

void test_core() {
  if (!selected("core")) return;
  check_philox();
  check_threads();
  check_fork();
  check_dispatch();
  check_concurrent_callers();
  std::printf("core: random numbers, threads, fork, dispatch, concurrent callers\n");
}

}  // namespace test
