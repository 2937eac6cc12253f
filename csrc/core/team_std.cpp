#include <thread>
#include <vector>

#include "core/parallel.h"
#include "core/team.h"

namespace xlmr {
namespace {

thread_local bool at_work = false;

}  // namespace

bool in_team() { return at_work; }

void run_team(int32_t num_threads, void (*fn)(void* arg, int32_t thread), void* arg) {
  const auto work = [=](int32_t thread) {
    at_work = true;
    fn(arg, thread);
    at_work = false;
  };
  std::vector<std::thread> others;
  for (int32_t thread = 1; thread < num_threads; ++thread) others.emplace_back(work, thread);
  work(0);
  for (std::thread& other : others) other.join();
}

int32_t openmp_version() { return 0; }

}  // namespace xlmr
