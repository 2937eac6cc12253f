// What the forward products do to a sum before they store it.
#pragma once

#include "cuda/activation.cuh"

namespace xlmr::XLMR_CUDA_NS {
namespace {

// y = act(z + bias [+ addend]); z + bias + addend is kept in `pre`.
template <class T>
struct BiasActivation {
  const T* bias[3] = {};  // of each product; may be null, as `addend` and `pre`
  const T* addend = nullptr;
  int64_t addend_stride = 0;
  T* pre = nullptr;
  int64_t pre_stride = 0;
  Activation activation = Activation::none;

  __device__ __forceinline__ T operator()(int product, int64_t row, int64_t column, T z) const {
    if (bias[product] != nullptr) z += bias[product][column];
    if (addend != nullptr) z += addend[row * addend_stride + column];
    if (pre != nullptr) pre[row * pre_stride + column] = z;
    return activate(activation, z);
  }
};

}  // namespace
}  // namespace xlmr::XLMR_CUDA_NS
