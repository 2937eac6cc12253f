// bfloat16 and float16 as bits, in software: to float exactly, from float by rounding to nearest,
// ties to even. A NaN becomes the NaN that a device writes.
#pragma once

#include <cmath>
#include <cstdint>

#include "simt/device_math.h"

namespace simt {

inline float bf16_to_float(uint32_t half) { return bits<float>(half << 16); }

inline uint32_t float_to_bf16(float x) {
  if (x != x) return 0x7fff;
  const uint32_t u = bits<uint32_t>(x);
  return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}

inline float f16_to_float(uint32_t half) {
  const uint32_t sign = (half & 0x8000) << 16;
  const uint32_t exponent = half >> 10 & 31;
  const uint32_t fraction = half & 0x3ff;
  if (exponent == 31) return bits<float>(sign | 0x7f800000 | fraction << 13);
  if (exponent > 0) return bits<float>(sign | (exponent + 112) << 23 | fraction << 13);
  const float tiny = float(fraction) * 0x1p-24f;
  return sign ? -tiny : tiny;
}

inline uint32_t float_to_f16(float x) {
  if (x != x) return 0x7fff;
  const uint32_t u = bits<uint32_t>(x);
  const uint32_t sign = u >> 16 & 0x8000;
  const uint32_t magnitude = u & 0x7fffffff;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and more round to infinity
  if (magnitude < 0x38800000) {                       // below 2^-14: a multiple of 2^-24
    return sign | uint32_t(std::nearbyint(bits<float>(magnitude) * 0x1p24f));
  }
  const uint32_t rebased = magnitude - (112u << 23);
  return sign | (rebased + 0xfff + (rebased >> 13 & 1)) >> 13;
}

}  // namespace simt
