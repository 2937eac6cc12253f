// The layout of 8-bit weights [out, in]: one for all tables, so that a file of them is mapped and
// shared as it is.
//
//   int8   q[out / 16][in / 4][16][4]   panels of 16 channels, 4 steps of k side by side
//   float  scale[out]                   w = q * scale
//   int32  sum[out]                     of q over k: for the centre of a row of activations, and
//                                       for tables whose activations are q + 128
//
// `out` is padded to 16 and `in` to 4 with zeros, and so every part is a multiple of 64 bytes.
#pragma once

#include <cstdint>

namespace xlmr {

inline constexpr int64_t kInt8Channels = 16;
inline constexpr int64_t kInt8Depth = 4;
// A sum of so many products of values in [-127, 127] fits into int32.
inline constexpr int64_t kInt8MaxFeatures = int64_t(1) << 17;

// Bytes of the layout, or -1 where they overflow int64.
int64_t packed_int8_bytes(int64_t out_features, int64_t in_features);

// q [out, in] with values in [-127, 127], scale [out].
void pack_int8_weight(int64_t out_features, int64_t in_features, const int8_t* q,
                      const float* scale, void* packed);

}  // namespace xlmr
