// Numbers in bfloat16: the upper half of a float32.
#pragma once

#include <string.h>

#include <cstdint>

namespace xlmr {
// Internal linkage on purpose: this header is compiled once per instruction set.
namespace {

// Rounds to nearest, ties to even, as vcvtneps2bf16 does: denormals become zeros of their sign, and
// NaN stays NaN with its quiet bit set.
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  if (magnitude < 0x00800000u) return static_cast<uint16_t>(bits >> 16 & 0x8000u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float from_bf16(uint16_t x) {
  const uint32_t bits = uint32_t{x} << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline float flush_denormal(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// a b + c as the processors' products of bfloat16 compute it: rounds once, to nearest, takes
// denormals for zeros and leaves none. A result counts as one where it would be too small for a
// normal number after rounding to as many digits as those have (Intel's manual, volume 1, section
// 4.9.1.5), which is not where its rounding to a denormal's digits ends. Which of several NaN comes
// out is the processor's affair.
inline float bf16_multiply_add(float a, float b, float c) {
  a = flush_denormal(a);
  b = flush_denormal(b);
  c = flush_denormal(c);
  const float sum = __builtin_fmaf(a, b, c);
  if (__builtin_fabsf(sum) == 0x1p-126f) {
    // Half a unit below it is the least that rounds to it. Exact in double, or far from that.
    const double wide = double{a} * double{b} + double{c};
    if (__builtin_fabs(wide) < 0x1.ffffffp-127) return __builtin_copysignf(0.0f, sum);
  }
  return flush_denormal(sum);
}

}  // namespace
}  // namespace xlmr
