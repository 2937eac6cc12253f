// The table of the CUDA kernels: "cuda", or "simt" over the emulator; and what a launch that failed
// says.
#include <string>

#include "cuda/kernels.cuh"

namespace xlmr::XLMR_CUDA_NS {
namespace {

#define XLMR_STRING2(x) #x
#define XLMR_STRING(x) XLMR_STRING2(x)

// Weights are packed as they are.
int64_t packed_bytes(DType dtype, int64_t out_features, int64_t in_features) {
  const int64_t bytes = product(product(out_features, in_features), dtype_size(dtype));
  return bytes == INT64_MAX ? -1 : bytes;
}

template <class Args>
int64_t no_workspace(const Args&, const ExecContext&) {
  return 0;
}
template <class Args>
Status no_int8(const Args&, const ExecContext&) {
  return "8-bit products run on the CPU only";
}
// Products of float32 tensors are in float32 here.
template <class Args, Status (*exact)(const Args&, const ExecContext&)>
Status unless_packed(const Args& args, const ExecContext& ctx) {
  return args.packed ? "weights packed in bfloat16 are for the CPU only" : exact(args, ctx);
}

}  // namespace

Status launch_failure(const char* name, const char* error, int64_t blocks, int threads,
                      size_t shared_bytes, const ExecContext& ctx) {
  static thread_local std::string message;
  message = std::string("kernel ") + name + " did not start: " + error + " (" +
            std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads, " +
            std::to_string(shared_bytes) + " bytes of shared memory, device " +
            std::to_string(ctx.device) + ")";
  return message.c_str();
}

extern const KernelTable table;
const KernelTable table = {
    XLMR_STRING(XLMR_CUDA_NS),
    XLMR_STRING(XLMR_CUDA_NS),
    packed_bytes,
    {pack_weight_workspace, pack_weight},
    {linear_forward_workspace, linear_forward},
    {linear_backward_workspace, linear_backward},
    {feed_forward_forward_workspace, feed_forward_forward},
    {feed_forward_backward_workspace, feed_forward_backward},
    {attention_forward_workspace, attention_forward},
    {attention_backward_workspace, attention_backward},
    {layer_norm_forward_workspace, layer_norm_forward},
    {layer_norm_backward_workspace, layer_norm_backward},
    {embedding_forward_workspace, embedding_forward},
    {embedding_backward_workspace, embedding_backward},
    {{linear_forward_workspace, unless_packed<LinearForward, linear_forward>},
     {linear_backward_workspace, linear_backward},
     {feed_forward_forward_workspace, unless_packed<FeedForwardForward, feed_forward_forward>},
     {feed_forward_backward_workspace, feed_forward_backward}},
    {{no_workspace<LinearInt8Forward>, no_int8<LinearInt8Forward>},
     {no_workspace<FeedForwardInt8Forward>, no_int8<FeedForwardInt8Forward>}},
};

}  // namespace xlmr::XLMR_CUDA_NS
