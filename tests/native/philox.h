// Philox4x32-10 written plainly (Salmon et al. 2011, section 3.3): the test's own, so that it
// shares no line with the kernels.
#pragma once

#include <array>
#include <cstdint>

namespace test {

using Words = std::array<uint32_t, 4>;

inline Words philox(Words counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(0xD2511F53u) * counter[0];
    const uint64_t product1 = uint64_t(0xCD9E8D57u) * counter[2];
    counter = {uint32_t(product1 >> 32) ^ counter[1] ^ key0, uint32_t(product1),
               uint32_t(product0 >> 32) ^ counter[3] ^ key1, uint32_t(product0)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// Whether dropout keeps the element; see csrc/core/philox.h for the rule.
inline bool keeps(double p, int64_t seed, int64_t site, int64_t head, int64_t row, int64_t column) {
  const uint32_t threshold = uint32_t(p * 4294967296.0);
  const Words words = philox({uint32_t(column / 4), uint32_t(row), uint32_t(head), uint32_t(site)},
                             uint32_t(uint64_t(seed)), uint32_t(uint64_t(seed) >> 32));
  return words[column % 4] >= threshold;
}

}  // namespace test
