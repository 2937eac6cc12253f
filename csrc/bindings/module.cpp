// The Python module _C: integers become argument structs, the GIL is released, errors become
// exceptions. Everything has been checked by xlmr_ext/_launch.py, the only caller.
//
// Every op takes (..., num_threads, workspace, workspace_bytes) last. It returns 0 when it ran, or,
// having done nothing, the bytes of workspace that it needs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/cpu_budget.h"
#include "core/cpu_features.h"
#include "core/dispatch.h"
#include "core/encoder.h"
#include "core/int8_layout.h"
#include "core/parallel.h"
#include "ops.h"

namespace py = pybind11;

namespace {

using xlmr::ExecContext;
using xlmr::KernelTable;
using Address = uintptr_t;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }
template <class T>
const T* pointer_to(Address address) {
  return reinterpret_cast<const T*>(address);
}
template <class P>
void pointers(const std::vector<Address>& from, P (&to)[3]) {
  for (size_t i = 0; i < 3; ++i) to[i] = i < from.size() ? pointer(from[i]) : nullptr;
}

// query(ctx) gives the bytes of workspace, run(ctx) works.
template <class Query, class Run>
int64_t execute(xlmr::Entry entry, const Query& query, const Run& run, int32_t num_threads,
                Address workspace, int64_t workspace_bytes) {
  py::gil_scoped_release unlocked;
  ExecContext ctx;
  ctx.num_threads = num_threads;
  ctx.workspace = pointer(workspace);
  const int64_t needed = query(ctx);
  if (needed < 0) throw std::overflow_error("the workspace of this shape does not fit in 64 bits");
  if (needed > workspace_bytes) return needed;
  const xlmr::CpuTurn turn(entry, num_threads);
  ctx.num_threads = turn.threads();  // or fewer: they need no more workspace
  if (const char* error = run(ctx)) throw std::runtime_error(error);
  return 0;
}

template <class Args>
int64_t execute(xlmr::Op<Args> KernelTable::* op, const Args& args, int32_t num_threads,
                Address workspace, int64_t workspace_bytes) {
  const xlmr::Op<Args>& kernel = xlmr::active().table->*op;
  return execute(
      xlmr::Entry::at_once, [&](const ExecContext& ctx) { return kernel.workspace(args, ctx); },
      [&](const ExecContext& ctx) { return kernel.run(args, ctx); }, num_threads, workspace,
      workspace_bytes);
}

xlmr::Dropout dropout(double p, int64_t site, Address seed) {
  return {p, site, pointer_to<int64_t>(seed)};
}

#define XLMR_TAIL int32_t num_threads, Address workspace, int64_t workspace_bytes
#define XLMR_EXECUTE(name) execute(&KernelTable::name, a, num_threads, workspace, workspace_bytes)

int64_t linear_forward(int dtype, int activation, int64_t rows, int64_t in_features,
                       int64_t out_features, Address x, int64_t x_stride,
                       const std::vector<Address>& weight, const std::vector<Address>& bias,
                       Address addend, int64_t addend_stride, const std::vector<Address>& y,
                       int64_t y_stride, XLMR_TAIL) {
  xlmr::LinearForward a{};
  a.dtype = static_cast<xlmr::DType>(dtype);
  a.activation = static_cast<xlmr::Activation>(activation);
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
  return XLMR_EXECUTE(linear_forward);
}

int64_t linear_backward(int dtype, int activation, int64_t rows, int64_t in_features,
                        int64_t out_features, const std::vector<Address>& dy, int64_t dy_stride,
                        Address x, int64_t x_stride, const std::vector<Address>& weight, Address y,
                        Address dx, const std::vector<Address>& dweight,
                        const std::vector<Address>& dbias, Address dz, XLMR_TAIL) {
  xlmr::LinearBackward a{};
  a.dtype = static_cast<xlmr::DType>(dtype);
  a.activation = static_cast<xlmr::Activation>(activation);
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
  return XLMR_EXECUTE(linear_backward);
}

int64_t feed_forward_forward(int dtype, int activation, int64_t rows, int64_t hidden, int64_t inner,
                             Address x, int64_t x_stride, Address up_weight, Address up_bias,
                             Address down_weight, Address down_bias, Address hidden_addend,
                             int64_t hidden_addend_stride, Address addend, int64_t addend_stride,
                             Address y, Address pre, XLMR_TAIL) {
  xlmr::FeedForwardForward a{};
  a.dtype = static_cast<xlmr::DType>(dtype);
  a.activation = static_cast<xlmr::Activation>(activation);
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
  return XLMR_EXECUTE(feed_forward_forward);
}

int64_t feed_forward_backward(int dtype, int activation, int64_t rows, int64_t hidden,
                              int64_t inner, Address dy, int64_t dy_stride, Address x,
                              int64_t x_stride, Address up_weight, Address down_weight, Address pre,
                              Address dx, Address dup_weight, Address dup_bias,
                              Address ddown_weight, Address ddown_bias, Address dpre, XLMR_TAIL) {
  xlmr::FeedForwardBackward a{};
  a.dtype = static_cast<xlmr::DType>(dtype);
  a.activation = static_cast<xlmr::Activation>(activation);
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
  return XLMR_EXECUTE(feed_forward_backward);
}

int64_t attention_forward(int dtype, int64_t batch, int64_t rows, int64_t num_heads,
                          int64_t head_size, int64_t max_seqlen, Address cu_seqlens, double scale,
                          double p, int64_t site, Address seed, bool first_only, Address query,
                          int64_t query_stride, Address key, int64_t key_stride, Address value,
                          int64_t value_stride, Address out, int64_t out_stride, Address lse,
                          XLMR_TAIL) {
  xlmr::AttentionForward a{};
  a.dtype = static_cast<xlmr::DType>(dtype);
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
  return XLMR_EXECUTE(attention_forward);
}

int64_t attention_backward(int dtype, int64_t batch, int64_t rows, int64_t num_heads,
                           int64_t head_size, int64_t max_seqlen, Address cu_seqlens, double scale,
                           double p, int64_t site, Address seed, bool first_only, Address dout,
                           int64_t dout_stride, Address query, int64_t query_stride, Address key,
                           int64_t key_stride, Address value, int64_t value_stride, Address out,
                           int64_t out_stride, Address lse, Address dquery, int64_t dquery_stride,
                           Address dkey, Address dvalue, int64_t dkv_stride, XLMR_TAIL) {
  xlmr::AttentionBackward a{};
  a.dtype = static_cast<xlmr::DType>(dtype);
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
  return XLMR_EXECUTE(attention_backward);
}

int64_t layer_norm_forward(int dtype, int64_t rows, int64_t hidden, double eps, double p,
                           int64_t site, Address seed, Address x, int64_t x_stride,
                           Address residual, int64_t residual_stride, Address weight, Address bias,
                           Address y, Address sum, Address mean, Address rstd, XLMR_TAIL) {
  xlmr::LayerNormForward a{};
  a.dtype = static_cast<xlmr::DType>(dtype);
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
  return XLMR_EXECUTE(layer_norm_forward);
}

int64_t layer_norm_backward(int dtype, int64_t rows, int64_t hidden, double p, int64_t site,
                            Address seed, Address dy, int64_t dy_stride, Address sum,
                            int64_t sum_stride, Address mean, Address rstd, Address weight,
                            Address dsum, Address dx, Address dweight, Address dbias, XLMR_TAIL) {
  xlmr::LayerNormBackward a{};
  a.dtype = static_cast<xlmr::DType>(dtype);
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
  return XLMR_EXECUTE(layer_norm_backward);
}

// What the embedding's two directions share.
template <class Args>
void set_embedding_inputs(Args& a, int dtype, int64_t rows, int64_t hidden,
                          const xlmr::Dropout& dropout, Address input_ids, Address inputs_embeds,
                          int64_t inputs_embeds_stride, Address position_ids,
                          Address token_type_ids, int64_t word_rows, Address word,
                          int64_t position_rows, Address position, int64_t token_type_rows,
                          Address token_type, Address weight) {
  a.dtype = static_cast<xlmr::DType>(dtype);
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

int64_t embedding_forward(int dtype, int64_t rows, int64_t hidden, double p, int64_t site,
                          Address seed, Address input_ids, Address inputs_embeds,
                          int64_t inputs_embeds_stride, Address position_ids,
                          Address token_type_ids, int64_t word_rows, Address word,
                          int64_t position_rows, Address position, int64_t token_type_rows,
                          Address token_type, Address weight, Address bias, double eps, Address y,
                          Address mean, Address rstd, XLMR_TAIL) {
  xlmr::EmbeddingForward a{};
  set_embedding_inputs(a, dtype, rows, hidden, dropout(p, site, seed), input_ids, inputs_embeds,
                       inputs_embeds_stride, position_ids, token_type_ids, word_rows, word,
                       position_rows, position, token_type_rows, token_type, weight);
  a.eps = eps;
  a.bias = pointer(bias);
  a.y = pointer(y);
  a.mean = pointer(mean);
  a.rstd = pointer(rstd);
  return XLMR_EXECUTE(embedding_forward);
}

int64_t embedding_backward(int dtype, int64_t rows, int64_t hidden, double p, int64_t site,
                           Address seed, Address input_ids, Address inputs_embeds,
                           int64_t inputs_embeds_stride, Address position_ids,
                           Address token_type_ids, int64_t word_rows, Address word,
                           int64_t position_rows, Address position, int64_t token_type_rows,
                           Address token_type, Address weight, int64_t padding_idx, Address dy,
                           int64_t dy_stride, Address mean, Address rstd, Address dsum,
                           Address dword, Address dposition, Address dtoken_type, Address dweight,
                           Address dbias, XLMR_TAIL) {
  xlmr::EmbeddingBackward a{};
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
  return XLMR_EXECUTE(embedding_backward);
}

int64_t checked_bytes(int64_t bytes) {
  if (bytes < 0) throw std::overflow_error("a packed weight of this shape does not fit in 64 bits");
  return bytes;
}

int64_t packed_bytes(int dtype, int64_t out_features, int64_t in_features) {
  return checked_bytes(xlmr::active().table->packed_bytes(static_cast<xlmr::DType>(dtype),
                                                          out_features, in_features));
}

int64_t pack_weight(int dtype, int64_t out_features, int64_t in_features, Address weight,
                    Address packed, XLMR_TAIL) {
  const xlmr::PackWeight a{static_cast<xlmr::DType>(dtype), out_features, in_features,
                           pointer(weight), pointer(packed)};
  return XLMR_EXECUTE(pack_weight);
}

int64_t packed_int8_bytes(int64_t out_features, int64_t in_features) {
  return checked_bytes(xlmr::packed_int8_bytes(out_features, in_features));
}

void pack_int8_weight(int64_t out_features, int64_t in_features, Address weight, Address scale,
                      Address packed) {
  py::gil_scoped_release unlocked;
  xlmr::pack_int8_weight(out_features, in_features, pointer_to<int8_t>(weight),
                         pointer_to<float>(scale), pointer(packed));
}

// The fields of xlmr::EncoderLayer, in their order.
using LayerAddresses = std::array<Address, 14>;

int64_t encoder_forward(int dtype, int activation, int64_t rows, int64_t hidden, int64_t inner,
                        int64_t num_heads, int64_t batch, int64_t max_seqlen, Address cu_seqlens,
                        double scale, double eps, Address input_ids, Address inputs_embeds,
                        int64_t inputs_embeds_stride, Address position_ids, Address token_type_ids,
                        int64_t word_rows, Address word, int64_t position_rows, Address position,
                        int64_t token_type_rows, Address token_type, Address weight, Address bias,
                        Address word_scale, const std::vector<LayerAddresses>& layers,
                        bool int8_weights, bool first_only, Address y, Address states, XLMR_TAIL) {
  static_assert(sizeof(xlmr::EncoderLayer) == sizeof(LayerAddresses));
  xlmr::EncoderForward a{};
  set_embedding_inputs(a.embedding, dtype, rows, hidden, {}, input_ids, inputs_embeds,
                       inputs_embeds_stride, position_ids, token_type_ids, word_rows, word,
                       position_rows, position, token_type_rows, token_type, weight);
  a.embedding.eps = eps;
  a.embedding.bias = pointer(bias);
  a.embedding.word_scale = pointer_to<float>(word_scale);
  a.activation = static_cast<xlmr::Activation>(activation);
  a.inner = inner;
  a.num_heads = num_heads;
  a.num_layers = static_cast<int64_t>(layers.size());
  a.batch = batch;
  a.max_seqlen = max_seqlen;
  a.scale = scale;
  a.cu_seqlens = pointer_to<int32_t>(cu_seqlens);
  a.layers = reinterpret_cast<const xlmr::EncoderLayer*>(layers.data());
  a.int8_weights = int8_weights;
  a.first_only = first_only;
  a.y = pointer(y);
  a.states = pointer(states);
  const KernelTable& table = *xlmr::active().table;
  return execute(
      xlmr::Entry::in_turn,
      [&](const ExecContext& ctx) { return xlmr::encoder_forward_workspace(table, a, ctx); },
      [&](const ExecContext& ctx) { return xlmr::encoder_forward(table, a, ctx); }, num_threads,
      workspace, workspace_bytes);
}

py::dict describe() {
  const uint32_t available = xlmr::cpu_features();
  std::vector<std::string> built;
  std::vector<std::string> usable;
  for (const xlmr::TableInfo& info : xlmr::built_tables()) {
    built.emplace_back(info.table->name);
    if (xlmr::missing_feature(info.required, available) == nullptr) {
      usable.emplace_back(info.table->name);
    }
  }
  py::dict d;
  d["compiler"] = XLMR_EXT_COMPILER;
  d["openmp"] = xlmr::openmp_version();
  d["tables_built"] = built;
  d["tables_usable"] = usable;
  d["table"] = xlmr::active().table->name;
  d["table_reason"] = xlmr::active().reason;
  return d;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of xlmr_ext; called through xlmr_ext._launch only.";
  // A forced table that this processor cannot run is an error at import, not at the first call.
  xlmr::active();

  m.def("linear_forward", &linear_forward);
  m.def("linear_backward", &linear_backward);
  m.def("feed_forward_forward", &feed_forward_forward);
  m.def("feed_forward_backward", &feed_forward_backward);
  m.def("attention_forward", &attention_forward);
  m.def("attention_backward", &attention_backward);
  m.def("layer_norm_forward", &layer_norm_forward);
  m.def("layer_norm_backward", &layer_norm_backward);
  m.def("embedding_forward", &embedding_forward);
  m.def("embedding_backward", &embedding_backward);
  m.def("packed_bytes", &packed_bytes);
  m.def("pack_weight", &pack_weight);
  m.def("packed_int8_bytes", &packed_int8_bytes);
  m.def("pack_int8_weight", &pack_int8_weight);
  m.attr("int8_max_features") = xlmr::kInt8MaxFeatures;
  m.def("encoder_forward", &encoder_forward);
  m.def("describe", &describe);
  m.def("set_cpu_capacity", [](int32_t cpus) { xlmr::cpu_budget().set_capacity(cpus); });
  m.def("table_name", [] { return xlmr::active().table->name; });
  m.def("layout_name", [] { return xlmr::active().table->layout; });
  m.def("set_table", [](const std::string& name) { xlmr::set_active(name.c_str()); });
}
