// Tests of the native core without torch: every table that this processor runs, every op, forward
// and backward, float32 and float64, against plain loops in a wider type. Exit status 1 on failure.
//
//   xlmr_native_tests [--quick] [--threads MOST] [--fuzz CASES] [--seed N] [--table NAME]
//                     [--op PART-OF-NAME]
#include <cstdlib>
#include <cstring>

#include "bfloat16.h"
#include "core/cpu_features.h"
#include "core/dispatch.h"

// Makes a team of three threads on any machine. Weak: a build without OpenMP has
// no such function, and needs none.
extern "C" __attribute__((weak)) void omp_set_num_threads(int count);

#if defined(XLMR_HAVE_AVX2_VNNI_TWIN)
namespace xlmr::avx2_vnni_twin {
extern const Int8Ops int8_ops;
}
#endif

namespace {

int usage(const char* program) {
  std::fprintf(stderr,
               "usage: %s [--quick] [--threads MOST] [--fuzz CASES] [--seed N] [--table NAME] "
               "[--op PART]\n",
               program);
  return 2;
}

// The integer products of avx2_vnni without the instruction; whether they ran.
bool run_twin() {
#if defined(XLMR_HAVE_AVX2_VNNI_TWIN)
  constexpr const char* name = "avx2_vnni_twin";
  const std::string& only = test::options().table;
  if (!only.empty() && only != name) return false;
  for (const xlmr::TableInfo& info : xlmr::built_tables()) {
    if (info.table->name != std::string("avx2")) continue;
    if (xlmr::missing_feature(info.required, xlmr::cpu_features()) != nullptr) return false;
    test::test_int8(xlmr::with_int8(*info.table, name, xlmr::avx2_vnni_twin::int8_ops));
    return true;
  }
#endif
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  test::Options& options = test::options();
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--quick") {
      options.quick = true;
    } else if (i + 1 == argc) {
      return usage(argv[0]);
    } else if (name == "--threads") {
      options.threads = std::atoi(argv[++i]);
    } else if (name == "--fuzz") {
      options.fuzz = std::atoll(argv[++i]);
    } else if (name == "--seed") {
      options.seed = std::strtoull(argv[++i], nullptr, 10);
    } else if (name == "--table") {
      options.table = argv[++i];
    } else if (name == "--op") {
      options.op = argv[++i];
    } else {
      return usage(argv[0]);
    }
  }
  if (omp_set_num_threads != nullptr) {
    omp_set_num_threads(options.threads);
  }

  test::test_core();
  test::test_int8_layout();
  test::test_bf16_layout();
  test::test_bf16_units();
  test::test_cpu_budget();
  int ran = 0;
  for (const xlmr::TableInfo& info : xlmr::built_tables()) {
    if (!options.table.empty() && options.table != info.table->name) continue;
    const char* missing = xlmr::missing_feature(info.required, xlmr::cpu_features());
    if (missing != nullptr) {
      std::printf("%-10s not run: this processor has no %s\n", info.table->name, missing);
      continue;
    }
    ++ran;
    const int32_t threads = options.threads;
    if (test::emulates_cuda(*info.table)) {
      std::printf("%-10s every case once: the bits of 2 and 3 threads are the CPU's affair\n",
                  info.table->name);
      options.threads = 1;
    }
    test::test_workspace(*info.table);
    test::test_int8(*info.table);
    // The rest of a table of other products is the table's below, tested already.
    const bool own = info.table->layout == std::string(info.table->name);
    if (own || test::bf16_products(*info.table).rounds) test::test_bf16(*info.table);
    if (own) {
      test::test_linear(*info.table);
      test::test_feed_forward(*info.table);
      test::test_attention(*info.table);
      test::test_layer_norm(*info.table);
      test::test_embedding(*info.table);
      test::test_dropout(*info.table);
      test::test_packing(*info.table);
    }
    test::test_encoder(*info.table);
    test::test_callers(*info.table);
    test::test_cuda(*info.table);
    options.threads = threads;
  }
  ran += run_twin() ? 1 : 0;
  ran += test::test_bf16_twins();
  test::tally().context = "main";
  CHECK(ran > 0, "no table was run");
  std::printf("%lld passed, %lld failed\n", static_cast<long long>(test::tally().passed),
              static_cast<long long>(test::tally().failed));
  return test::tally().failed == 0 ? 0 : 1;
}
