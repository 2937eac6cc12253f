// What the processor and the operating system offer. Compiled with baseline flags only.
#pragma once

#include <cstdint>

namespace xlmr {

enum Feature : uint32_t {
  kFeatureAvx2 = 1u << 0,
  kFeatureFma = 1u << 1,
  kFeatureAvx512 = 1u << 2,  // F, BW, DQ and VL: every processor with AVX-512 since 2017
  kFeatureAvx512Vnni = 1u << 3,
  kFeatureAvxVnni = 1u << 4,  // the same dot products without AVX-512
  kFeatureAvx512Bf16 = 1u << 5,
  kFeatureAmxBf16 = 1u << 6,  // tiles, their products of bfloat16, and leave to use them
};

// The features that this process may use (bits of Feature).
uint32_t cpu_features();

// The name of the first feature that is in `required` and not in `available`, or null.
const char* missing_feature(uint32_t required, uint32_t available);

}  // namespace xlmr
