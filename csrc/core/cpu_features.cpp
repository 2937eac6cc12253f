#include "core/cpu_features.h"

namespace xlmr {

uint32_t cpu_features() {
  uint32_t features = 0;
#if defined(__x86_64__)
  // __builtin_cpu_supports asks CPUID and, for the wide registers, XGETBV.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) features |= kFeatureAvx2;
  if (__builtin_cpu_supports("fma")) features |= kFeatureFma;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    features |= kFeatureAvx512;
  }
#endif
  return features;
}

const char* missing_feature(uint32_t required, uint32_t available) {
  const uint32_t missing = required & ~available;
  if (missing & kFeatureAvx2) return "AVX2";
  if (missing & kFeatureFma) return "FMA";
  if (missing & kFeatureAvx512) return "AVX-512 (F, BW, DQ, VL)";
  return nullptr;
}

}  // namespace xlmr
