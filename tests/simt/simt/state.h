// The state of the launch that an operating system's thread is running. Internal to the emulator.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "simt/emulator.h"
#include "simt/fiber.h"

namespace simt {

constexpr unsigned warp_size = 32;
constexpr unsigned max_threads = 1024;
constexpr unsigned max_warps = max_threads / warp_size;

// A cp.async on its way.
struct Copy {
  void* to;
  const void* from;  // null: zeros
  unsigned group;    // counted from the thread's first
};

struct Lane : Thread {
  Fiber* fiber;  // null before it starts
  Op waits_in;   // none: it can run, runs or has ended
  Site site;     // of the barrier or collective that it waits in
  std::vector<Copy> copies;
  unsigned groups;  // of copies, committed
};

// Sets of lanes are bits.
struct Warp {
  uint32_t present;  // the lanes that the block has
  uint32_t live;     // that have not ended
  uint32_t ready;    // that can run
  uint32_t arrived;  // that wait in the collective `op`
  Op op;
  Site site;
  uint32_t mask;
  // Two sets of slots, used in turn: a lane may leave a collective and enter the next before the
  // others have read, but never the one after that.
  unsigned turn;
  uint32_t votes[2];
  uint32_t epoch;  // counts __syncwarp and __syncthreads, which order memory
  uint64_t values[2][warp_size];
  alignas(64) Slot slots[2][warp_size];
};

struct State {
  State();

  Schedule schedule;
  uint64_t random;  // state of the generator
  Counters counters{};

  // The launch
  const char* kernel = nullptr;  // null while none runs
  uint64_t launch_random = 0;    // the generator's state when it began
  void (*call)(const void*) = nullptr;
  const void* function = nullptr;
  size_t function_bytes = 0;
  size_t shared_bytes = 0;
  Geometry geometry{};
  unsigned threads = 0, warps = 0;
  uint32_t launch_epoch = 0;

  // The block. Block epochs never repeat within a process, save by overflow.
  uint32_t epoch = 0;  // counts __syncthreads and beginnings of blocks
  uint32_t block_epoch = 0;
  unsigned live = 0;
  unsigned arrived = 0;  // threads that wait in __syncthreads
  Site barrier_site{};
  uint32_t ready_warps = 0;
  unsigned warp = 0;        // whose lanes run
  bool leave_warp = false;  // though it has ready lanes
  Lane* current = nullptr;

  Fiber main;
  FiberPool fibers;
  Lane lanes[max_threads]{};
  Warp warp_of[max_warps]{};
};

State& state();

// The running launch of this OS thread, or null.
extern __thread State* running __attribute__((tls_model("initial-exec")));

// --- Messages; each ends the process -------------------------------------------------------------
__attribute__((format(printf, 1, 2))) [[noreturn]] void fail(const char* format, ...);
// The same, followed by where every thread of the block is.
__attribute__((format(printf, 1, 2))) [[noreturn]] void fail_with_threads(const char* format, ...);

}  // namespace simt
