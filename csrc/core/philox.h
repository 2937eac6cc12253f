// Counter-based random numbers for dropout: Philox4x32-10, Salmon et al. 2011, "Parallel random
// numbers: as easy as 1, 2, 3", section 3.3. A mask bit is a pure function of its place, so it is
// the same on every instruction set, thread count and device, and is never stored.
//
//   key     = (seed low word, seed high word)
//   counter = (column / 4, row, head, site)
//   column c takes word c % 4, and is kept iff that word >= threshold(p).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define XLMR_HD __host__ __device__
#else
#define XLMR_HD
#endif

namespace xlmr {
// Internal linkage on purpose: this header is compiled once per instruction set.
namespace {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// Integers only from here on: p reaches the kernels as the threshold below which a word drops.
XLMR_HD constexpr uint32_t dropout_threshold(double p) {
  const double scaled = p * 4294967296.0;
  return scaled >= 4294967295.0 ? 4294967295u : static_cast<uint32_t>(scaled);
}

// One round on one counter (c0, c1, c2, c3).
XLMR_HD inline void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3,
                                 uint32_t k0, uint32_t k1) {
  const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0;
  const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
  const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
  const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
  c1 = static_cast<uint32_t>(p1);
  c3 = static_cast<uint32_t>(p0);
  c0 = n0;
  c2 = n2;
}

}  // namespace
}  // namespace xlmr
