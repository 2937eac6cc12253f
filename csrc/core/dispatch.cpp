#include "core/dispatch.h"

#include <cstdlib>
#include <stdexcept>

#include "core/cpu_features.h"

namespace xlmr {

namespace baseline {
extern const KernelTable table;
}
#if defined(XLMR_HAVE_SIMT)
namespace simt {
extern const KernelTable table;
}
#endif
#if defined(XLMR_HAVE_AVX2)
namespace avx2 {
extern const KernelTable table;
}
#endif
#if defined(XLMR_HAVE_AVX2_VNNI)
namespace avx2_vnni {
extern const Int8Ops int8_ops;
}
#endif
#if defined(XLMR_HAVE_AVX512)
namespace avx512 {
extern const KernelTable table;
}
#endif
#if defined(XLMR_HAVE_AVX512_VNNI)
namespace avx512_vnni {
extern const Int8Ops int8_ops;
}
#endif
#if defined(XLMR_HAVE_AVX512_BF16)
namespace avx512_bf16 {
extern const Bf16Ops bf16_ops;
}
#endif
#if defined(XLMR_HAVE_AMX)
namespace amx {
extern const Bf16Ops bf16_ops;
}
#endif
#if defined(XLMR_HAVE_NEON)
namespace neon {
extern const KernelTable table;
}
#endif

namespace {
[[maybe_unused]] constexpr uint32_t kAvx512VnniFeatures =
    kFeatureAvx2 | kFeatureFma | kFeatureAvx512 | kFeatureAvx512Vnni;
}

KernelTable with_int8(const KernelTable& below, const char* name, const Int8Ops& ops) {
  KernelTable table = below;
  table.name = name;
  table.int8 = ops;
  return table;
}

KernelTable with_bf16(const KernelTable& below, const char* name, const Bf16Ops& ops) {
  KernelTable table = below;
  table.name = name;
  table.bf16 = ops;
  return table;
}

const std::vector<TableInfo>& built_tables() {
#if defined(XLMR_HAVE_AVX2_VNNI)
  static const KernelTable avx2_vnni_table =
      with_int8(avx2::table, "avx2_vnni", avx2_vnni::int8_ops);
#endif
#if defined(XLMR_HAVE_AVX512_VNNI)
  static const KernelTable avx512_vnni_table =
      with_int8(avx512::table, "avx512_vnni", avx512_vnni::int8_ops);
#endif
#if defined(XLMR_HAVE_AVX512_BF16)
  static const KernelTable avx512_bf16_table =
      with_bf16(avx512_vnni_table, "avx512_bf16", avx512_bf16::bf16_ops);
#endif
#if defined(XLMR_HAVE_AMX)
  static const KernelTable amx_table = with_bf16(avx512_vnni_table, "amx", amx::bf16_ops);
#endif
  static const std::vector<TableInfo> tables = {
#if defined(XLMR_HAVE_SIMT)
      {&simt::table, 0},  // for tests; the slowest by far, so only who names it gets it
#endif
      {&baseline::table, 0},
#if defined(XLMR_HAVE_AVX2)
      {&avx2::table, kFeatureAvx2 | kFeatureFma},
#endif
#if defined(XLMR_HAVE_AVX2_VNNI)
      {&avx2_vnni_table, kFeatureAvx2 | kFeatureFma | kFeatureAvxVnni},
#endif
#if defined(XLMR_HAVE_AVX512)
      {&avx512::table, kFeatureAvx2 | kFeatureFma | kFeatureAvx512},
#endif
#if defined(XLMR_HAVE_AVX512_VNNI)
      {&avx512_vnni_table, kAvx512VnniFeatures},
#endif
#if defined(XLMR_HAVE_AVX512_BF16)
      {&avx512_bf16_table, kAvx512VnniFeatures | kFeatureAvx512Bf16},
#endif
#if defined(XLMR_HAVE_AMX)
      {&amx_table, kAvx512VnniFeatures | kFeatureAmxBf16},
#endif
#if defined(XLMR_HAVE_NEON)
      {&neon::table, 0},  // every AArch64 processor has Advanced SIMD
#endif
  };
  return tables;
}

Choice choose_table(const char* forced) {
  const uint32_t available = cpu_features();
  if (forced != nullptr && *forced != '\0') {
    std::string names;
    for (const TableInfo& info : built_tables()) {
      if (info.table->name == std::string(forced)) {
        if (const char* missing = missing_feature(info.required, available)) {
          throw std::runtime_error("XLMR_EXT_ISA=" + std::string(forced) +
                                   ": this processor has no " + missing);
        }
        return {info.table, "XLMR_EXT_ISA=" + std::string(forced)};
      }
      names += (names.empty() ? "" : ", ") + std::string(info.table->name);
    }
    throw std::runtime_error("XLMR_EXT_ISA=" + std::string(forced) +
                             ": no such table in this build; expected one of: " + names);
  }
  Choice choice{built_tables().front().table, "the processor has nothing faster"};
  for (const TableInfo& info : built_tables()) {
    if (missing_feature(info.required, available) == nullptr) {
      choice.table = info.table;
      choice.reason = "the fastest of this build that the processor runs";
    }
  }
  return choice;
}

namespace {

Choice& mutable_active() {
  static Choice choice = choose_table(std::getenv("XLMR_EXT_ISA"));
  return choice;
}

}  // namespace

const Choice& active() { return mutable_active(); }

void set_active(const char* name) { mutable_active() = choose_table(name); }

}  // namespace xlmr
