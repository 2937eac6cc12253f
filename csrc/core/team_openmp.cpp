#include <omp.h>

#include "core/parallel.h"
#include "core/team.h"

namespace xlmr {

bool in_team() { return omp_in_parallel() != 0; }

void run_team(int32_t num_threads, void (*fn)(void* arg, int32_t thread), void* arg) {
  if (num_threads < omp_get_max_threads()) {
    // Fewer than torch's team: under a CPU quota, or beside other callers. The rest of a full team
    // would have nothing to do and spin at its end, on processors that others need.
#pragma omp parallel num_threads(num_threads)
    fn(arg, omp_get_thread_num());
    return;
  }
  // No num_threads clause otherwise: where it differs from torch's own number, libgomp ends
  // threads and starts others at every change (pytorch issue 32008).
#pragma omp parallel
  {
    const int32_t thread = omp_get_thread_num();
    if (thread < num_threads) fn(arg, thread);
  }
}

int32_t openmp_version() { return _OPENMP; }

}  // namespace xlmr
