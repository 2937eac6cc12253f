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
  float a[4][2], b[2][2], c[2][2];
};
static_assert(sizeof(Fragments) == sizeof(Slot), "");

typedef float Quad __attribute__((vector_size(16)));

void multiply(Slot* slots) {
  float a[16][16];
  alignas(16) float b[16][8], c[16][8];
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    const unsigned g = lane / 4, t = lane % 4;
    Fragments f;
    std::memcpy(&f, slots[lane], sizeof f);
    std::memcpy(&a[g][2 * t], f.a[0], sizeof f.a[0]);
    std::memcpy(&a[g + 8][2 * t], f.a[1], sizeof f.a[1]);
    std::memcpy(&a[g][2 * t + 8], f.a[2], sizeof f.a[2]);
    std::memcpy(&a[g + 8][2 * t + 8], f.a[3], sizeof f.a[3]);
    for (unsigned i = 0; i < 2; ++i) {
      b[2 * t + i][g] = f.b[0][i];
      b[2 * t + i + 8][g] = f.b[1][i];
    }
    std::memcpy(&c[g][2 * t], f.c[0], sizeof f.c[0]);
    std::memcpy(&c[g + 8][2 * t], f.c[1], sizeof f.c[1]);
  }
  for (unsigned row = 0; row < 16; ++row) {
    Quad sums[2];
    std::memcpy(sums, c[row], sizeof sums);
    for (unsigned k = 0; k < 16; ++k) {
      Quad of_b[2];
      std::memcpy(of_b, b[k], sizeof of_b);
      sums[0] += a[row][k] * of_b[0];
      sums[1] += a[row][k] * of_b[1];
    }
    std::memcpy(c[row], sums, sizeof sums);
  }
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    const unsigned g = lane / 4, t = lane % 4;
    std::memcpy(slots[lane], &c[g][2 * t], 2 * sizeof(float));
    std::memcpy(slots[lane] + 2 * sizeof(float), &c[g + 8][2 * t], 2 * sizeof(float));
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
