// What parallel_tasks() runs on. Two files define it, of which XLMR_EXT_THREADS of CMakeLists.txt
// picks one: team_openmp.cpp, or team_std.cpp for ThreadSanitizer, which cannot see into libgomp.
#pragma once

#include <cstdint>

namespace xlmr {

// Whether the calling thread is at work in a team.
bool in_team();

// fn(arg, thread) once on each thread of a team of at most num_threads, the caller among them.
void run_team(int32_t num_threads, void (*fn)(void* arg, int32_t thread), void* arg);

}  // namespace xlmr
