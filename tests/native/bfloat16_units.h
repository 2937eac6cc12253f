// What one object of bfloat16_units.cpp was compiled to: the instructions of bfloat16 as the
// kernels call them, or the twins.
#pragma once

#include <cstdint>

namespace test {

struct Bf16Units {
  // Lane by lane, `count` of them, a multiple of 16. A pair is 32 bits.
  void (*dot)(int64_t count, const float* sum, const uint32_t* a, const uint32_t* b, float* out);
  void (*join)(int64_t count, const float* low, const float* high, uint32_t* pairs);
  void (*neighbours)(int64_t count, const float* x, uint32_t* pairs);  // x[2 count]
  // out = sum + a b, tiles of 16 x 16. Null without tiles, as the next one.
  void (*tile_dot)(const float* sum, const uint32_t* a, const uint32_t* b, float* out);
  // Uses a tile where no session is: use 0 to 3 fills, loads, stores, multiplies. A fault.
  void (*use_tile)(int use, bool after_session);
};

}  // namespace test
