#include "core/int8_layout.h"

#include <algorithm>
#include <cstring>

namespace xlmr {

int64_t packed_int8_bytes(int64_t out_features, int64_t in_features) {
  if (out_features > INT64_MAX - kInt8Channels || in_features > INT64_MAX - kInt8Depth) return -1;
  const int64_t out = (out_features + kInt8Channels - 1) / kInt8Channels * kInt8Channels;
  const int64_t in = (in_features + kInt8Depth - 1) / kInt8Depth * kInt8Depth;
  const int64_t tail = int64_t(sizeof(float) + sizeof(int32_t));
  int64_t bytes = 0;
  // out * (in + tail)
  return __builtin_mul_overflow(out, in, &bytes) || out > (INT64_MAX - bytes) / tail
             ? -1
             : bytes + out * tail;
}

void pack_int8_weight(int64_t out_features, int64_t in_features, const int8_t* q,
                      const float* scale, void* packed) {
  const int64_t panels = (out_features + kInt8Channels - 1) / kInt8Channels;
  const int64_t steps = (in_features + kInt8Depth - 1) / kInt8Depth;
  auto* values = static_cast<int8_t*>(packed);
  char* scales = reinterpret_cast<char*>(values + panels * kInt8Channels * steps * kInt8Depth);
  char* sums = scales + panels * kInt8Channels * int64_t(sizeof(float));
  for (int64_t channel = 0; channel < panels * kInt8Channels; ++channel) {
    const bool real = channel < out_features;
    const int8_t* row = real ? q + channel * in_features : nullptr;
    int8_t* dst = values + channel / kInt8Channels * steps * kInt8Channels * kInt8Depth +
                  channel % kInt8Channels * kInt8Depth;
    int32_t sum = 0;
    for (int64_t k = 0; k < steps * kInt8Depth; k += kInt8Depth) {
      int8_t piece[kInt8Depth] = {};
      const int64_t count = real ? std::min(kInt8Depth, in_features - k) : 0;
      for (int64_t i = 0; i < count; ++i) {
        piece[i] = row[k + i];
        sum += piece[i];
      }
      std::memcpy(dst + k * kInt8Channels, piece, sizeof piece);
    }
    const float factor = real ? scale[channel] : 0.0f;
    std::memcpy(scales + channel * int64_t(sizeof factor), &factor, sizeof factor);
    std::memcpy(sums + channel * int64_t(sizeof sum), &sum, sizeof sum);
  }
}

}  // namespace xlmr
