// What the forward products do to a sum before they store it.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/element.cuh"

namespace xlmr::XLMR_CUDA_NS {
namespace {

// y = act(z + bias [+ addend]); z + bias + addend is kept in `pre`, where it may be rounded.
template <class T>
struct BiasActivation {
  const T* bias[3] = {};  // of each product; may be null, as `addend` and `pre`
  const T* addend = nullptr;
  int64_t addend_stride = 0;
  T* pre = nullptr;
  int64_t pre_stride = 0;
  Activation activation = Activation::none;

  __device__ __forceinline__ Wide<T> operator()(int product, int64_t row, int64_t column,
                                                Wide<T> z) const {
    // No index that is known only then: it would move this struct to local memory.
    const T* of_product = product == 0 ? bias[0] : product == 1 ? bias[1] : bias[2];
    if (of_product != nullptr) z += widen(of_product[column]);
    if (addend != nullptr) z += widen(addend[row * addend_stride + column]);
    if (pre != nullptr) pre[row * pre_stride + column] = narrow<T>(z);
    return activate(activation, z);
  }
};

}  // namespace
}  // namespace xlmr::XLMR_CUDA_NS
