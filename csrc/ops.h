// The contract between Python and the kernels: one argument struct per op, and the table of
// function pointers that every instruction set (and CUDA) fills.
//
// Conventions, for every op:
//  * Tensors are raw pointers to row-major data of the op's dtype: activations, parameters and the
//    gradients of both. In 16 bits (bfloat16, float16) what is marked "statistic" is float32, as is
//    all arithmetic, sums included; a store rounds to nearest, ties to even.
//  * A table without kernels of a dtype answers a sentence. A `*_stride` is the distance
//    between rows in elements; columns are contiguous. Where no stride is given the tensor is
//    contiguous. Pointers are aligned to their element only.
//  * N = rows: the tokens of all sequences, back to back (packed, no padding).
//  * Outputs and gradients are written (`=`), never accumulated, except where `+=` is noted.
//  * A pointer marked "may be null" is skipped; every other pointer is valid when its tensor has
//    elements.
//  * The caller has checked every shape, index and dtype, and allocates outputs and workspace.
//    Kernels allocate nothing.
//  * Workspace queries return bytes, or -1 where the size overflows int64.
#pragma once

#include "types.h"

namespace xlmr {

enum class Activation : int32_t {
  none = 0,
  tanh = 1,       // linear only (the heads' dense)
  gelu = 2,       // x/2 (1 + erf(x / sqrt 2)), Hendrycks & Gimpel 2016 (arXiv 1606.08415), eq. 1
  gelu_tanh = 3,  // x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), same paper, eq. 2
  relu = 4,
};

// Inverted dropout whose mask is a pure function of (seed, site, head, row, column); see
// core/philox.h. Nothing is stored: the backward computes the mask again.
struct Dropout {
  double p = 0.0;                 // probability of zeroing, in [0, 1); 0 turns dropout off
  int64_t site = 0;               // names the place in the model
  const int64_t* seed = nullptr;  // one element in host memory; may be null where p = 0
};

// y_p = act(x W_p^T + b_p [+ addend]) for p < parts. One pass over x serves q, k and v.
struct LinearForward {
  DType dtype;
  Activation activation;  // none or tanh
  int64_t rows, in_features, out_features;
  int64_t parts;  // 1 to 3; an addend or an activation needs parts = 1
  const void* x;  // [N, in]
  int64_t x_stride;
  bool packed;            // the weights were laid out by pack_weight of the same table
  const void* weight[3];  // [out, in] each, or packed
  const void* bias[3];    // [out] each; may be null
  const void* addend;     // [N, out], added before the activation; may be null
  int64_t addend_stride;
  void* y[3];  // [N, out] each
  int64_t y_stride;
};

// Lays out a weight as the products of this table read it: for weights that are used many times.
// The layout is the table's own affair; it has KernelTable::packed_bytes() bytes.
struct PackWeight {
  DType dtype;
  int64_t out_features, in_features;
  const void* weight;  // [out, in]
  void* packed;
};

// With dz_p = dy_p * act'(z):  dx = sum_p dz_p W_p,  dW_p = dz_p^T x,  db_p = sum_rows dz_p.
struct LinearBackward {
  DType dtype;
  Activation activation;
  int64_t rows, in_features, out_features;
  int64_t parts;
  const void* dy[3];  // [N, out] each
  int64_t dy_stride;
  const void* x;  // [N, in]; may be null where no dweight is asked for
  int64_t x_stride;
  const void* weight[3];  // [out, in]; may be null where dx is null
  const void* y;          // [N, out] contiguous, the forward's output; null unless tanh
  void* dx;               // [N, in] contiguous; may be null
  void* dweight[3];       // [out, in] each; all null or all given
  void* dbias[3];         // [out] each; may be null
  void* dz;               // [N, out] contiguous, the gradient of the addend; null unless tanh
};

// pre = x W1^T + b1 [+ hidden_addend];  y = act(pre) W2^T + b2 [+ addend].
struct FeedForwardForward {
  DType dtype;
  Activation activation;  // gelu, gelu_tanh or relu
  int64_t rows, hidden, inner;
  const void* x;  // [N, hidden]
  int64_t x_stride;
  bool packed;                // the weights were laid out by pack_weight of the same table
  const void* up_weight;      // W1 [inner, hidden], or packed
  const void* up_bias;        // [inner]; may be null
  const void* down_weight;    // W2 [hidden, inner], or packed
  const void* down_bias;      // [hidden]; may be null
  const void* hidden_addend;  // [N, inner]; may be null
  int64_t hidden_addend_stride;
  const void* addend;  // [N, hidden]; may be null
  int64_t addend_stride;
  void* y;    // [N, hidden] contiguous
  void* pre;  // [N, inner] contiguous, kept for the backward; may be null
};

// da = dy W2;  dpre = da * act'(pre);  dx = dpre W1;  dW1 = dpre^T x;  dW2 = dy^T act(pre).
// act(pre) and act'(pre) are computed again from pre.
struct FeedForwardBackward {
  DType dtype;
  Activation activation;
  int64_t rows, hidden, inner;
  const void* dy;  // [N, hidden]
  int64_t dy_stride;
  const void* x;  // [N, hidden]
  int64_t x_stride;
  const void* up_weight;    // [inner, hidden]
  const void* down_weight;  // [hidden, inner]
  const void* pre;          // [N, inner] contiguous
  void* dx;                 // [N, hidden] contiguous; may be null
  void* dup_weight;         // [inner, hidden]; may be null
  void* dup_bias;           // [inner]; may be null
  void* ddown_weight;       // [hidden, inner]; may be null
  void* ddown_bias;         // [hidden]; may be null
  void* dpre;               // [N, inner] contiguous, the gradient of hidden_addend; may be null
};

// out = softmax(scale Q K^T) V for every sequence and head; Vaswani et al. 2017
// (arXiv 1706.03762), eq. 1. No S x S matrix is kept: blocks of keys with a running maximum
// (Milakov & Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135, alg. 1).
struct AttentionForward {
  DType dtype;
  int64_t batch, rows, num_heads, head_size;  // head_size at most 128
  int64_t max_seqlen;                         // the longest sequence, or more
  const int32_t* cu_seqlens;  // [batch + 1], ascending, cu_seqlens[0] = 0, last = rows
  double scale;
  Dropout dropout;  // on the probabilities; row = packed query row, column = key
  // Only the first token of every sequence asks: query, out and lse have `batch` rows instead of N,
  // and out and lse are 0 where a sequence is empty. Dropout's rows stay the packed ones.
  bool first_only;
  const void* query;  // [N, num_heads * head_size]
  int64_t query_stride;
  const void* key;
  int64_t key_stride;
  const void* value;
  int64_t value_stride;
  void* out;  // [N, num_heads * head_size]
  int64_t out_stride;
  void* lse;  // [num_heads, N] log sum exp of scaled scores, a statistic; may be null
};

// dV = P~^T dO;  dP~ = dO V^T;  dS = P * (mask * dP~ / (1-p) - delta);  delta = rowsum(dO * O);
// dQ = scale dS K;  dK = scale dS^T Q  (Dao et al. 2022, alg. 4).
struct AttentionBackward {
  DType dtype;
  int64_t batch, rows, num_heads, head_size;
  int64_t max_seqlen;
  const int32_t* cu_seqlens;
  double scale;
  Dropout dropout;
  // As the forward's: dout, query, out, lse and dquery have `batch` rows then, and dquery is 0
  // where a sequence is empty.
  bool first_only;
  const void* dout;  // [N, num_heads * head_size]
  int64_t dout_stride;
  const void* query;
  int64_t query_stride;
  const void* key;
  int64_t key_stride;
  const void* value;
  int64_t value_stride;
  const void* out;  // the forward's
  int64_t out_stride;
  const void* lse;  // the forward's, [num_heads, N], a statistic
  void* dquery;     // [N, num_heads * head_size]
  int64_t dquery_stride;
  void* dkey;  // [N, num_heads * head_size], like dvalue
  void* dvalue;
  int64_t dkv_stride;
};

// sum = dropout(x) + residual, in the op's dtype;  y = (sum - mean) * rstd * weight + bias;
// rstd = 1 / sqrt(var + eps), var over the row, biased (Ba et al. 2016, arXiv 1607.06450).
struct LayerNormForward {
  DType dtype;
  int64_t rows, hidden;
  double eps;
  Dropout dropout;
  const void* x;  // [N, hidden]
  int64_t x_stride;
  const void* residual;  // [N, hidden]; may be null
  int64_t residual_stride;
  const void* weight;  // [hidden]
  const void* bias;    // [hidden]
  void* y;             // [N, hidden] contiguous
  void* sum;           // [N, hidden] contiguous, kept for the backward; may be null
  void* mean;          // [N], a statistic as rstd; null together with it
  void* rstd;          // [N]
};

// With g = dy * weight and h = (sum - mean) * rstd:
// dsum = rstd (g - mean(g) - h mean(g h));  dx = mask * dsum / (1-p);
// dweight = sum_rows dy * h;  dbias = sum_rows dy.
struct LayerNormBackward {
  DType dtype;
  int64_t rows, hidden;
  Dropout dropout;
  const void* dy;  // [N, hidden]
  int64_t dy_stride;
  const void* sum;  // [N, hidden]
  int64_t sum_stride;
  const void* mean;    // [N]
  const void* rstd;    // [N]
  const void* weight;  // [hidden]
  void* dsum;          // [N, hidden] contiguous, the gradient of the residual too
  void* dx;            // [N, hidden] contiguous; null where p = 0 (dx is dsum then)
  void* dweight;       // [hidden]; null together with dbias
  void* dbias;         // [hidden]
};

// y = dropout(LayerNorm(word[id] + position[position_id] + type[type_id])), the sum as LayerNorm's.
struct EmbeddingForward {
  DType dtype;
  int64_t rows, hidden;
  double eps;
  Dropout dropout;
  const int64_t* input_ids;   // [N]; null where inputs_embeds is given
  const void* inputs_embeds;  // [N, hidden], instead of word rows; may be null
  int64_t inputs_embeds_stride;
  const int64_t* position_ids;    // [N]
  const int64_t* token_type_ids;  // [N]; null means type 0 everywhere
  // V, P and T. Ids beyond them give a row of NaN where the caller cannot look at the ids (CUDA);
  // the CPU's kernels rely on the caller.
  int64_t word_rows, position_rows, token_type_rows;
  const void* word;         // [V, hidden]; may be null with inputs_embeds
  const float* word_scale;  // [V]: `word` is int8, a row's values q * scale; may be null
  const void* position;     // [P, hidden]
  const void* token_type;   // [T, hidden]
  const void* weight;       // [hidden] LayerNorm's
  const void* bias;         // [hidden]
  void* y;                  // [N, hidden] contiguous
  void* mean;               // [N], a statistic as rstd; may be null together with it
  void* rstd;               // [N]
};

// dsum as in LayerNormBackward, the sum being gathered again; then, row by row in ascending
// order, dword[id] += dsum, dposition[position_id] += dsum, dtoken_type[type_id] += dsum, rounded
// to 16 bits once, after the last row. Rows equal to padding_idx get nothing in dword and dposition
// (torch.nn.Embedding's rule).
struct EmbeddingBackward {
  DType dtype;
  int64_t rows, hidden;
  Dropout dropout;
  int64_t padding_idx;  // -1: none
  const void* dy;       // [N, hidden]
  int64_t dy_stride;
  const int64_t* input_ids;
  const void* inputs_embeds;
  int64_t inputs_embeds_stride;
  const int64_t* position_ids;
  const int64_t* token_type_ids;
  int64_t word_rows, position_rows, token_type_rows;  // ids beyond them are left out
  const void* word;
  const void* position;
  const void* token_type;
  const void* weight;
  const void* mean;
  const void* rstd;
  void* dsum;         // [N, hidden] contiguous, the gradient of inputs_embeds
  void* dword;        // [V, hidden] += ; may be null
  void* dposition;    // [P, hidden] += ; may be null
  void* dtoken_type;  // [T, hidden] += ; may be null
  void* dweight;      // [hidden]; null together with dbias
  void* dbias;        // [hidden]
};

// y = act(x W^T + b [+ addend]) in float32 over 8-bit weights, w = q * scale of its output channel.
// Every row of x is quantised on the way, about the centre c = max / 2 + min / 2 of its values and
// with half their range h = max / 2 - min / 2: q = round((x - c) * (127 / h)), its scale h / 127.
// So GELU's output, which has one sign nearly, loses no bit to the other. The product is exact in
// int32, the same on every table; then y = acc * (row scale * channel scale) + c * (channel scale *
// sum of the channel's q) + b [+ addend], no two of these fused, and so without an activation y has
// the same bits on every table. Where h is below 2^-100 every value of the row counts as c; a row
// that holds NaN or infinity gives NaN.
struct LinearInt8Forward {
  Activation activation;                    // none or tanh
  int64_t rows, in_features, out_features;  // in_features at most kInt8MaxFeatures
  const float* x;                           // [N, in]
  int64_t x_stride;
  const void* weight;   // [out, in] as core/int8_layout.h lays it out
  const float* bias;    // [out]; may be null
  const float* addend;  // [N, out], added before the activation; may be null
  int64_t addend_stride;
  float* y;  // [N, out]
  int64_t y_stride;
};

// y = act(x W1^T + b1) W2^T + b2 [+ addend], both products as in LinearInt8Forward.
struct FeedForwardInt8Forward {
  Activation activation;        // gelu, gelu_tanh or relu
  int64_t rows, hidden, inner;  // hidden and inner at most kInt8MaxFeatures
  const float* x;               // [N, hidden]
  int64_t x_stride;
  const void* up_weight;    // W1 [inner, hidden], packed
  const float* up_bias;     // [inner]; may be null
  const void* down_weight;  // W2 [hidden, inner], packed
  const float* down_bias;   // [hidden]; may be null
  const float* addend;      // [N, hidden]; may be null
  int64_t addend_stride;
  float* y;  // [N, hidden] contiguous
};

template <class Args>
struct Op {
  int64_t (*workspace)(const Args&, const ExecContext&);
  Status (*run)(const Args&, const ExecContext&);
};

// The ops that a table of integer dot products puts in place of those of the table below it.
struct Int8Ops {
  Op<LinearInt8Forward> linear_forward;
  Op<FeedForwardInt8Forward> feed_forward_forward;
};

// Products whose operands are rounded to bfloat16 (to nearest, ties to even; denormals become 0)
// and summed in float32; all else is float32, and so are the tensors. What `packed` weights are:
// core/bf16_layout.h, the same for all tables. A table without units for them rounds nothing but
// those: with the others it computes as in float32. A row has the same bits alone and in any batch.
struct Bf16Ops {
  Op<LinearForward> linear_forward;
  Op<LinearBackward> linear_backward;
  Op<FeedForwardForward> feed_forward_forward;
  Op<FeedForwardBackward> feed_forward_backward;
};

struct KernelTable {
  const char* name;
  const char* layout;  // the table whose pack_weight this one reads: its own name, or another's
  int64_t (*packed_bytes)(DType dtype, int64_t out_features, int64_t in_features);  // or -1
  Op<PackWeight> pack_weight;
  Op<LinearForward> linear_forward;
  Op<LinearBackward> linear_backward;
  Op<FeedForwardForward> feed_forward_forward;
  Op<FeedForwardBackward> feed_forward_backward;
  Op<AttentionForward> attention_forward;
  Op<AttentionBackward> attention_backward;
  Op<LayerNormForward> layer_norm_forward;
  Op<LayerNormBackward> layer_norm_backward;
  Op<EmbeddingForward> embedding_forward;
  Op<EmbeddingBackward> embedding_backward;
  Bf16Ops bf16;
  Int8Ops int8;
};

}  // namespace xlmr
