// Several threads calling at once: how they share the processors, and that they share nothing else.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <stdexcept>
#include <thread>

#include "core/cpu_budget.h"
#include "core/encoder.h"
#include "harness.h"

namespace test {
namespace {

using xlmr::CpuBudget;
using xlmr::CpuTurn;
using xlmr::Entry;

void check_shares() {
  tally().context = "shares of 16 processors";
  const int32_t wanted[] = {64, 8, 4, 4, 2, 2, 2, 2, 1, 1};  // 1 call, 2 calls, ...
  CpuBudget budget(16);
  for (int32_t calls = 0; calls < 10; ++calls) {
    const Entry entry = calls % 2 == 0 ? Entry::in_turn : Entry::at_once;
    const int32_t got = budget.enter(entry, 64);
    CHECK(got == wanted[calls], "call %d got %d threads, expected %d", int(calls + 1), int(got),
          int(wanted[calls]));
  }
  for (int32_t calls = 0; calls < 10; ++calls) {
    budget.leave(calls % 2 == 0 ? Entry::in_turn : Entry::at_once);
  }
  CHECK(budget.enter(Entry::in_turn, 3) == 3, "a call alone did not get what it asked for");
  CHECK(budget.enter(Entry::in_turn, 3) == 3, "two calls of 3 threads fit beside each other");
  budget.set_capacity(-5);
  CHECK(budget.capacity() == 1, "a capacity below 1");
  CHECK(budget.enter(Entry::at_once, 3) == 1, "nothing to share, yet more than one thread");
}

void wait_until_waiting(CpuBudget& budget, int32_t calls) {
  while (budget.waiting() != calls) std::this_thread::yield();
}

void check_order_of_arrival() {
  tally().context = "order of arrival";
  constexpr int32_t kCallers = 12;
  CpuBudget budget(2);
  budget.enter(Entry::in_turn, 1);
  budget.enter(Entry::in_turn, 1);
  CHECK(budget.enter(Entry::at_once, 2) == 1, "a short call among two on two processors");
  budget.leave(Entry::at_once);
  std::atomic<int32_t> entered{0};
  std::vector<int32_t> order(kCallers, -1);
  std::vector<std::thread> callers;
  for (int32_t i = 0; i < kCallers; ++i) {
    callers.emplace_back([&, i] {
      budget.enter(Entry::in_turn, 1 + i % 3);
      order[size_t(entered.fetch_add(1))] = i;
    });
    wait_until_waiting(budget, i + 1);
  }
  CHECK(entered.load() == 0, "%d calls entered although the processors were taken",
        int(entered.load()));
  // Nobody leaves by itself, so that every leave() lets in one.
  for (int32_t i = 0; i < kCallers; ++i) {
    budget.leave(Entry::in_turn);
    while (entered.load() != i + 1) std::this_thread::yield();
    CHECK(budget.waiting() == kCallers - i - 1, "%d calls wait", int(budget.waiting()));
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(std::is_sorted(order.begin(), order.end()), "calls entered in another order");
  // More processors let in those who wait for one.
  std::thread late([&] { budget.enter(Entry::in_turn, 1); });
  wait_until_waiting(budget, 1);
  budget.set_capacity(3);
  late.join();
}

void check_crowd() {
  tally().context = "eight callers on three processors";
  constexpr int32_t kCallers = 8, kCalls = 2000, kCapacity = 3;
  CpuBudget budget(kCapacity);
  std::atomic<int32_t> running{0}, most{0}, wrong{0};
  std::vector<std::thread> callers;
  for (int32_t i = 0; i < kCallers; ++i) {
    callers.emplace_back([&, i] {
      for (int32_t call = 0; call < kCalls; ++call) {
        const bool waits = (call + i) % 5 != 0;
        const Entry entry = waits ? Entry::in_turn : Entry::at_once;
        const int32_t threads = budget.enter(entry, 4);
        if (threads < 1 || threads > 4) wrong.fetch_add(1);
        if (waits) {
          const int32_t now = running.fetch_add(1) + 1;
          for (int32_t seen = most.load(); seen < now && !most.compare_exchange_weak(seen, now);) {
          }
          running.fetch_sub(1);
        }
        budget.leave(entry);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(most.load() <= kCapacity, "%d long calls ran at once", int(most.load()));
  CHECK(wrong.load() == 0, "%d calls got no threads or too many", int(wrong.load()));
  CHECK(budget.waiting() == 0 && budget.enter(Entry::in_turn, 4) == 4, "not idle at the end");
}

void check_failing_call() {
  tally().context = "a call that throws in its turn";
  for (int i = 0; i < 2; ++i) {
    try {
      const CpuTurn turn(Entry::in_turn, 5);
      CHECK(turn.threads() == 5, "%d threads: somebody holds processors", int(turn.threads()));
      throw std::runtime_error("a failure");
    } catch (const std::runtime_error&) {
    }
  }
}

// A child forked while others run and wait begins with an idle budget.
void check_forked_budget() {
  tally().context = "a child forked while the processors are taken";
  CpuBudget& budget = xlmr::cpu_budget();
  const int32_t before = budget.capacity();
  budget.set_capacity(1);
  budget.enter(Entry::in_turn, 1);
  std::thread waiting([&] { const CpuTurn turn(Entry::in_turn, 1); });
  wait_until_waiting(budget, 1);
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);  // a child that hangs is killed
    for (int i = 0; i < 3; ++i) {
      const CpuTurn turn(Entry::in_turn, 4);
      if (turn.threads() != 1) _exit(1);  // it runs serially
    }
    _exit(xlmr::cpu_budget().capacity() == 1 ? 0 : 2);
  }
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "hung or failed: wait status %d", status);
  budget.leave(Entry::in_turn);
  waiting.join();
  CHECK(budget.enter(Entry::in_turn, 7) == 7, "the parent's budget is not idle");
  budget.leave(Entry::in_turn);
  budget.set_capacity(before);
}

// A small encoder in plain memory: the guarded kind and the tally are for one thread.
class SmallEncoder {
 public:
  explicit SmallEncoder(TableRef table) : table_(table) {
    for (xlmr::EncoderLayer& layer : layers_) {
      layer.query_key_value_weight = packed(3 * kHidden, kHidden);
      layer.query_key_value_bias = plain(3 * kHidden);
      layer.attention_output_weight = packed(kHidden, kHidden);
      layer.attention_output_bias = plain(kHidden);
      layer.attention_norm_weight = plain(kHidden);
      layer.attention_norm_bias = plain(kHidden);
      layer.up_weight = packed(kInner, kHidden);
      layer.up_bias = plain(kInner);
      layer.down_weight = packed(kHidden, kInner);
      layer.down_bias = plain(kHidden);
      layer.output_norm_weight = plain(kHidden);
      layer.output_norm_bias = plain(kHidden);
    }
    for (int64_t i = 0; i < kRows; ++i) {
      ids_.push_back(random_.between(0, kWords - 1));
      positions_.push_back(i % kPositions);
    }
    args_.embedding.dtype = xlmr::DType::float32;
    args_.embedding.rows = kRows;
    args_.embedding.hidden = kHidden;
    args_.embedding.eps = 1e-5;
    args_.embedding.input_ids = ids_.data();
    args_.embedding.position_ids = positions_.data();
    args_.embedding.word_rows = kWords;
    args_.embedding.position_rows = kPositions;
    args_.embedding.token_type_rows = 1;
    args_.embedding.word = plain(kWords * kHidden);
    args_.embedding.position = plain(kPositions * kHidden);
    args_.embedding.token_type = plain(kHidden);
    args_.embedding.weight = plain(kHidden);
    args_.embedding.bias = plain(kHidden);
    args_.activation = xlmr::Activation::gelu;
    args_.inner = kInner;
    args_.num_heads = 3;
    args_.num_layers = 2;
    args_.batch = 3;
    args_.max_seqlen = 50;
    args_.scale = 0.25;
    args_.cu_seqlens = offsets_;
    args_.layers = layers_;
  }

  // As the Python module calls it: in turn, with the threads that the turn grants.
  std::vector<float> operator()(int32_t threads) const {
    std::vector<float> y(size_t(kRows * kHidden), -1);
    xlmr::EncoderForward args = args_;
    args.y = y.data();
    xlmr::ExecContext context;
    context.num_threads = threads;
    std::vector<char> workspace(size_t(xlmr::encoder_forward_workspace(table_, args, context)));
    context.workspace = workspace.data();
    const CpuTurn turn(Entry::in_turn, threads);
    context.num_threads = turn.threads();
    if (xlmr::encoder_forward(table_, args, context) != nullptr) y.clear();
    return y;
  }

 private:
  static constexpr int64_t kHidden = 48, kInner = 80, kRows = 67, kWords = 11, kPositions = 50;

  const float* plain(int64_t count) {
    plain_.push_back(random_.values<float>(count, 0.3));
    return plain_.back().data();
  }
  const void* packed(int64_t out, int64_t in) {
    packed_.emplace_back(size_t(table_.packed_bytes(xlmr::DType::float32, out, in)));
    const xlmr::PackWeight args{xlmr::DType::float32, out, in, plain(out * in),
                                packed_.back().data()};
    run_op(table_.pack_weight, args, 1);
    return packed_.back().data();
  }

  TableRef table_;
  Random random_{5};
  std::deque<std::vector<float>> plain_;
  std::deque<std::vector<char>> packed_;
  std::vector<int64_t> ids_, positions_;
  const int32_t offsets_[4] = {0, 10, 60, 67};
  xlmr::EncoderLayer layers_[2] = {};
  xlmr::EncoderForward args_{};
};

}  // namespace

void test_cpu_budget() {
  if (!selected("callers")) return;
  tally().shown = 0;
  check_shares();
  check_order_of_arrival();
  check_crowd();
  check_failing_call();
  check_forked_budget();
  std::printf("callers: shares of the processors, order of arrival, a crowd, failure, fork\n");
}

void test_callers(TableRef table) {
  if (!selected("callers")) return;
  Line line(table, "float32", "callers");
  line.begin("eight threads calling one encoder");
  const SmallEncoder encoder(table);
  const std::vector<float> alone = encoder(1);
  CHECK(!alone.empty(), "the encoder failed");
  constexpr int kCallers = 8, kCalls = 5;
  std::vector<float> results[kCallers][kCalls];
  std::vector<std::thread> callers;
  for (int i = 0; i < kCallers; ++i) {
    callers.emplace_back([&, i] {
      for (int call = 0; call < kCalls; ++call)
        results[i][call] = encoder(1 + (i + call) % options().threads);
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const auto& caller : results) {
    for (const auto& result : caller) line.same_bits("beside other callers", alone, result);
  }
}

}  // namespace test
