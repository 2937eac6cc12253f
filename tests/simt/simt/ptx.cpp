#include "simt/ptx.h"

#include <algorithm>
#include <cstring>

#include "simt/race.h"
#include "simt/state.h"

namespace simt {
namespace {

// --- mma: fragment layouts of the PTX ISA --------------------------------------------------------
// Lane 4 g + t holds of A (16 x 16) rows g, g + 8 and columns 2 t, 2 t + 1, each + 8; of B (16 x 8)
// those k of column g; of C (16 x 8) columns 2 t, 2 t + 1 of rows g, g + 8.
struct Fragments {
  float a[8], b[4], c[4];
};
static_assert(sizeof(Fragments) == sizeof(Slot), "");

void multiply(Slot* slots) {
  float a[16][16], b[16][8], c[16][8];
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    const unsigned g = lane / 4, t = lane % 4;
    Fragments f;
    std::memcpy(&f, slots[lane], sizeof f);
    for (unsigned i = 0; i < 8; ++i) {
      a[g + (i / 2 % 2 ? 8 : 0)][2 * t + i % 2 + (i / 4 ? 8 : 0)] = f.a[i];
    }
    for (unsigned i = 0; i < 4; ++i) b[2 * t + i % 2 + (i / 2 ? 8 : 0)][g] = f.b[i];
    for (unsigned i = 0; i < 4; ++i) c[g + (i / 2 ? 8 : 0)][2 * t + i % 2] = f.c[i];
  }
  for (unsigned row = 0; row < 16; ++row) {
    for (unsigned k = 0; k < 16; ++k) {
      for (unsigned column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
    }
  }
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    const unsigned g = lane / 4, t = lane % 4;
    float mine[4];
    for (unsigned i = 0; i < 4; ++i) mine[i] = c[g + (i / 2 ? 8 : 0)][2 * t + i % 2];
    std::memcpy(slots[lane], mine, sizeof mine);
  }
}

void require_shared(const void* address, const char* what) {
  const State& s = *running;
  const auto at = reinterpret_cast<uintptr_t>(address);
  const auto first = reinterpret_cast<uintptr_t>(s.geometry.shared);
  if (at < first || at + 16 > first + s.shared_bytes) {
    fail("%s: the 16 bytes at offset %td are not in the %zu of shared memory", what,
         static_cast<const char*>(address) - static_cast<const char*>(s.geometry.shared),
         s.shared_bytes);
  }
  if (at % 16 != 0) fail("%s: an address in shared memory is not aligned to 16 bytes", what);
}

}  // namespace

void mma_m16n8k16(const float (&a)[8], const float (&b)[4], float (&c)[4], Site site) {
  Fragments f;
  std::memcpy(f.a, a, sizeof a);
  std::memcpy(f.b, b, sizeof b);
  std::memcpy(f.c, c, sizeof c);
  const Slot* slots = gather(Op::mma, &f, sizeof f, multiply, site);
  std::memcpy(c, slots[self().lane], sizeof c);
}

// Lanes 8 i to 8 i + 7 give the rows of matrix i; of it, lane 4 r + p receives elements 2 p and
// 2 p + 1 of row r (or, transposed, of column r).
void load_matrices(uint32_t* registers, unsigned matrices, bool transpose, const void* row,
                   Site site) {
  uint16_t mine[8] = {};
  const unsigned lane = self().lane;
  if (lane < 8 * matrices) {
    require_shared(row, "ldmatrix");
    check_access(row, sizeof mine, false, __builtin_return_address(0));
    std::memcpy(mine, row, sizeof mine);
  }
  const Slot* slots = gather(Op::ldmatrix, mine, sizeof mine, nullptr, site);
  for (unsigned i = 0; i < matrices; ++i) {
    uint16_t pair[2];
    for (unsigned e = 0; e < 2; ++e) {
      const unsigned across = 2 * (lane % 4) + e, along = lane / 4;
      const unsigned from = transpose ? across : along, column = transpose ? along : across;
      std::memcpy(&pair[e], slots[8 * i + from] + 2 * column, 2);
    }
    registers[i] = pair[0] | uint32_t(pair[1]) << 16;
  }
}

void copy_16_async(void* shared, const void* global) {
  require_shared(shared, "cp.async");
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fail("cp.async: a source is not aligned to 16 bytes");
  }
  check_access(shared, 16, true, __builtin_return_address(0));
  if (global) check_access(global, 16, false, __builtin_return_address(0));
  std::memset(shared, 0xff, 16);
  Lane& lane = *running->current;
  lane.copies.push_back({shared, global, lane.groups});
}

void commit_copies() { ++running->current->groups; }

void wait_for_copies(unsigned groups_left) {
  Lane& lane = *running->current;
  const auto lands = [&](const Copy& copy) { return copy.group + groups_left < lane.groups; };
  for (const Copy& copy : lane.copies) {
    if (!lands(copy)) continue;
    check_access(copy.to, 16, true, __builtin_return_address(0));
    if (copy.from) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
  }
  lane.copies.erase(std::remove_if(lane.copies.begin(), lane.copies.end(), lands),
                    lane.copies.end());
}

}  // namespace simt
