#include "core/parallel.h"

#include <pthread.h>

#include <atomic>

#include "core/team.h"

namespace xlmr {
namespace {

std::atomic<bool> forked_child{false};

void enter_serial_mode() { forked_child.store(true, std::memory_order_relaxed); }

const int fork_handler = pthread_atfork(nullptr, nullptr, enter_serial_mode);

struct Work {
  TaskFn fn;
  void* arg;
  int64_t tasks;
  std::atomic<int64_t> next{0};
};

void take_tasks(void* arg, int32_t thread) {
  Work& work = *static_cast<Work*>(arg);
  for (int64_t task = work.next.fetch_add(1, std::memory_order_relaxed); task < work.tasks;
       task = work.next.fetch_add(1, std::memory_order_relaxed)) {
    work.fn(work.arg, task, thread);
  }
}

}  // namespace

int32_t usable_threads(int32_t num_threads) {
  (void)fork_handler;
  const bool serial = num_threads <= 1 || forked_child.load(std::memory_order_relaxed) || in_team();
  return serial ? 1 : num_threads;
}

void parallel_tasks(int32_t num_threads, int64_t tasks, TaskFn fn, void* arg) {
  if (tasks <= 1 || usable_threads(num_threads) == 1) {
    for (int64_t task = 0; task < tasks; ++task) fn(arg, task, 0);
    return;
  }
  Work work{fn, arg, tasks};
  run_team(num_threads, take_tasks, &work);
}

}  // namespace xlmr
