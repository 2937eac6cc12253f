// What a kernel and its launcher ask of the emulator. The CUDA spelling of all this is simt.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "simt/vector_types.h"

namespace simt {

// Where a barrier or a collective stands in the source.
struct Site {
  const char* file;
  int line;

  // As a default argument: the place of the call.
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// The order in which blocks, the warps of a block and the lanes of a warp run. A warp runs until
// all of its lanes wait for other warps or have ended; its lanes run one after the other, each to
// its next collective.
//   forward   rising
//   reverse   falling
//   random    drawn; now and then a warp is left early
//   lockstep  warps take turns after each collective; blocks from both ends of the grid
enum class Schedule { forward, reverse, random, lockstep };
constexpr Schedule schedules[] = {Schedule::forward, Schedule::reverse, Schedule::random,
                                  Schedule::lockstep};
const char* name_of(Schedule schedule);

// For launches from the calling OS thread. Before the first call the schedule is that of the
// environment: XLMR_SIMT_SCHEDULE=forward|reverse|random|random:SEED|lockstep, else forward.
void set_schedule(Schedule schedule, uint64_t seed = 1);

// What ran so far, of the calling OS thread.
struct Counters {
  uint64_t launches, blocks, switches;
};
Counters counters();

constexpr size_t max_shared_bytes = 99 << 10;  // of the smallest architecture supported

// --- What the running thread asks ----------------------------------------------------------------
struct Thread {
  dim3 index;
  unsigned linear, warp, lane;
};
struct Geometry {
  dim3 grid, block, block_index;
  void* shared;  // the dynamic shared memory
};
// The answers do not change while one emulated thread runs, so they may be kept in registers.
__attribute__((const)) const Thread& self();
__attribute__((const)) const Geometry& geometry();
inline void* shared_memory() { return geometry().shared; }

enum class Op : uint8_t {
  none,
  syncthreads,
  syncwarp,
  shfl,
  shfl_up,
  shfl_down,
  shfl_xor,
  ballot,
  any,
  all,
  mma,
  ldmatrix,
};

void block_barrier(Site site);
// Waits for the other lanes of the warp.
void warp_barrier(Op op, uint32_t mask, Site site);
// The 8 bytes that lane `source` gave.
uint64_t shuffle(Op op, uint32_t mask, uint64_t value, unsigned source, Site site);
// One bit for each lane whose predicate holds.
uint32_t vote(Op op, uint32_t mask, bool predicate, Site site);
// The lanes that take part in a collective of this warp.
uint32_t participants();
// What each of 32 lanes gave, at most a slot, after `complete` (which may be null) has seen and
// changed it; valid until the lane's next collective but one.
using Slot = unsigned char[64];
const Slot* gather(Op op, const void* value, size_t bytes, void (*complete)(Slot*), Site site);

// --- Launch --------------------------------------------------------------------------------------
const char* launch_erased(const char* name, dim3 grid, dim3 block, size_t shared_bytes,
                          void (*call)(const void*), const void* function, size_t function_bytes);

// Runs function() once for each thread of each block, and returns when all have ended. Answers
// null, or the name of the error with which a device would refuse this launch. A kernel's own error
// ends the process with a message to stderr.
template <class F>
const char* launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes,
                   const F& function) {
  return launch_erased(
      name, grid, block, shared_bytes, [](const void* f) { (*static_cast<const F*>(f))(); },
      &function, sizeof function);
}

}  // namespace simt
