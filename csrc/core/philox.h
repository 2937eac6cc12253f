// Counter-based random numbers for dropout: Philox4x32-10, Salmon et al. 2011, "Parallel random
// numbers: as easy as 1, 2, 3", section 3.3. A mask bit is a pure function of its place, so it is
// the same on every instruction set, thread count and device, and is never stored.
//
//   key     = (seed low word, seed high word)
//   counter = (column / 4, row, head, site)
//   column c takes word c % 4, and is kept iff that word >= threshold(p).
#pragma once

#include <cstdint>

#include "core/host_device.h"

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

// One round on the four words of a counter, or of one counter a lane. A word is the low half of 64
// bits, and what is above it is left to chance. multiply(w, m) gives the product of a word with m.
template <class Word, class Multiply>
XLMR_HD inline void philox_round(Word (&c)[4], uint64_t k0, uint64_t k1, const Multiply& multiply) {
  const Word p0 = multiply(c[0], uint64_t{kPhiloxM0});
  const Word p1 = multiply(c[2], uint64_t{kPhiloxM1});
  c[0] = (p1 >> 32) ^ c[1] ^ k0;
  c[2] = (p0 >> 32) ^ c[3] ^ k1;
  c[1] = p1;
  c[3] = p0;
}

}  // namespace
}  // namespace xlmr
