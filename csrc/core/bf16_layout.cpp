#include "core/bf16_layout.h"

#include "core/bf16.h"
#include "core/sizes.h"

namespace xlmr {

int64_t packed_bf16_bytes(int64_t out_features, int64_t in_features) {
  const int64_t elements =
      product(round_up(out_features, kBf16Channels), round_up(in_features, kBf16Depth));
  const int64_t bytes = product(elements, sizeof(uint16_t));
  return bytes == INT64_MAX ? -1 : bytes;
}

void pack_bf16_weight(int64_t out_features, int64_t in_features, const float* weight,
                      void* packed) {
  const int64_t steps = round_up(in_features, kBf16Depth);
  auto* dst = static_cast<uint16_t*>(packed);
  for (int64_t first = 0; first < out_features; first += kBf16Channels) {
    const int64_t channels = min_of(kBf16Channels, out_features - first);
    for (int64_t k = 0; k < steps; k += 2) {
      for (int64_t channel = 0; channel < kBf16Channels; ++channel, dst += 2) {
        const float* row = weight + (first + channel) * in_features;
        for (int64_t i = 0; i < 2; ++i) {
          dst[i] = channel < channels && k + i < in_features ? to_bf16(row[k + i]) : uint16_t{0};
        }
      }
    }
  }
}

}  // namespace xlmr
