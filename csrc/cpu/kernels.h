// The entry points of one instruction set's kernels, which table.cpp gathers. Each checks nothing:
// the contract is in ops.h.
#pragma once

#include "core/workspace.h"
#include "cpu/isa.h"
#include "ops.h"

namespace xlmr::XLMR_ISA {

#define XLMR_DECLARE_OP(name, Args)                                   \
  int64_t name##_workspace(const Args& args, const ExecContext& ctx); \
  Status name(const Args& args, const ExecContext& ctx)

int64_t packed_bytes(DType dtype, int64_t out_features, int64_t in_features);
XLMR_DECLARE_OP(pack_weight, PackWeight);
XLMR_DECLARE_OP(linear_forward, LinearForward);
XLMR_DECLARE_OP(linear_backward, LinearBackward);
XLMR_DECLARE_OP(feed_forward_forward, FeedForwardForward);
XLMR_DECLARE_OP(feed_forward_backward, FeedForwardBackward);
XLMR_DECLARE_OP(attention_forward, AttentionForward);
XLMR_DECLARE_OP(attention_backward, AttentionBackward);
XLMR_DECLARE_OP(layer_norm_forward, LayerNormForward);
XLMR_DECLARE_OP(layer_norm_backward, LayerNormBackward);
XLMR_DECLARE_OP(embedding_forward, EmbeddingForward);
XLMR_DECLARE_OP(embedding_backward, EmbeddingBackward);
XLMR_DECLARE_OP(linear_bf16_forward, LinearForward);
XLMR_DECLARE_OP(linear_bf16_backward, LinearBackward);
XLMR_DECLARE_OP(feed_forward_bf16_forward, FeedForwardForward);
XLMR_DECLARE_OP(feed_forward_bf16_backward, FeedForwardBackward);
XLMR_DECLARE_OP(linear_int8_forward, LinearInt8Forward);
XLMR_DECLARE_OP(feed_forward_int8_forward, FeedForwardInt8Forward);

#undef XLMR_DECLARE_OP

}  // namespace xlmr::XLMR_ISA

// A kernel has a constructor (Workspace&, args, ctx), which lays out the workspace, and a method
// run(args, ctx). The query and the run share the constructor.
namespace xlmr::XLMR_ISA {
namespace {

template <class Kernel, class Args>
int64_t kernel_workspace(const Args& args, const ExecContext& ctx) {
  Workspace space(nullptr);
  (void)Kernel(space, args, ctx);
  return space.total();
}
template <class Kernel, class Args>
Status run_kernel(const Args& args, const ExecContext& ctx) {
  Workspace space(ctx.workspace);
  Kernel(space, args, ctx).run(args, ctx);
  return nullptr;
}

}  // namespace
}  // namespace xlmr::XLMR_ISA

// Defines an op from a template of kernels, Kernel<T>.
#define XLMR_DEFINE_OP(name, Args, Kernel)                             \
  int64_t name##_workspace(const Args& args, const ExecContext& ctx) { \
    if (args.dtype == DType::float32) {                                \
      return kernel_workspace<Kernel<float>>(args, ctx);               \
    }                                                                  \
    if (args.dtype == DType::float64) {                                \
      return kernel_workspace<Kernel<double>>(args, ctx);              \
    }                                                                  \
    return Workspace(nullptr).total();                                 \
  }                                                                    \
  Status name(const Args& args, const ExecContext& ctx) {              \
    if (args.dtype == DType::float32) {                                \
      return run_kernel<Kernel<float>>(args, ctx);                     \
    }                                                                  \
    if (args.dtype == DType::float64) {                                \
      return run_kernel<Kernel<double>>(args, ctx);                    \
    }                                                                  \
    return "the CPU has kernels of float32 and float64 only";          \
  }
