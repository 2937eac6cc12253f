// The ops' functions, the same for every Python module: each makes its argument struct of integers.
// Everything has been checked by xlmr_ext/_launch.py.
#pragma once

#include <cstdint>
#include <vector>

#include "ops.h"

namespace xlmr::bindings {
// Internal linkage on purpose: each module compiles its own.
namespace {

using Address = uintptr_t;

inline void* pointer(Address address) { return reinterpret_cast<void*>(address); }
template <class T>
const T* pointer_to(Address address) {
  return reinterpret_cast<const T*>(address);
}
template <class P>
void pointers(const std::vector<Address>& from, P (&to)[3]) {
  for (size_t i = 0; i < 3; ++i) to[i] = i < from.size() ? pointer(from[i]) : nullptr;
}

inline Dropout dropout(double p, int64_t site, Address seed) {
  return {p, site, pointer_to<int64_t>(seed)};
}

LinearForward linear_forward(int dtype, int activation, int64_t rows, int64_t in_features,
                             int64_t out_features, Address x, int64_t x_stride,
                             const std::vector<Address>& weight, const std::vector<Address>& bias,
                             Address addend, int64_t addend_stride, const std::vector<Address>& y,
                             int64_t y_stride) {
  LinearForward a{};
  a.dtype = static_cast<DType>(dtype);
  a.activation = static_cast<Activation>(activation);
  a.rows = rows;
  a.in_features = in_features;
  a.out_features = out_features;
  a.parts = static_cast<int64_t>(weight.size());
  a.x = pointer(x);
  a.x_stride = x_stride;
  pointers(weight, a.weight);
  pointers(bias, a.bias);
  a.addend = pointer(addend);
  a.addend_stride = addend_stride;
  pointers(y, a.y);
  a.y_stride = y_stride;
  return a;
}

LinearBackward linear_backward(int dtype, int activation, int64_t rows, int64_t in_features,
                               int64_t out_features, const std::vector<Address>& dy,
                               int64_t dy_stride, Address x, int64_t x_stride,
                               const std::vector<Address>& weight, Address y, Address dx,
                               const std::vector<Address>& dweight,
                               const std::vector<Address>& dbias, Address dz) {
  LinearBackward a{};
  a.dtype = static_cast<DType>(dtype);
  a.activation = static_cast<Activation>(activation);
  a.rows = rows;
  a.in_features = in_features;
  a.out_features = out_features;
  a.parts = static_cast<int64_t>(dy.size());
  pointers(dy, a.dy);
  a.dy_stride = dy_stride;
  a.x = pointer(x);
  a.x_stride = x_stride;
  pointers(weight, a.weight);
  a.y = pointer(y);
  a.dx = pointer(dx);
  pointers(dweight, a.dweight);
  pointers(dbias, a.dbias);
  a.dz = pointer(dz);
  return a;
}

FeedForwardForward feed_forward_forward(int dtype, int activation, int64_t rows, int64_t hidden,
                                        int64_t inner, Address x, int64_t x_stride,
                                        Address up_weight, Address up_bias, Address down_weight,
                                        Address down_bias, Address hidden_addend,
                                        int64_t hidden_addend_stride, Address addend,
                                        int64_t addend_stride, Address y, Address pre) {
  FeedForwardForward a{};
  a.dtype = static_cast<DType>(dtype);
  a.activation = static_cast<Activation>(activation);
  a.rows = rows;
  a.hidden = hidden;
  a.inner = inner;
  a.x = pointer(x);
  a.x_stride = x_stride;
  a.up_weight = pointer(up_weight);
  a.up_bias = pointer(up_bias);
  a.down_weight = pointer(down_weight);
  a.down_bias = pointer(down_bias);
  a.hidden_addend = pointer(hidden_addend);
  a.hidden_addend_stride = hidden_addend_stride;
  a.addend = pointer(addend);
  a.addend_stride = addend_stride;
  a.y = pointer(y);
  a.pre = pointer(pre);
  return a;
}

FeedForwardBackward feed_forward_backward(int dtype, int activation, int64_t rows, int64_t hidden,
                                          int64_t inner, Address dy, int64_t dy_stride, Address x,
                                          int64_t x_stride, Address up_weight, Address down_weight,
                                          Address pre, Address dx, Address dup_weight,
                                          Address dup_bias, Address ddown_weight,
                                          Address ddown_bias, Address dpre) {
  FeedForwardBackward a{};
  a.dtype = static_cast<DType>(dtype);
  a.activation = static_cast<Activation>(activation);
  a.rows = rows;
  a.hidden = hidden;
  a.inner = inner;
  a.dy = pointer(dy);
  a.dy_stride = dy_stride;
  a.x = pointer(x);
  a.x_stride = x_stride;
  a.up_weight = pointer(up_weight);
  a.down_weight = pointer(down_weight);
  a.pre = pointer(pre);
  a.dx = pointer(dx);
  a.dup_weight = pointer(dup_weight);
  a.dup_bias = pointer(dup_bias);
  a.ddown_weight = pointer(ddown_weight);
  a.ddown_bias = pointer(ddown_bias);
  a.dpre = pointer(dpre);
  return a;
}

AttentionForward attention_forward(int dtype, int64_t batch, int64_t rows, int64_t num_heads,
                                   int64_t head_size, int64_t max_seqlen, Address cu_seqlens,
                                   double scale, double p, int64_t site, Address seed,
                                   bool first_only, Address query, int64_t query_stride,
                                   Address key, int64_t key_stride, Address value,
                                   int64_t value_stride, Address out, int64_t out_stride,
                                   Address lse) {
  AttentionForward a{};
  a.dtype = static_cast<DType>(dtype);
  a.batch = batch;
  a.rows = rows;
  a.num_heads = num_heads;
  a.head_size = head_size;
  a.max_seqlen = max_seqlen;
  a.cu_seqlens = pointer_to<int32_t>(cu_seqlens);
  a.scale = scale;
  a.dropout = dropout(p, site, seed);
  a.first_only = first_only;
  a.query = pointer(query);
  a.query_stride = query_stride;
  a.key = pointer(key);
  a.key_stride = key_stride;
  a.value = pointer(value);
  a.value_stride = value_stride;
  a.out = pointer(out);
  a.out_stride = out_stride;
  a.lse = pointer(lse);
  return a;
}

AttentionBackward attention_backward(int dtype, int64_t batch, int64_t rows, int64_t num_heads,
                                     int64_t head_size, int64_t max_seqlen, Address cu_seqlens,
                                     double scale, double p, int64_t site, Address seed,
                                     bool first_only, Address dout, int64_t dout_stride,
                                     Address query, int64_t query_stride, Address key,
                                     int64_t key_stride, Address value, int64_t value_stride,
                                     Address out, int64_t out_stride, Address lse, Address dquery,
                                     int64_t dquery_stride, Address dkey, Address dvalue,
                                     int64_t dkv_stride) {
  AttentionBackward a{};
  a.dtype = static_cast<DType>(dtype);
  a.batch = batch;
  a.rows = rows;
  a.num_heads = num_heads;
  a.head_size = head_size;
  a.max_seqlen = max_seqlen;
  a.cu_seqlens = pointer_to<int32_t>(cu_seqlens);
  a.scale = scale;
  a.dropout = dropout(p, site, seed);
  a.first_only = first_only;
  a.dout = pointer(dout);
  a.dout_stride = dout_stride;
  a.query = pointer(query);
  a.query_stride = query_stride;
  a.key = pointer(key);
  a.key_stride = key_stride;
  a.value = pointer(value);
  a.value_stride = value_stride;
  a.out = pointer(out);
  a.out_stride = out_stride;
  a.lse = pointer(lse);
  a.dquery = pointer(dquery);
  a.dquery_stride = dquery_stride;
  a.dkey = pointer(dkey);
  a.dvalue = pointer(dvalue);
  a.dkv_stride = dkv_stride;
  return a;
}

LayerNormForward layer_norm_forward(int dtype, int64_t rows, int64_t hidden, double eps, double p,
                                    int64_t site, Address seed, Address x, int64_t x_stride,
                                    Address residual, int64_t residual_stride, Address weight,
                                    Address bias, Address y, Address sum, Address mean,
                                    Address rstd) {
  LayerNormForward a{};
  a.dtype = static_cast<DType>(dtype);
  a.rows = rows;
  a.hidden = hidden;
  a.eps = eps;
  a.dropout = dropout(p, site, seed);
  a.x = pointer(x);
  a.x_stride = x_stride;
  a.residual = pointer(residual);
  a.residual_stride = residual_stride;
  a.weight = pointer(weight);
  a.bias = pointer(bias);
  a.y = pointer(y);
  a.sum = pointer(sum);
  a.mean = pointer(mean);
  a.rstd = pointer(rstd);
  return a;
}

LayerNormBackward layer_norm_backward(int dtype, int64_t rows, int64_t hidden, double p,
                                      int64_t site, Address seed, Address dy, int64_t dy_stride,
                                      Address sum, int64_t sum_stride, Address mean, Address rstd,
                                      Address weight, Address dsum, Address dx, Address dweight,
                                      Address dbias) {
  LayerNormBackward a{};
  a.dtype = static_cast<DType>(dtype);
  a.rows = rows;
  a.hidden = hidden;
  a.dropout = dropout(p, site, seed);
  a.dy = pointer(dy);
  a.dy_stride = dy_stride;
  a.sum = pointer(sum);
  a.sum_stride = sum_stride;
  a.mean = pointer(mean);
  a.rstd = pointer(rstd);
  a.weight = pointer(weight);
  a.dsum = pointer(dsum);
  a.dx = pointer(dx);
  a.dweight = pointer(dweight);
  a.dbias = pointer(dbias);
  return a;
}

// What the embedding's two directions share.
template <class Args>
void set_embedding_inputs(Args& a, int dtype, int64_t rows, int64_t hidden, const Dropout& dropout,
                          Address input_ids, Address inputs_embeds, int64_t inputs_embeds_stride,
                          Address position_ids, Address token_type_ids, int64_t word_rows,
                          Address word, int64_t position_rows, Address position,
                          int64_t token_type_rows, Address token_type, Address weight) {
  a.dtype = static_cast<DType>(dtype);
  a.rows = rows;
  a.hidden = hidden;
  a.dropout = dropout;
  a.input_ids = pointer_to<int64_t>(input_ids);
  a.inputs_embeds = pointer(inputs_embeds);
  a.inputs_embeds_stride = inputs_embeds_stride;
  a.position_ids = pointer_to<int64_t>(position_ids);
  a.token_type_ids = pointer_to<int64_t>(token_type_ids);
  a.word_rows = word_rows;
  a.word = pointer(word);
  a.position_rows = position_rows;
  a.position = pointer(position);
  a.token_type_rows = token_type_rows;
  a.token_type = pointer(token_type);
  a.weight = pointer(weight);
}

EmbeddingForward embedding_forward(int dtype, int64_t rows, int64_t hidden, double p, int64_t site,
                                   Address seed, Address input_ids, Address inputs_embeds,
                                   int64_t inputs_embeds_stride, Address position_ids,
                                   Address token_type_ids, int64_t word_rows, Address word,
                                   int64_t position_rows, Address position, int64_t token_type_rows,
                                   Address token_type, Address weight, Address bias, double eps,
                                   Address y, Address mean, Address rstd) {
  EmbeddingForward a{};
  set_embedding_inputs(a, dtype, rows, hidden, dropout(p, site, seed), input_ids, inputs_embeds,
                       inputs_embeds_stride, position_ids, token_type_ids, word_rows, word,
                       position_rows, position, token_type_rows, token_type, weight);
  a.eps = eps;
  a.bias = pointer(bias);
  a.y = pointer(y);
  a.mean = pointer(mean);
  a.rstd = pointer(rstd);
  return a;
}

EmbeddingBackward embedding_backward(
    int dtype, int64_t rows, int64_t hidden, double p, int64_t site, Address seed,
    Address input_ids, Address inputs_embeds, int64_t inputs_embeds_stride, Address position_ids,
    Address token_type_ids, int64_t word_rows, Address word, int64_t position_rows,
    Address position, int64_t token_type_rows, Address token_type, Address weight,
    int64_t padding_idx, Address dy, int64_t dy_stride, Address mean, Address rstd, Address dsum,
    Address dword, Address dposition, Address dtoken_type, Address dweight, Address dbias) {
  EmbeddingBackward a{};
  set_embedding_inputs(a, dtype, rows, hidden, dropout(p, site, seed), input_ids, inputs_embeds,
                       inputs_embeds_stride, position_ids, token_type_ids, word_rows, word,
                       position_rows, position, token_type_rows, token_type, weight);
  a.padding_idx = padding_idx;
  a.dy = pointer(dy);
  a.dy_stride = dy_stride;
  a.mean = pointer(mean);
  a.rstd = pointer(rstd);
  a.dsum = pointer(dsum);
  a.dword = pointer(dword);
  a.dposition = pointer(dposition);
  a.dtoken_type = pointer(dtoken_type);
  a.dweight = pointer(dweight);
  a.dbias = pointer(dbias);
  return a;
}

// Calls define(name, member of the table, function) for every op.
template <class Define>
void define_ops(const Define& define) {
  define("linear_forward", &KernelTable::linear_forward, linear_forward);
  define("linear_backward", &KernelTable::linear_backward, linear_backward);
  define("feed_forward_forward", &KernelTable::feed_forward_forward, feed_forward_forward);
  define("feed_forward_backward", &KernelTable::feed_forward_backward, feed_forward_backward);
  define("attention_forward", &KernelTable::attention_forward, attention_forward);
  define("attention_backward", &KernelTable::attention_backward, attention_backward);
  define("layer_norm_forward", &KernelTable::layer_norm_forward, layer_norm_forward);
  define("layer_norm_backward", &KernelTable::layer_norm_backward, layer_norm_backward);
  define("embedding_forward", &KernelTable::embedding_forward, embedding_forward);
  define("embedding_backward", &KernelTable::embedding_backward, embedding_backward);
}

}  // namespace
}  // namespace xlmr::bindings
