#include "core/dispatch.h"

#include <cstdlib>
#include <stdexcept>

#include "core/cpu_features.h"

namespace xlmr {

namespace baseline {
extern const KernelTable table;
}
#if defined(XLMR_HAVE_AVX2)
namespace avx2 {
extern const KernelTable table;
}
#endif
#if defined(XLMR_HAVE_AVX512)
namespace avx512 {
extern const KernelTable table;
}
#endif
#if defined(XLMR_HAVE_NEON)
namespace neon {
extern const KernelTable table;
}
#endif

const std::vector<TableInfo>& built_tables() {
  static const std::vector<TableInfo> tables = {
      {&baseline::table, 0},
#if defined(XLMR_HAVE_AVX2)
      {&avx2::table, kFeatureAvx2 | kFeatureFma},
#endif
#if defined(XLMR_HAVE_AVX512)
      {&avx512::table, kFeatureAvx2 | kFeatureFma | kFeatureAvx512},
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
