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
// denormals for zeros and leaves none.
inline float bf16_multiply_add(float a, float b, float c) {
  return flush_denormal(__builtin_fmaf(flush_denormal(a), flush_denormal(b), flush_denormal(c)));
}

}  // namespace
}  // namespace xlmr
