// One instruction set's table: constant-initialised, the only symbol that other objects use.
#include "cpu/kernels.h"

namespace xlmr::XLMR_ISA {

#define XLMR_STRING2(x) #x
#define XLMR_STRING(x) XLMR_STRING2(x)
#define XLMR_INT8_OPS                                                \
  {                                                                  \
    {linear_int8_forward_workspace, linear_int8_forward}, {          \
      feed_forward_int8_forward_workspace, feed_forward_int8_forward \
    }                                                                \
  }

#if defined(XLMR_ISA_BF16)  // dispatch.cpp puts these into a copy of another table

extern const Bf16Ops bf16_ops;
const Bf16Ops bf16_ops = {
    {linear_bf16_forward_workspace, linear_bf16_forward},
    {linear_bf16_backward_workspace, linear_bf16_backward},
    {feed_forward_bf16_forward_workspace, feed_forward_bf16_forward},
    {feed_forward_bf16_backward_workspace, feed_forward_bf16_backward},
};

#elif defined(XLMR_INT8_ONLY)  // dispatch.cpp puts these into a copy of another table

extern const Int8Ops int8_ops;
const Int8Ops int8_ops = XLMR_INT8_OPS;

#else

extern const KernelTable table;
const KernelTable table = {
    XLMR_STRING(XLMR_ISA),
    XLMR_STRING(XLMR_ISA),
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
    {
        {linear_bf16_forward_workspace, linear_bf16_forward},
        {linear_backward_workspace, linear_backward},
        {feed_forward_bf16_forward_workspace, feed_forward_bf16_forward},
        {feed_forward_backward_workspace, feed_forward_backward},
    },
    XLMR_INT8_OPS,
};

#endif

}  // namespace xlmr::XLMR_ISA
