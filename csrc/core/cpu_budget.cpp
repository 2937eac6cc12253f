#include "core/cpu_budget.h"

#include <pthread.h>

#include <algorithm>
#include <new>
#include <thread>

#include "core/parallel.h"

namespace xlmr {

int32_t CpuBudget::enter(Entry entry, int32_t num_threads) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (entry == Entry::at_once) {
    ++short_;
  } else if (first_ == nullptr && running_ < capacity()) {
    ++running_;
  } else {
    Waiter self;
    (first_ == nullptr ? first_ : last_->next) = &self;
    last_ = &self;
    ++waiting_;
    self.turn.wait(lock, [&] { return self.entered; });
  }
  return share(num_threads);
}

void CpuBudget::leave(Entry entry) {
  const std::lock_guard<std::mutex> lock(mutex_);
  --(entry == Entry::at_once ? short_ : running_);
  admit();
}

void CpuBudget::set_capacity(int32_t capacity) {
  const std::lock_guard<std::mutex> lock(mutex_);
  capacity_.store(std::max(capacity, 1), std::memory_order_relaxed);
  admit();
}

int32_t CpuBudget::waiting() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return waiting_;
}

void CpuBudget::admit() {
  while (first_ != nullptr && running_ < capacity()) {
    Waiter* waiter = first_;
    first_ = waiter->next;
    --waiting_;
    ++running_;
    waiter->entered = true;
    // Under the lock: without it the waiter may be gone.
    waiter->turn.notify_one();
  }
}

int32_t CpuBudget::share(int32_t num_threads) const {
  const int32_t calls = running_ + waiting_ + short_;
  if (calls <= 1) return num_threads;
  int32_t part = capacity();
  for (int32_t parts = 1; parts < calls && part > 1; parts *= 2) part /= 2;
  return std::min(num_threads, part);
}

namespace {

alignas(CpuBudget) unsigned char storage[sizeof(CpuBudget)];

// In a forked child the threads that ran and waited are gone, and with them whoever held the lock.
void begin_anew() { new (storage) CpuBudget(cpu_budget().capacity()); }

const int fork_handler = [] {
  new (storage) CpuBudget(static_cast<int32_t>(std::max(1U, std::thread::hardware_concurrency())));
  return pthread_atfork(nullptr, nullptr, begin_anew);
}();

}  // namespace

CpuBudget& cpu_budget() {
  (void)fork_handler;
  return *std::launder(reinterpret_cast<CpuBudget*>(storage));
}

CpuTurn::CpuTurn(Entry entry, int32_t num_threads)
    : entry_(entry), threads_(cpu_budget().enter(entry, usable_threads(num_threads))) {}

}  // namespace xlmr
