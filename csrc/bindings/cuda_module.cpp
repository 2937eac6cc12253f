// The Python module _cuda: the ops over the CUDA kernels, and what Python must know of the runtime
// to choose between them and torch's operators. cudart is linked statically and finds the driver at
// its first call, so the module is imported on a machine without one.
//
// Every op takes (..., device, stream, workspace, workspace_bytes) last. It returns 0 when it was
// started, or, having done nothing, the bytes of workspace that it needs. Nothing is allocated,
// waited for or read back: a CUDA graph may capture it.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "bindings/op_arguments.h"
#include "ops.h"

namespace py = pybind11;

namespace xlmr::cuda {
extern const KernelTable table;
}

namespace {

using xlmr::ExecContext;
using xlmr::KernelTable;
using xlmr::bindings::Address;
using xlmr::bindings::pointer;

template <class Args>
int64_t execute(const xlmr::Op<Args>& kernel, const Args& args, int32_t device, Address stream,
                Address workspace, int64_t workspace_bytes) {
  py::gil_scoped_release unlocked;
  ExecContext ctx;
  ctx.device = device;
  ctx.stream = pointer(stream);
  ctx.workspace = pointer(workspace);
  const int64_t needed = kernel.workspace(args, ctx);
  if (needed < 0) throw std::overflow_error("the workspace of this shape does not fit in 64 bits");
  if (needed > workspace_bytes) return needed;
  if (const char* error = kernel.run(args, ctx)) {
    throw std::runtime_error("on the GPU: " + std::string(error));
  }
  return 0;
}

// Gives the module an op whose arguments `make` takes.
struct DefineOp {
  py::module_& module;

  template <class Args, class... P>
  void operator()(const char* name, xlmr::Op<Args> KernelTable::* op, Args (*make)(P...)) const {
    module.def(name, [op, make](P... integers, int32_t device, Address stream, Address workspace,
                                int64_t workspace_bytes) {
      return execute(xlmr::cuda::table.*op, make(integers...), device, stream, workspace,
                     workspace_bytes);
    });
  }
};

// What there is to run on, without judgement: xlmr_ext/cuda_support.py makes sentences of it.
py::dict machine() {
  int driver = 0;
  int devices = 0;
  cudaDriverGetVersion(&driver);
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) {
    cudaGetLastError();  // it is told here; the next launch must not find it
    devices = 0;
  }
  py::list capabilities;
  for (int device = 0; device < devices; ++device) {
    int major = 0;
    int minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    capabilities.append(10 * major + minor);
  }
  py::dict d;
  d["error"] = error == cudaSuccess ? "" : cudaGetErrorName(error);
  d["driver"] = driver;
  d["capabilities"] = capabilities;
  return d;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of xlmr_ext; called through xlmr_ext._native only.";
  xlmr::bindings::define_ops(DefineOp{m});
  m.def("machine", &machine);
  // Types that every op computes in, by torch's names.
  py::dict dtypes;
  dtypes["float32"] = static_cast<int>(xlmr::DType::float32);
  dtypes["float64"] = static_cast<int>(xlmr::DType::float64);
  dtypes["bfloat16"] = static_cast<int>(xlmr::DType::bfloat16);
  dtypes["float16"] = static_cast<int>(xlmr::DType::float16);
  m.attr("dtypes") = dtypes;
  // As CMake has them: 90-real is machine code for devices 9.x, 90-virtual is PTX for 9.0 and
  // newer.
  m.attr("architectures") = XLMR_CUDA_ARCHITECTURES;
  m.attr("compiler") = XLMR_CUDA_COMPILER;
  m.attr("runtime") = CUDART_VERSION;
}
