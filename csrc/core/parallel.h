// The only door to threads. Tasks run on torch's own OpenMP team (team.h).
#pragma once

#include <cstdint>

namespace xlmr {

using TaskFn = void (*)(void* arg, int64_t task, int32_t thread);

// Runs fn(arg, task, thread) for every task in [0, tasks), each once, on at most num_threads
// threads; thread is in [0, num_threads). Tasks are handed out in ascending order as threads
// become free, so put the long ones first. Runs serially inside another parallel region and in a
// forked child (an OpenMP team does not survive fork). fn must not throw.
void parallel_tasks(int32_t num_threads, int64_t tasks, TaskFn fn, void* arg);

// The threads that parallel_tasks() would take of num_threads: 1 where it runs serially.
int32_t usable_threads(int32_t num_threads);

// What the OpenMP runtime says of itself, for build_info(); 0 without OpenMP.
int32_t openmp_version();

}  // namespace xlmr
