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
    for (int64_t j = 0; j < n; j += kGroup) {
      uint32_t word[4][kCounters];
      for (int i = 0; i < kCounters; ++i) {
        word[0][i] = static_cast<uint32_t>((column + j) / 4 + i);
        word[1][i] = static_cast<uint32_t>(row);
        word[2][i] = static_cast<uint32_t>(head);
        word[3][i] = site_;
      }
      uint32_t k0 = key_[0], k1 = key_[1];
      for (int round = 0; round < kPhiloxRounds; ++round) {
        for (int i = 0; i < kCounters; ++i) {
          philox_round(word[0][i], word[1][i], word[2][i], word[3][i], k0, k1);
        }
        k0 += kPhiloxW0;
        k1 += kPhiloxW1;
      }
      for (int i = 0; i < kCounters; ++i) {
        for (int w = 0; w < 4; ++w) mask[j + 4 * i + w] = word[w][i] >= threshold_ ? keep_ : T(0);
      }
    }
  }

  static constexpr int kCounters = 8;           // side by side, for the compiler to vectorise
  static constexpr int kGroup = 4 * kCounters;  // columns they serve

 private:
  bool on_;
  uint32_t threshold_, site_, key_[2];
  T keep_;
};

}  // namespace
}  // namespace xlmr::XLMR_ISA
