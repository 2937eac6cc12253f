// The layout of bfloat16 weights [out, in]: one for all tables, so that a file of them is mapped
// and shared as it is.
//
//   bfloat16  w[out / 32][in / 2][32][2]   panels of 32 channels, 2 steps of k side by side
//
// `out` and `in` are padded to 32 with zeros. 16 channels by 32 steps of a panel are a matrix tile
// of AMX; 16 channels by 2 steps are a register of AVX512-BF16.
#pragma once

#include <cstdint>

namespace xlmr {

inline constexpr int64_t kBf16Channels = 32;
inline constexpr int64_t kBf16Depth = 32;

// Bytes of the layout, or -1 where they overflow int64.
int64_t packed_bf16_bytes(int64_t out_features, int64_t in_features);

// Weights [out, in] in float32, rounded to nearest, ties to even.
void pack_bf16_weight(int64_t out_features, int64_t in_features, const float* weight, void* packed);

}  // namespace xlmr
