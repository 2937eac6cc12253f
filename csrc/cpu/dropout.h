// Rows of dropout's mask. See core/philox.h for what a mask bit is.
#pragma once

#include "core/philox.h"
#include "cpu/isa.h"
#include "ops.h"

namespace xlmr::XLMR_ISA {
namespace {

template <class T>
class DropoutMask {
 public:
  explicit DropoutMask(const Dropout& d)
      : on_(d.p > 0.0),
        threshold_(dropout_threshold(d.p)),
        site_(static_cast<uint32_t>(d.site)),
        keep_(static_cast<T>(1.0 / (1.0 - d.p))) {
    const uint64_t seed = on_ ? static_cast<uint64_t>(*d.seed) : 0;
    key_[0] = static_cast<uint32_t>(seed);
    key_[1] = static_cast<uint32_t>(seed >> 32);
  }

  bool on() const { return on_; }

  // mask[j] = 0 or 1 / (1 - p) for column + j, j < n; writes up to kGroup - 1 elements more.
  // column is a multiple of 4.
  void row(int64_t head, int64_t row, int64_t column, int64_t n, T* mask) const {
    const auto multiply = [](Words words, uint64_t m) { return multiply_low(words, Words{} + m); };
    Words step;  // a counter a lane
    for (int i = 0; i < kLanes; ++i) step[i] = static_cast<uint64_t>(i);
    for (int64_t j = 0; j < n; j += kGroup) {
      Words word[kVectors][4];
      for (int v = 0; v < kVectors; ++v) {
        word[v][0] = step + static_cast<uint64_t>((column + j) / 4 + v * kLanes);
        word[v][1] = Words{} + static_cast<uint64_t>(row);
        word[v][2] = Words{} + static_cast<uint64_t>(head);
        word[v][3] = Words{} + uint64_t{site_};
      }
      uint32_t k0 = key_[0], k1 = key_[1];
      for (int round = 0; round < kPhiloxRounds; ++round) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) philox_round(word[v], k0, k1, multiply);
        k0 += kPhiloxW0;
        k1 += kPhiloxW1;
      }
      uint64_t pairs[kVectors * kLanes][2];  // the four words of a counter side by side
      for (int v = 0; v < kVectors; ++v) {
        const Words low = (word[v][0] & uint64_t{0xffffffffu}) | word[v][1] << 32;
        const Words high = (word[v][2] & uint64_t{0xffffffffu}) | word[v][3] << 32;
        for (int i = 0; i < kLanes; ++i) {
          pairs[v * kLanes + i][0] = low[i];
          pairs[v * kLanes + i][1] = high[i];
        }
      }
      uint32_t words[kGroup];
      static_assert(sizeof(words) == sizeof(pairs));
      memcpy(words, pairs, sizeof(words));
      for (int i = 0; i < kGroup; ++i) mask[j + i] = words[i] >= threshold_ ? keep_ : T(0);
    }
  }

  static constexpr int kLanes = static_cast<int>(sizeof(Words) / sizeof(uint64_t));
  static constexpr int kVectors = 8 / kLanes;  // counters side by side: 8, against the latency
  static constexpr int kGroup = 4 * kLanes * kVectors;  // columns they serve

 private:
  bool on_;
  uint32_t threshold_, site_, key_[2];
  T keep_;
};

}  // namespace
}  // namespace xlmr::XLMR_ISA
