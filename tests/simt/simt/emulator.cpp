#include "simt/emulator.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string_view>
#include <vector>

#include "simt/state.h"

namespace simt {

__thread State* running __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

uint64_t draw(State& s) {  // xorshift64*
  s.random ^= s.random >> 12;
  s.random ^= s.random << 25;
  s.random ^= s.random >> 27;
  return s.random * 0x2545f4914f6cdd1dull >> 32;
}

unsigned lowest(uint32_t set) { return unsigned(__builtin_ctz(set)); }
unsigned highest(uint32_t set) { return 31 - unsigned(__builtin_clz(set)); }
// The first member at or after `start`, cyclically.
unsigned next_from(uint32_t set, unsigned start) {
  const uint32_t after = set & (~uint32_t(0) << start);
  return lowest(after ? after : set);
}

unsigned any_of(State& s, uint32_t set) {
  for (auto skipped = draw(s) % unsigned(__builtin_popcount(set)); skipped > 0; --skipped) {
    set &= set - 1;
  }
  return lowest(set);
}

// --- The scheduler -------------------------------------------------------------------------------
unsigned pick_warp(State& s) {
  switch (s.schedule) {
    case Schedule::forward:
      return lowest(s.ready_warps);
    case Schedule::reverse:
      return highest(s.ready_warps);
    case Schedule::random:
      return any_of(s, s.ready_warps);
    case Schedule::lockstep:
      return next_from(s.ready_warps, (s.warp + 1) % max_warps);
  }
  std::abort();
}

unsigned pick_lane(State& s, uint32_t ready) {
  switch (s.schedule) {
    case Schedule::reverse:
      return highest(ready);
    case Schedule::random:
      return next_from(ready, draw(s) % warp_size);
    default:
      return lowest(ready);
  }
}

// Makes the thread that runs next the current one; false where all have ended.
bool pick(State& s) {
  if (!(s.ready_warps >> s.warp & 1) || s.leave_warp) {
    if (s.ready_warps == 0) {
      if (s.live == 0) return false;
      fail_with_threads("deadlock: every thread that has not ended waits for others");
    }
    s.warp = pick_warp(s);
    s.leave_warp = false;
  }
  Warp& w = s.warp_of[s.warp];
  const unsigned lane = pick_lane(s, w.ready);
  w.ready &= ~(1u << lane);
  if (w.ready == 0) s.ready_warps &= ~(1u << s.warp);
  s.current = &s.lanes[s.warp * warp_size + lane];
  return true;
}

// Goes on with the current thread, on its own stack.
void enter_current(State& s, Fiber& from) {
  if (s.current->fiber == nullptr) s.current->fiber = &s.fibers.take();
  ++s.counters.switches;
  switch_fiber(from, *s.current->fiber);
}

void wait(State& s, Lane& lane) {
  pick(s);  // never false: this lane has not ended
  if (s.current != &lane) enter_current(s, *lane.fiber);
}

void end_thread(State& s) {
  Lane& lane = *s.current;
  Warp& w = s.warp_of[lane.warp];
  if (s.arrived != 0) fail_with_threads("a thread ended while others wait in __syncthreads");
  if (w.arrived != 0) fail_with_threads("a lane ended while others of its warp wait for it");
  if (!lane.copies.empty()) fail_with_threads("a thread ended before its cp.async have landed");
  lane.groups = 0;
  lane.fiber = nullptr;
  w.live &= ~(1u << lane.lane);
  --s.live;
}

// Runs threads from their beginning. One that ends without having waited costs no switch: the next
// begins on the same stack.
[[noreturn]] void run_threads() {
  State& s = *running;
  for (;;) {
    Fiber& fiber = *s.current->fiber;
    s.call(s.function);
    end_thread(s);
    const bool more = pick(s);
    if (more && s.current->fiber == nullptr) {
      s.current->fiber = &fiber;
      continue;
    }
    s.fibers.put_back(fiber);
    if (more) {
      enter_current(s, fiber);
    } else {
      ++s.counters.switches;
      switch_fiber(fiber, s.main);
    }
  }
}

void run_block(State& s) {
  ++s.counters.blocks;
  s.block_epoch = ++s.epoch;
  s.live = s.threads;
  s.arrived = 0;
  s.ready_warps = uint32_t((uint64_t(1) << s.warps) - 1);
  for (unsigned i = 0; i < s.warps; ++i) {
    Warp& w = s.warp_of[i];
    w.live = w.ready = w.present;
    w.arrived = 0;
    ++w.epoch;
  }
  // 0xff: a NaN in every floating type, -1 in integers; what is read before it is written shows.
  std::memset(s.geometry.shared, 0xff, s.shared_bytes);
  s.leave_warp = true;  // the schedule chooses the first warp, too
  s.warp = max_warps - 1;
  pick(s);
  enter_current(s, s.main);
}

void run_blocks(State& s) {
  const dim3 grid = s.geometry.grid;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  std::vector<uint64_t> drawn;
  if (s.schedule == Schedule::random) {
    drawn.resize(blocks);
    for (uint64_t i = 0; i < blocks; ++i) {
      const uint64_t other = draw(s) % (i + 1);
      drawn[i] = drawn[other];
      drawn[other] = i;
    }
  }
  for (uint64_t i = 0; i < blocks; ++i) {
    uint64_t block = i;
    if (s.schedule == Schedule::reverse) block = blocks - 1 - i;
    if (s.schedule == Schedule::random) block = drawn[i];
    if (s.schedule == Schedule::lockstep) block = i % 2 ? blocks - 1 - i / 2 : i / 2;
    s.geometry.block_index = dim3(unsigned(block % grid.x), unsigned(block / grid.x % grid.y),
                                  unsigned(block / grid.x / grid.y));
    run_block(s);
  }
}

void number_threads(State& s, dim3 block) {
  s.threads = block.x * block.y * block.z;
  s.warps = (s.threads + warp_size - 1) / warp_size;
  for (unsigned i = 0; i < s.warps; ++i) s.warp_of[i].present = 0;
  for (unsigned i = 0; i < s.threads; ++i) {
    Lane& lane = s.lanes[i];
    lane.index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
    lane.linear = i;
    lane.warp = i / warp_size;
    lane.lane = i % warp_size;
    lane.fiber = nullptr;
    lane.waits_in = Op::none;
    lane.groups = 0;
    s.warp_of[lane.warp].present |= 1u << lane.lane;
  }
}

// --- Collectives ---------------------------------------------------------------------------------
bool same(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

struct Exchange {
  Warp& warp;
  unsigned turn;
};

// Announces the lane at a collective and waits for the others. `give` leaves what they may read;
// `complete` is run once all have.
template <class Give, class Complete>
Exchange meet(Op op, uint32_t mask, Site site, Give give, Complete complete) {
  State& s = *running;
  Lane& lane = *s.current;
  Warp& w = s.warp_of[lane.warp];
  const unsigned turn = w.turn;
  lane.waits_in = op;
  lane.site = site;
  if (w.live != w.present) fail_with_threads("a collective after lanes of the warp have ended");
  if ((mask & w.present) != w.present) {
    fail_with_threads("mask 0x%08x leaves out lanes of the warp; only whole warps are supported",
                      mask);
  }
  if (w.arrived == 0) {
    w.op = op;
    w.site = site;
    w.mask = mask;
    w.votes[turn] = 0;
  } else if (w.op != op || w.mask != mask || !same(w.site, site)) {
    fail_with_threads("lanes of one warp came to different collectives");
  }
  give(w, turn, lane.lane);
  w.arrived |= 1u << lane.lane;
  if (w.arrived == w.present) {
    complete(w, turn);
    w.arrived = 0;
    w.turn ^= 1;
    w.ready = w.present;
    s.ready_warps |= 1u << lane.warp;
    if (op == Op::syncwarp) ++w.epoch;
    s.leave_warp =
        s.schedule == Schedule::lockstep || (s.schedule == Schedule::random && draw(s) % 4 == 0);
  }
  wait(s, lane);
  lane.waits_in = Op::none;
  return {w, turn};
}
template <class Give>
Exchange meet(Op op, uint32_t mask, Site site, Give give) {
  return meet(op, mask, site, give, [](Warp&, unsigned) {});
}

void set_schedule_by_environment() {
  const char* chosen = std::getenv("XLMR_SIMT_SCHEDULE");
  const std::string_view name = chosen ? chosen : "forward";
  for (Schedule schedule : schedules) {
    if (name == name_of(schedule)) return set_schedule(schedule);
  }
  if (name.substr(0, 7) == "random:") {
    return set_schedule(Schedule::random, std::strtoull(chosen + 7, nullptr, 0));
  }
  fail("XLMR_SIMT_SCHEDULE is '%s'; expected forward, reverse, random, random:SEED or lockstep",
       chosen);
}

}  // namespace

State::State() : fibers(run_threads) {}

State& state() {
  static thread_local std::unique_ptr<State> instance;
  if (!instance) {
    instance = std::make_unique<State>();
    set_schedule_by_environment();
  }
  return *instance;
}

void set_schedule(Schedule schedule, uint64_t seed) {
  State& s = state();
  s.schedule = schedule;
  s.random = seed ? seed : 1;  // zero would stay zero
}

Counters counters() { return state().counters; }

const Thread& self() { return *running->current; }
const Geometry& geometry() { return running->geometry; }

void block_barrier(Site site) {
  State& s = *running;
  Lane& lane = *s.current;
  lane.waits_in = Op::syncthreads;
  lane.site = site;
  if (s.live != s.threads) fail_with_threads("__syncthreads after threads of the block have ended");
  if (s.arrived == 0) {
    s.barrier_site = site;
  } else if (!same(s.barrier_site, site)) {
    fail_with_threads("threads of one block came to different __syncthreads");
  }
  if (++s.arrived == s.threads) {
    s.arrived = 0;
    ++s.epoch;
    for (unsigned i = 0; i < s.warps; ++i) {
      s.warp_of[i].ready = s.warp_of[i].present;
      ++s.warp_of[i].epoch;
    }
    s.ready_warps = uint32_t((uint64_t(1) << s.warps) - 1);
    s.leave_warp = true;
  }
  wait(s, lane);
  lane.waits_in = Op::none;
}

void warp_barrier(Op op, uint32_t mask, Site site) {
  meet(op, mask, site, [](Warp&, unsigned, unsigned) {});
}

uint64_t shuffle(Op op, uint32_t mask, uint64_t value, unsigned source, Site site) {
  const Exchange e = meet(op, mask, site, [value](Warp& w, unsigned turn, unsigned lane) {
    w.values[turn][lane] = value;
  });
  if (!(e.warp.present >> source & 1)) {
    fail_with_threads("a shuffle reads lane %u, which the warp does not have", source);
  }
  return e.warp.values[e.turn][source];
}

uint32_t vote(Op op, uint32_t mask, bool predicate, Site site) {
  const Exchange e = meet(op, mask, site, [predicate](Warp& w, unsigned turn, unsigned lane) {
    w.votes[turn] |= uint32_t(predicate) << lane;
  });
  return e.warp.votes[e.turn];
}

uint32_t participants() { return running->warp_of[running->current->warp].present; }

const Slot* gather(Op op, const void* value, size_t bytes, void (*complete)(Slot*), Site site) {
  const Exchange e = meet(
      op, ~uint32_t(0), site,
      [=](Warp& w, unsigned turn, unsigned lane) {
        std::memcpy(w.slots[turn][lane], value, bytes);
      },
      [=](Warp& w, unsigned turn) {
        if (w.present != ~uint32_t(0)) fail_with_threads("this collective needs 32 lanes");
        if (complete) complete(w.slots[turn]);
      });
  return e.warp.slots[e.turn];
}

const char* launch_erased(const char* name, dim3 grid, dim3 block, size_t shared_bytes,
                          void (*call)(const void*), const void* function, size_t function_bytes) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > max_threads || block.x > 1024 || block.y > 1024 || block.z > 64 ||
      grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z == 0 ||
      grid.z > 65535) {
    return "cudaErrorInvalidConfiguration";
  }
  if (shared_bytes > max_shared_bytes) return "cudaErrorInvalidValue";
  State& s = state();
  if (running) fail("kernel %s launched from within a kernel", name);
  running = &s;
  ++s.counters.launches;
  s.kernel = name;
  s.launch_random = s.random;
  s.call = call;
  s.function = function;
  s.function_bytes = function_bytes;
  s.shared_bytes = shared_bytes;
  s.geometry.grid = grid;
  s.geometry.block = block;
  number_threads(s, block);
  s.launch_epoch = s.epoch + 1;
  // Of its exact size and on the heap, so that AddressSanitizer sees an overrun; malloc aligns to
  // 16 bytes, as much as a device promises.
  const std::unique_ptr<void, void (*)(void*)> shared(std::malloc(shared_bytes), std::free);
  s.geometry.shared = shared.get();
  run_blocks(s);
  running = nullptr;
  return nullptr;
}

}  // namespace simt
