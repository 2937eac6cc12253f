// Dropout's mask on the device, bit for bit that of the CPU; core/philox.h says what a bit is.
#pragma once

#include "cuda/common.cuh"

namespace xlmr::XLMR_CUDA_NS {
namespace {

struct MultiplyLow {
  XLMR_HD uint64_t operator()(uint64_t word, uint64_t m) const { return (word & 0xffffffffu) * m; }
};

template <class T>
struct DropoutMask {
  bool on = false;
  uint32_t threshold = 0, site = 0, key0 = 0, key1 = 0;
  T keep = T(1);

  DropoutMask() = default;
  // Reads the seed, which is host memory.
  explicit DropoutMask(const Dropout& d)
      : on(d.p > 0.0),
        threshold(dropout_threshold(d.p)),
        site(static_cast<uint32_t>(d.site)),
        keep(static_cast<T>(1.0 / (1.0 - d.p))) {
    const uint64_t seed = on ? static_cast<uint64_t>(*d.seed) : 0;
    key0 = static_cast<uint32_t>(seed);
    key1 = static_cast<uint32_t>(seed >> 32);
  }

  // Bit i says whether column 4 * group + i stays, where dropout is on.
  __device__ __forceinline__ uint32_t kept(int64_t head, int64_t row, int64_t group) const {
    uint64_t word[4] = {static_cast<uint64_t>(group), static_cast<uint64_t>(row),
                        static_cast<uint64_t>(head), site};
    uint32_t k0 = key0, k1 = key1;
#pragma unroll
    for (int round = 0; round < kPhiloxRounds; ++round) {
      philox_round(word, k0, k1, MultiplyLow());
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bits |= (static_cast<uint32_t>(word[i]) >= threshold ? 1u : 0u) << i;
    }
    return bits;
  }

  // 0 or 1 / (1 - p) for columns 4 * group to 4 * group + 3; 1 where dropout is off.
  __device__ Quad<T> factors(int64_t head, int64_t row, int64_t group) const {
    if (!on) return {{T(1), T(1), T(1), T(1)}};
    const uint32_t bits = kept(head, row, group);
    Quad<T> factor;
#pragma unroll
    for (int i = 0; i < 4; ++i) factor.v[i] = (bits >> i & 1) != 0 ? keep : T(0);
    return factor;
  }

  __device__ T factor(int64_t head, int64_t row, int64_t column) const {
    const Quad<T> f = factors(head, row, column / 4);
    const T low = column % 2 == 0 ? f.v[0] : f.v[1], high = column % 2 == 0 ? f.v[2] : f.v[3];
    return column % 4 < 2 ? low : high;
  }
};

}  // namespace
}  // namespace xlmr::XLMR_CUDA_NS
