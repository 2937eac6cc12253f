// What a product of matrices is asked: C = epilogue(sum over segments of A B).
#pragma once

#include "cuda/element.cuh"

namespace xlmr::XLMR_CUDA_NS {
namespace {

// How an operand lies in memory: element (i, k) of A, or (k, j) of B, at i (or j) and k.
enum class Layout {
  k_contiguous,  // data[i * stride + k]: x, or W in x W^T
  k_strided,     // data[k * stride + i]: W in dz W, and both in dz^T x
};

template <class T>
struct GemmArgs {
  int64_t m = 0, n = 0, k = 0;         // k: of one segment
  int64_t products = 1, segments = 1;  // one of them is 1; each has its own A, B (and C)
  const T* a[3] = {};
  const T* b[3] = {};
  T* c[3] = {};
  int64_t a_stride = 0, b_stride = 0, c_stride = 0;
};

struct NoEpilogue {
  template <class W>
  __device__ W operator()(int, int64_t, int64_t, W z) const {
    return z;
  }
};

}  // namespace
}  // namespace xlmr::XLMR_CUDA_NS
