// C = epilogue(sum over segments of A B): on tensor cores in 16 bits, else by fused multiply-add.
// epilogue(product, row, column, z) makes of a sum what is stored.
#pragma once

#include "cuda/gemm_fma.cuh"
#include "cuda/gemm_mma.cuh"

namespace xlmr::XLMR_CUDA_NS {
namespace {

template <Layout kA, Layout kB, class T, class Epilogue>
Status gemm(const char* name, const GemmArgs<T>& g, const Epilogue& epilogue,
            const ExecContext& ctx) {
  if constexpr (kIs16Bits<T>) {
    return gemm_mma<kA, kB>(name, g, epilogue, ctx);
  } else {
    return gemm_fma<kA, kB>(name, g, epilogue, ctx);
  }
}

}  // namespace
}  // namespace xlmr::XLMR_CUDA_NS
