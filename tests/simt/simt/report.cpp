// The emulator's messages: what went wrong, in which kernel and block, and where its threads are.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

#include "simt/state.h"

namespace simt {
namespace {

const char* name_of(Op op) {
  switch (op) {
    case Op::none:
      break;
    case Op::syncthreads:
      return "__syncthreads";
    case Op::syncwarp:
      return "__syncwarp";
    case Op::shfl:
      return "__shfl_sync";
    case Op::shfl_up:
      return "__shfl_up_sync";
    case Op::shfl_down:
      return "__shfl_down_sync";
    case Op::shfl_xor:
      return "__shfl_xor_sync";
    case Op::ballot:
      return "__ballot_sync";
    case Op::any:
      return "__any_sync";
    case Op::all:
      return "__all_sync";
    case Op::mma:
      return "mma";
    case Op::ldmatrix:
      return "ldmatrix";
  }
  return "?";
}

// "0-3, 7" of a set of lanes.
std::string ranges(uint32_t set) {
  std::string text;
  for (unsigned i = 0; i < warp_size; ++i) {
    if (!(set >> i & 1)) continue;
    unsigned end = i;
    while (end + 1 < warp_size && (set >> (end + 1) & 1)) ++end;
    text += (text.empty() ? "" : ", ") + std::to_string(i);
    if (end > i) text += "-" + std::to_string(end);
    i = end;
  }
  return text;
}

void print_lanes(unsigned warp, uint32_t set, const std::string& what) {
  if (set)
    std::fprintf(stderr, "  warp %u: lanes %s %s\n", warp, ranges(set).c_str(), what.c_str());
}

void print_warp(const State& s, unsigned warp) {
  const Warp& w = s.warp_of[warp];
  print_lanes(warp, w.present & ~w.live, "have ended");
  uint32_t running_lanes = 0;
  uint32_t done = 0;
  for (unsigned i = 0; i < warp_size; ++i) {
    const Lane& lane = s.lanes[warp * warp_size + i];
    if (!(w.live >> i & 1) || (done >> i & 1)) continue;
    if (lane.waits_in == Op::none) {
      running_lanes |= 1u << i;
      continue;
    }
    uint32_t group = 0;
    for (unsigned j = i; j < warp_size; ++j) {
      const Lane& other = s.lanes[warp * warp_size + j];
      const bool alike = (w.live >> j & 1) && other.waits_in == lane.waits_in &&
                         other.site.line == lane.site.line &&
                         std::string_view(other.site.file) == lane.site.file;
      if (alike) group |= 1u << j;
    }
    done |= group;
    print_lanes(warp, group,
                std::string("are in ") + name_of(lane.waits_in) + " at " + lane.site.file + ":" +
                    std::to_string(lane.site.line));
  }
  print_lanes(warp, running_lanes, "run or can run");
}

void print_message(const char* format, va_list arguments) {
  std::fflush(stdout);
  std::fprintf(stderr, "simt: ");
  std::vfprintf(stderr, format, arguments);
  if (const State* s = running) {
    const dim3 b = s->geometry.block_index;
    const dim3 t = s->current->index;
    std::fprintf(stderr, "\n  kernel %s, block (%u, %u, %u), thread (%u, %u, %u), schedule %s",
                 s->kernel, b.x, b.y, b.z, t.x, t.y, t.z, name_of(s->schedule));
    if (s->schedule == Schedule::random) {
      std::fprintf(stderr, ":0x%llx", static_cast<unsigned long long>(s->launch_random));
    }
  }
  std::fprintf(stderr, "\n");
}

}  // namespace

const char* name_of(Schedule schedule) {
  switch (schedule) {
    case Schedule::forward:
      return "forward";
    case Schedule::reverse:
      return "reverse";
    case Schedule::random:
      return "random";
    case Schedule::lockstep:
      return "lockstep";
  }
  return "?";
}

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  print_message(format, arguments);
  va_end(arguments);
  std::abort();
}

void fail_with_threads(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  print_message(format, arguments);
  va_end(arguments);
  for (unsigned warp = 0; warp < running->warps; ++warp) print_warp(*running, warp);
  std::abort();
}

}  // namespace simt
