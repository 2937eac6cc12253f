// The activations and their slopes, with the accuracy of CUDA's own erf, exp and tanh.
#pragma once

#include "core/gelu.h"
#include "cuda/common.cuh"

namespace xlmr::XLMR_CUDA_NS {
namespace {

template <class T>
struct ValueAndSlope {
  T value, slope;
};

template <class T>
__device__ __forceinline__ T activate(Activation activation, T x) {
  switch (activation) {
    case Activation::gelu:
      return x * (T(0.5) * (T(1) + erf(x * T(kSqrtHalf))));
    case Activation::gelu_tanh:
      return x * (T(0.5) * (T(1) + tanh(T(kSqrt2OverPi) * fma(T(kGeluCubic) * x, x * x, x))));
    case Activation::relu:
      return x > T(0) || x != x ? x : T(0);
    case Activation::tanh:
      return tanh(x);
    default:
      return x;
  }
}

// For the activations of the feed-forward.
template <class T>
__device__ __forceinline__ ValueAndSlope<T> activate_with_slope(Activation activation, T x) {
  switch (activation) {
    case Activation::gelu: {
      const T cdf = T(0.5) * (T(1) + erf(x * T(kSqrtHalf)));
      const T pdf = T(kInvSqrt2Pi) * exp(x * x * T(-0.5));
      return {x * cdf, fma(x, pdf, cdf)};
    }
    case Activation::gelu_tanh: {
      const T square = x * x;
      const T t = tanh(T(kSqrt2OverPi) * fma(T(kGeluCubic) * x, square, x));
      const T cdf = T(0.5) * (T(1) + t);
      const T inner = T(kSqrt2OverPi) * fma(T(3 * kGeluCubic), square, T(1));
      return {x * cdf, fma(T(0.5) * x * (T(1) - t * t), inner, cdf)};
    }
    default:
      return {activate(Activation::relu, x), x > T(0) ? T(1) : T(0)};
  }
}

}  // namespace
}  // namespace xlmr::XLMR_CUDA_NS
