// The entry points that table.cu gathers, and how a source defines one.
#pragma once

#include "cuda/element.cuh"

namespace xlmr::XLMR_CUDA_NS {

#define XLMR_DECLARE_OP(name, Args)                                   \
  int64_t name##_workspace(const Args& args, const ExecContext& ctx); \
  Status name(const Args& args, const ExecContext& ctx)

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

#undef XLMR_DECLARE_OP

namespace {

// f(T()) with the type of the tensors' elements.
template <class F>
auto with_element(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float64:
      return f(double());
    case DType::bfloat16:
      return f(Bfloat16());
    case DType::float16:
      return f(Float16());
    default:
      return f(float());
  }
}

}  // namespace

}  // namespace xlmr::XLMR_CUDA_NS

// Defines an op from a template `Launcher<T>` with a constructor (Workspace&, args), which lays out
// the workspace, and a method run(args, ctx) that answers a Status.
#define XLMR_DEFINE_OP(name, Args, Launcher)                                             \
  int64_t name##_workspace(const Args& args, const ExecContext&) {                       \
    Workspace space(nullptr);                                                            \
    with_element(args.dtype,                                                             \
                 [&](auto element) { (void)Launcher<decltype(element)>(space, args); }); \
    return space.total();                                                                \
  }                                                                                      \
  Status name(const Args& args, const ExecContext& ctx) {                                \
    Workspace space(ctx.workspace);                                                      \
    return with_element(args.dtype, [&](auto element) {                                  \
      return Launcher<decltype(element)>(space, args).run(args, ctx);                    \
    });                                                                                  \
  }
