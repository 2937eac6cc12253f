#include "simt/race.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "simt/state.h"

namespace simt {
namespace {

constexpr uint8_t several = 0xff;

// What happened to some bytes. Of the reads it keeps as much as a later write must know; an access
// that is ordered before the one that replaces it is ordered before all that follow.
struct Cell {
  uint32_t write_epoch;  // the block's, 0: never
  uint32_t write_warp_epoch;
  uint16_t writer;       // linear thread
  uint8_t reading_warp;  // of the last epoch with reads; or several
  uint8_t reading_lane;  // of the last warp epoch with reads; or several
  uint32_t first_read_epoch;
  uint32_t read_epoch;
  uint32_t read_warp_epoch;
};

// A cell for each 4 bytes; for each byte once an access was smaller or not aligned.
struct Page {
  static constexpr unsigned shift = 12;
  static constexpr uintptr_t bytes = uintptr_t(1) << shift;
  static constexpr uintptr_t word = 4;

  std::vector<Cell> cells = std::vector<Cell>(bytes / word);
  bool split = false;

  void split_words() {
    std::vector<Cell> bytewise;
    bytewise.reserve(bytes);
    for (const Cell& cell : cells) bytewise.insert(bytewise.end(), word, cell);
    cells = std::move(bytewise);
    split = true;
  }
};

struct Shadow {
  static constexpr size_t most_pages = 1 << 14;  // 400 MB, or more where pages are split

  std::unordered_map<uintptr_t, Page> pages;
  struct Recent {
    uintptr_t number;
    Page* page;
  } recent[256] = {};

  // The blocks of this launch by their epochs, for messages.
  struct Began {
    uint32_t epoch;
    dim3 block;
  };
  std::vector<Began> blocks;
  uint32_t launch_epoch = 0;

  Page& page(uintptr_t number) {
    Recent& slot = recent[number % 256];
    if (slot.page == nullptr || slot.number != number) slot = {number, &pages[number]};
    return *slot.page;
  }

  void begin_block(const State& s) {
    if (launch_epoch != s.launch_epoch) {
      // Cells of earlier launches are recognised by their epochs and may stay, unless epochs began
      // anew.
      if (pages.size() > most_pages || s.launch_epoch < launch_epoch) {
        pages.clear();
        std::fill(std::begin(recent), std::end(recent), Recent{});
      }
      launch_epoch = s.launch_epoch;
      blocks.clear();
    }
    blocks.push_back({s.block_epoch, s.geometry.block_index});
  }

  dim3 block_of(uint32_t epoch) const {
    const auto after = std::upper_bound(blocks.begin(), blocks.end(), epoch,
                                        [](uint32_t e, const Began& b) { return e < b.epoch; });
    return (after - 1)->block;
  }
};

Shadow& shadow() {
  static thread_local std::unique_ptr<Shadow> instance;
  if (!instance) instance = std::make_unique<Shadow>();
  return *instance;
}

// --- Messages ------------------------------------------------------------------------------------
std::string text_of(dim3 at) {
  return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) +
         ")";
}

// "file:line" where addr2line is at hand.
std::string text_of_code(const void* code) {
  Dl_info info;
  if (!dladdr(code, &info) || !info.dli_fname) return "?";
  char command[512];
  const size_t offset =
      size_t(static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase)) - 1;
  std::snprintf(command, sizeof command, "addr2line -spe '%s' 0x%zx 2>/dev/null", info.dli_fname,
                offset);
  std::string text;
  if (FILE* pipe = popen(command, "r")) {
    char line[1024];
    if (std::fgets(line, sizeof line, pipe)) text = line;
    pclose(pipe);
  }
  while (!text.empty() && text.back() == '\n') text.pop_back();
  return text.empty() ? std::string(info.dli_fname) + "+" + std::to_string(offset) : text;
}

struct Access {
  const State& s;
  uintptr_t address;
  bool write, shared;
  const void* code;
};

// `who` did it before, `did` is "written" or "read".
[[noreturn]] void report(const Access& a, const char* did, const std::string& who,
                         const char* missing) {
  char place[64];
  if (a.shared) {
    std::snprintf(place, sizeof place, "byte %zu of %zu of shared memory",
                  size_t(a.address - reinterpret_cast<uintptr_t>(a.s.geometry.shared)),
                  a.s.shared_bytes);
  } else {
    std::snprintf(place, sizeof place, "global memory at 0x%zx", size_t(a.address));
  }
  fail("race: %s, %s by %s, is %s by thread %s%s\n  at %s", place, did, who.c_str(),
       a.write ? "written" : "read", text_of(a.s.current->index).c_str(), missing,
       text_of_code(a.code).c_str());
}

constexpr const char* no_syncthreads = " with no __syncthreads between";
constexpr const char* no_syncwarp = " of the same warp with no __syncwarp between";

[[noreturn]] void report_block(const Access& a, const char* did, uint32_t epoch) {
  report(a, did, "block " + text_of(shadow().block_of(epoch)), " of another block");
}

// --- The checks ----------------------------------------------------------------------------------
// Of accesses before `oldest`, another block's or another launch's, nothing is known or asked.
void check_last_write(const Access& a, const Cell& cell, uint32_t oldest) {
  const State& s = a.s;
  if (cell.write_epoch < oldest) return;
  if (cell.write_epoch < s.block_epoch) report_block(a, "written", cell.write_epoch);
  if (cell.write_epoch != s.epoch || cell.writer == s.current->linear) return;
  const bool same_warp = cell.writer / warp_size == s.current->warp;
  if (same_warp && cell.write_warp_epoch != s.warp_of[s.current->warp].epoch) return;
  report(a, "written", "thread " + text_of(s.lanes[cell.writer].index),
         same_warp ? no_syncwarp : no_syncthreads);
}

void check_last_reads(const Access& a, const Cell& cell, uint32_t oldest) {
  const State& s = a.s;
  if (cell.read_epoch < oldest) return;
  if (cell.first_read_epoch >= oldest && cell.first_read_epoch < s.block_epoch) {
    report_block(a, "read", cell.first_read_epoch);
  }
  if (cell.read_epoch != s.epoch) return;
  if (cell.reading_warp == several) report(a, "read", "several warps", no_syncthreads);
  if (cell.reading_warp != s.current->warp) {
    report(a, "read", "warp " + std::to_string(cell.reading_warp), no_syncthreads);
  }
  if (cell.read_warp_epoch != s.warp_of[s.current->warp].epoch) return;
  if (cell.reading_lane == s.current->lane) return;
  report(
      a, "read",
      cell.reading_lane == several ? "several lanes" : "lane " + std::to_string(cell.reading_lane),
      no_syncwarp);
}

void record_read(const State& s, Cell& cell, uint32_t oldest) {
  const uint32_t warp_epoch = s.warp_of[s.current->warp].epoch;
  if (cell.first_read_epoch < oldest) cell.first_read_epoch = s.epoch;
  if (cell.read_epoch != s.epoch) {
    cell.read_epoch = s.epoch;
    cell.reading_warp = uint8_t(s.current->warp);
  } else if (cell.reading_warp != s.current->warp) {
    cell.reading_warp = several;
    return;
  } else if (cell.read_warp_epoch == warp_epoch) {
    if (cell.reading_lane != s.current->lane) cell.reading_lane = several;
    return;
  }
  cell.read_warp_epoch = warp_epoch;
  cell.reading_lane = uint8_t(s.current->lane);
}

void record_write(const State& s, Cell& cell) {
  cell.write_epoch = s.epoch;
  cell.write_warp_epoch = s.warp_of[s.current->warp].epoch;
  cell.writer = uint16_t(s.current->linear);
}

void check_cell(const Access& a, Cell& cell, uint32_t oldest) {
  check_last_write(a, cell, oldest);
  if (a.write) {
    check_last_reads(a, cell, oldest);
    record_write(a.s, cell);
  } else {
    record_read(a.s, cell, oldest);
  }
}

bool inside(uintptr_t address, const void* low, size_t bytes) {
  return address - reinterpret_cast<uintptr_t>(low) < bytes;
}

}  // namespace

void check_access(const void* where, size_t bytes, bool write, const void* code) {
  State* s = running;
  if (s == nullptr) return;
  uintptr_t address = reinterpret_cast<uintptr_t>(where);
  const Fiber& fiber = *s->current->fiber;
  if (inside(address, fiber.stack_low, fiber.stack_size)) return;
  if (inside(address, s, sizeof *s)) return;                    // threadIdx and the like
  if (inside(address, s->function, s->function_bytes)) return;  // the kernel's arguments

  Shadow& all = shadow();
  if (all.blocks.empty() || all.blocks.back().epoch != s->block_epoch) all.begin_block(*s);
  const bool shared = inside(address, s->geometry.shared, s->shared_bytes);
  const uint32_t oldest = shared ? s->block_epoch : s->launch_epoch;
  const bool words = address % Page::word == 0 && bytes % Page::word == 0;
  for (const uintptr_t end = address + bytes; address < end;) {
    Page& page = all.page(address >> Page::shift);
    if (!words && !page.split) page.split_words();
    const uintptr_t page_end = std::min(end, (address | (Page::bytes - 1)) + 1);
    const uintptr_t step = page.split ? 1 : Page::word;
    Cell* cell = page.cells.data() + (address & (Page::bytes - 1)) / step;
    for (; address < page_end; address += step) {
      check_cell({*s, address, write, shared, code}, *cell++, oldest);
    }
  }
}

}  // namespace simt
