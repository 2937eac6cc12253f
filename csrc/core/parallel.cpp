#include "core/parallel.h"

#include <omp.h>
#include <pthread.h>

#include <atomic>

namespace xlmr {
namespace {

std::atomic<bool> forked_child{false};

void enter_serial_mode() { forked_child.store(true, std::memory_order_relaxed); }

const int fork_handler = pthread_atfork(nullptr, nullptr, enter_serial_mode);

}  // namespace

void parallel_tasks(int32_t num_threads, int64_t tasks, TaskFn fn, void* arg) {
  (void)fork_handler;
  if (num_threads <= 1 || tasks <= 1 || omp_in_parallel() ||
      forked_child.load(std::memory_order_relaxed)) {
    for (int64_t task = 0; task < tasks; ++task) fn(arg, task, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  // No num_threads clause: changing the team's size makes libgomp build a new pool
  // (pytorch issue 32008). Surplus threads leave at once.
#pragma omp parallel
  {
    const int32_t thread = omp_get_thread_num();
    if (thread < num_threads) {
      for (int64_t task = next.fetch_add(1, std::memory_order_relaxed); task < tasks;
           task = next.fetch_add(1, std::memory_order_relaxed)) {
        fn(arg, task, thread);
      }
    }
  }
}

int32_t openmp_version() { return _OPENMP; }

}  // namespace xlmr
