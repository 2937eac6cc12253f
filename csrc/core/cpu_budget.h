// Shares the processors that this process may use among the calls of many threads.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace xlmr {

// Every caller brings a team of threads of its own. Where the teams together have more threads than
// there are processors, each barrier of a team waits for threads that have no processor. So:
//
// * A call that has no company takes the threads that it asks for; of several calls each takes at
//   most its part of the capacity, halved for every doubling of the calls, so that a team does not
//   change its size with every call that comes or goes. A result does not depend on the number of
//   threads.
// * At most `capacity` long calls run at once. The others sleep, and enter in order of arrival.
// * A short call never waits: it would wait for work a thousand times its own.
enum class Entry { in_turn, at_once };

class CpuBudget {
 public:
  explicit CpuBudget(int32_t capacity) : capacity_(capacity) {}
  CpuBudget(const CpuBudget&) = delete;
  CpuBudget& operator=(const CpuBudget&) = delete;

  // Answers how many threads to use, from 1 to num_threads. A leave() must follow.
  int32_t enter(Entry entry, int32_t num_threads);
  void leave(Entry entry);

  int32_t capacity() const { return capacity_.load(std::memory_order_relaxed); }
  void set_capacity(int32_t capacity);

  // Calls that wait for their turn.
  int32_t waiting();

 private:
  struct Waiter {
    std::condition_variable turn;
    bool entered = false;
    Waiter* next = nullptr;
  };

  void admit();
  int32_t share(int32_t num_threads) const;

  std::mutex mutex_;
  std::atomic<int32_t> capacity_;
  int32_t running_ = 0, waiting_ = 0;  // long calls
  int32_t short_ = 0;
  Waiter* first_ = nullptr;
  Waiter* last_ = nullptr;
};

// That of this process; a forked child begins with an idle one.
CpuBudget& cpu_budget();

// A call's part of cpu_budget(), given back at the end of the scope.
class CpuTurn {
 public:
  CpuTurn(Entry entry, int32_t num_threads);
  ~CpuTurn() { cpu_budget().leave(entry_); }
  CpuTurn(const CpuTurn&) = delete;
  CpuTurn& operator=(const CpuTurn&) = delete;

  int32_t threads() const { return threads_; }

 private:
  Entry entry_;
  int32_t threads_;
};

}  // namespace xlmr
