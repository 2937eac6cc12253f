// Ops in bfloat16: which arithmetic this table has for them.
#pragma once

#include "cpu/kernels.h"
#if defined(XLMR_ISA_AMX)
#include "cpu/bfloat16_tiles.h"
#else
#include "cpu/bfloat16.h"
#endif

namespace xlmr::XLMR_ISA {
namespace {

#if defined(XLMR_ISA_AMX)
using Bf16Arithmetic = Bfloat16Tiles;
#elif defined(XLMR_ISA_BF16)
using Bf16Arithmetic = Bfloat16;
#endif

}  // namespace
}  // namespace xlmr::XLMR_ISA

// Defines an op in bfloat16 from a template Kernel<Arithmetic>. Without units for it, weights that
// are kept in bfloat16 meet float32's arithmetic, and what is in float32 stays so.
#if defined(XLMR_ISA_BF16)
#define XLMR_DEFINE_BF16_OP(name, exact, Args, Kernel)                 \
  int64_t name##_workspace(const Args& args, const ExecContext& ctx) { \
    return kernel_workspace<Kernel<Bf16Arithmetic>>(args, ctx);        \
  }                                                                    \
  Status name(const Args& args, const ExecContext& ctx) {              \
    return run_kernel<Kernel<Bf16Arithmetic>>(args, ctx);              \
  }
#else
#define XLMR_DEFINE_BF16_OP(name, exact, Args, Kernel)                                     \
  int64_t name##_workspace(const Args& args, const ExecContext& ctx) {                     \
    return args.packed ? kernel_workspace<Kernel<StoredBfloat16>>(args, ctx)               \
                       : exact##_workspace(args, ctx);                                     \
  }                                                                                        \
  Status name(const Args& args, const ExecContext& ctx) {                                  \
    return args.packed ? run_kernel<Kernel<StoredBfloat16>>(args, ctx) : exact(args, ctx); \
  }
#endif
