// The whole encoder in one call, over weights packed beforehand: what inference runs.
#pragma once

#include "ops.h"

namespace xlmr {

// One post-LayerNorm layer. Every weight is packed. Query, key and value are one map of three
// parts; or, where only the first tokens of the sequences go on, the query stands alone.
struct EncoderLayer {
  const void* query_key_value_weight;   // [3 hidden, hidden]; null where the next two are given
  const void* query_weight;             // [hidden, hidden]
  const void* key_value_weight;         // [2 hidden, hidden]
  const void* query_key_value_bias;     // [3 hidden]
  const void* attention_output_weight;  // [hidden, hidden]
  const void* attention_output_bias;    // [hidden]
  const void* attention_norm_weight;    // [hidden]
  const void* attention_norm_bias;      // [hidden]
  const void* up_weight;                // [inner, hidden]
  const void* up_bias;                  // [inner]
  const void* down_weight;              // [hidden, inner]
  const void* down_bias;                // [hidden]
  const void* output_norm_weight;       // [hidden]
  const void* output_norm_bias;         // [hidden]
};

// What the packed weights of the layers are.
enum class WeightFormat : int32_t {
  table = 0,     // the embedding's type, as pack_weight of the table lays it out
  int8 = 1,      // core/int8_layout.h; all else float32
  bfloat16 = 2,  // core/bf16_layout.h; all else float32
};

struct EncoderForward {
  EmbeddingForward embedding;  // without dropout; its y, mean and rstd are not read
  Activation activation;
  int64_t inner, num_heads;
  int64_t num_layers;  // at least 1
  int64_t batch, max_seqlen;
  double scale;                // of the attention's scores
  const int32_t* cu_seqlens;   // [batch + 1]
  const EncoderLayer* layers;  // [num_layers], read by the query too
  WeightFormat weights;
  // The last layer computes keys and values for all tokens and everything else for the first token
  // of every sequence alone; that layer has its query apart. Rows of empty sequences are 0.
  bool first_only;
  void* y;       // [N, hidden], or [batch, hidden]
  void* states;  // [num_layers, N, hidden], every layer's input; may be null
};

// As the ops of a table: bytes of workspace, or -1; and the call itself.
int64_t encoder_forward_workspace(const KernelTable& table, const EncoderForward& args,
                                  const ExecContext& ctx);
Status encoder_forward(const KernelTable& table, const EncoderForward& args,
                       const ExecContext& ctx);

}  // namespace xlmr
