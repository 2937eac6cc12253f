// The Python module _C: the ops over the processor's tables, the encoder, packed weights. The GIL
// is released, errors become exceptions. Everything has been checked by the only callers,
// xlmr_ext/_native.py and _launch_encoder.py.
//
// Every op takes (..., num_threads, workspace, workspace_bytes) last. It returns 0 when it ran, or,
// having done nothing, the bytes of workspace that it needs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/op_arguments.h"
#include "core/bf16_layout.h"
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
using xlmr::bindings::Address;
using xlmr::bindings::pointer;
using xlmr::bindings::pointer_to;

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
int64_t execute(const xlmr::Op<Args>& kernel, const Args& args, int32_t num_threads,
                Address workspace, int64_t workspace_bytes) {
  return execute(
      xlmr::Entry::at_once, [&](const ExecContext& ctx) { return kernel.workspace(args, ctx); },
      [&](const ExecContext& ctx) { return kernel.run(args, ctx); }, num_threads, workspace,
      workspace_bytes);
}

// Gives the module an op whose arguments `make` takes.
struct DefineOp {
  py::module_& module;

  // `op` is a member of the table, or of its products in bfloat16.
  template <class Member, class Args, class... P>
  void operator()(const char* name, Member op, Args (*make)(P...)) const {
    module.def(name, [op, make](P... integers, int32_t num_threads, Address workspace,
                                int64_t workspace_bytes) {
      return execute(kernel(op), make(integers...), num_threads, workspace, workspace_bytes);
    });
  }

 private:
  template <class Args>
  static const xlmr::Op<Args>& kernel(xlmr::Op<Args> KernelTable::* op) {
    return xlmr::active().table->*op;
  }
  template <class Args>
  static const xlmr::Op<Args>& kernel(xlmr::Op<Args> xlmr::Bf16Ops::* op) {
    return xlmr::active().table->bf16.*op;
  }
};

int64_t checked_bytes(int64_t bytes) {
  if (bytes < 0) throw std::overflow_error("a packed weight of this shape does not fit in 64 bits");
  return bytes;
}

int64_t packed_bytes(int dtype, int64_t out_features, int64_t in_features) {
  return checked_bytes(xlmr::active().table->packed_bytes(static_cast<xlmr::DType>(dtype),
                                                          out_features, in_features));
}

xlmr::PackWeight pack_weight(int dtype, int64_t out_features, int64_t in_features, Address weight,
                             Address packed) {
  return {static_cast<xlmr::DType>(dtype), out_features, in_features, pointer(weight),
          pointer(packed)};
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

int64_t packed_bf16_bytes(int64_t out_features, int64_t in_features) {
  return checked_bytes(xlmr::packed_bf16_bytes(out_features, in_features));
}

void pack_bf16_weight(int64_t out_features, int64_t in_features, Address weight, Address packed) {
  py::gil_scoped_release unlocked;
  xlmr::pack_bf16_weight(out_features, in_features, pointer_to<float>(weight), pointer(packed));
}

// The fields of xlmr::EncoderLayer, in their order.
using LayerAddresses = std::array<Address, 14>;

int64_t encoder_forward(int dtype, int activation, int64_t rows, int64_t hidden, int64_t inner,
                        int64_t num_heads, int64_t batch, int64_t max_seqlen, Address cu_seqlens,
                        double scale, double eps, Address input_ids, Address inputs_embeds,
                        int64_t inputs_embeds_stride, Address position_ids, Address token_type_ids,
                        int64_t word_rows, Address word, int64_t position_rows, Address position,
                        int64_t token_type_rows, Address token_type, Address weight, Address bias,
                        Address word_scale, const std::vector<LayerAddresses>& layers, int weights,
                        bool first_only, Address y, Address states, int32_t num_threads,
                        Address workspace, int64_t workspace_bytes) {
  static_assert(sizeof(xlmr::EncoderLayer) == sizeof(LayerAddresses));
  xlmr::EncoderForward a{};
  xlmr::bindings::set_embedding_inputs(a.embedding, dtype, rows, hidden, {}, input_ids,
                                       inputs_embeds, inputs_embeds_stride, position_ids,
                                       token_type_ids, word_rows, word, position_rows, position,
                                       token_type_rows, token_type, weight);
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
  a.weights = static_cast<xlmr::WeightFormat>(weights);
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
  m.doc() = "Native kernels of xlmr_ext; called through xlmr_ext._native only.";
  // A forced table that this processor cannot run is an error at import, not at the first call.
  xlmr::active();

  const DefineOp define{m};
  xlmr::bindings::define_ops(define);
  using xlmr::Bf16Ops;
  define("linear_bf16_forward", &Bf16Ops::linear_forward, xlmr::bindings::linear_forward);
  define("linear_bf16_backward", &Bf16Ops::linear_backward, xlmr::bindings::linear_backward);
  define("feed_forward_bf16_forward", &Bf16Ops::feed_forward_forward,
         xlmr::bindings::feed_forward_forward);
  define("feed_forward_bf16_backward", &Bf16Ops::feed_forward_backward,
         xlmr::bindings::feed_forward_backward);
  define("pack_weight", &KernelTable::pack_weight, pack_weight);
  m.def("packed_bf16_bytes", &packed_bf16_bytes);
  m.def("pack_bf16_weight", &pack_bf16_weight);
  m.def("packed_bytes", &packed_bytes);
  m.def("packed_int8_bytes", &packed_int8_bytes);
  m.def("pack_int8_weight", &pack_int8_weight);
  m.attr("int8_max_features") = xlmr::kInt8MaxFeatures;
  m.def("encoder_forward", &encoder_forward);
  m.def("describe", &describe);
  m.def("set_cpu_capacity", [](int32_t cpus) { xlmr::cpu_budget().set_capacity(cpus); });
  m.def("table_name", [] { return xlmr::active().table->name; });
  m.def("layout_name", [] { return xlmr::active().table->layout; });
  // Whether products in bfloat16 round their operands on the table in use.
  m.def("has_bf16_units", [] {
    const KernelTable& table = *xlmr::active().table;
    return table.bf16.linear_backward.run != table.linear_backward.run;
  });
  m.def("set_table", [](const std::string& name) { xlmr::set_active(name.c_str()); });
}
