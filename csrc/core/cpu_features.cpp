#include "core/cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace xlmr {

#if defined(__x86_64__)
namespace {

// CPUID leaf 7 (Intel's manual, volume 2A): EAX of subleaf 1, 0 where there is none. Compilers of
// the years before those processors do not know the names.
unsigned features_of_subleaf_1() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || eax < 1) return 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) ? eax : 0;
}

// The processor has the tiles and their products of bfloat16, the system keeps the tiles of a
// thread, and lets this process use them: Linux asks that a process says so once, for all its
// threads and its children (arch/x86/kernel/fpu/xstate.c, ARCH_REQ_XCOMP_PERM).
bool may_use_tiles() {
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kOsxsave = 1u << 27;
  constexpr unsigned kTileStates = 3u << 17;  // of XCR0: configuration and data
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if ((edx & (kAmxBf16 | kAmxTile)) != (kAmxBf16 | kAmxTile)) return false;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (ecx & kOsxsave) == 0) return false;
  unsigned low = 0, high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & kTileStates) != kTileStates) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
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
  // Whether the system keeps the registers of these two is asked with AVX2 and AVX-512.
  const unsigned subleaf_1 = features_of_subleaf_1();
  if (subleaf_1 & 1u << 4) features |= kFeatureAvxVnni;
  if (subleaf_1 & 1u << 5) features |= kFeatureAvx512Bf16;
  static const bool tiles = may_use_tiles();
  if (tiles) features |= kFeatureAmxBf16;
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
  if (missing & kFeatureAvx512Bf16) return "AVX512-BF16";
  if (missing & kFeatureAmxBf16) return "AMX-BF16, or no leave from the system to use it";
  return nullptr;
}

}  // namespace xlmr
