#include "core/cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace xlmr {

#if defined(__x86_64__)
namespace {

// CPUID leaf 7, subleaf 1, EAX bit 4 (Intel's manual, volume 2A). Compilers of the years before
// that processor do not know the name. Whether the system keeps the registers is asked with AVX2.
bool has_avx_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || eax < 1) return false;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & (1u << 4)) != 0;
}

}  // namespace
#endif

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
  if (__builtin_cpu_supports("avx512vnni")) features |= kFeatureAvx512Vnni;
  if (has_avx_vnni()) features |= kFeatureAvxVnni;
#endif
  return features;
}

const char* missing_feature(uint32_t required, uint32_t available) {
  const uint32_t missing = required & ~available;
  if (missing & kFeatureAvx2) return "AVX2";
  if (missing & kFeatureFma) return "FMA";
  if (missing & kFeatureAvx512) return "AVX-512 (F, BW, DQ, VL)";
  if (missing & kFeatureAvx512Vnni) return "AVX512-VNNI";
  if (missing & kFeatureAvxVnni) return "AVX-VNNI";
  return nullptr;
}

}  // namespace xlmr
