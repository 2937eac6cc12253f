// exp, erf and tanh on Vec<T>, and the activations. float32: polynomials fitted for this project
// (weighted minimax, errors stated below against exact arithmetic), about 2 ulp in all. float64:
// the C library lane by lane; it serves gradient checks and need not be fast.
#pragma once

#include "core/gelu.h"
#include "cpu/isa.h"
#include "ops.h"

namespace xlmr::XLMR_ISA {
namespace {

template <int kTerms, class T>
XLMR_INLINE Vec<T> polynomial(Vec<T> x, const T (&c)[kTerms]) {
  Vec<T> y(c[kTerms - 1]);
#pragma GCC unroll 16
  for (int i = kTerms - 2; i >= 0; --i) y = fma(y, x, Vec<T>(c[i]));
  return y;
}

// e^x = 2^n e^r with n = round(x / ln 2) and |r| <= ln 2 / 2; returns e^r and n. The polynomial's
// relative error is 3.4e-9.
XLMR_INLINE Vec<float> exp_reduced(Vec<float> x, Vec<float>& n) {
  const float q[5] = {0x1.000000p-1f, 0x1.555486p-3f, 0x1.555454p-5f, 0x1.124148p-7f,
                      0x1.6dbc64p-10f};
  n = round(x * Vec<float>(1.44269504f));
  // ln 2 in two parts; the first has 15 trailing zero bits, so n * high is exact.
  Vec<float> r = fma(n, Vec<float>(-0x1.62e400p-1f), x);
  r = fma(n, Vec<float>(-0x1.7f7d1cp-20f), r);
  return fma(r * r, polynomial(r, q), r) + Vec<float>(1.0f);
}

// Any x: results below the smallest normal number keep their bits (two factors); NaN stays NaN.
XLMR_INLINE Vec<float> exp(Vec<float> x) {
  Vec<float> n;
  const Vec<float> e = exp_reduced(min(Vec<float>(89.0f), max(Vec<float>(-104.0f), x)), n);
  const Vec<float> half = round(n * Vec<float>(0.5f));
  return e * pow2(half) * pow2(n - half);
}

// |x| <= 87, so that the result is a normal number; NaN stays NaN.
XLMR_INLINE Vec<float> exp_bounded(Vec<float> x) {
  Vec<float> n;
  const Vec<float> e = exp_reduced(x, n);
  return e * pow2(n);
}

// The exponential of a softmax, x at most 87: 0 below -87, where nothing is left of a weight beside
// the largest; NaN stays NaN.
XLMR_INLINE Vec<float> exp_weight(Vec<float> x) {
  return select(x < Vec<float>(-87.0f), Vec<float>::zero(), exp_bounded(x));
}

// |x| < 1: x + x P(x^2), relative error 1.3e-9. Above: 1 - exp(-Q(|x|)), absolute error 2.2e-11;
// at 4 it is 1 in float32.
XLMR_INLINE Vec<float> erf(Vec<float> x) {
  const float small[7] = {0.12837916573f, -0.37612625824f, 0.11283585146f,  -0.02685381181f,
                          0.00518832744f, -0.00080101915f, 0.0000785385432f};
  const float large[8] = {-0.00018847020f, 1.12958032283f, 0.63321637411f,   0.10842212431f,
                          -0.02521035551f, 0.00420529063f, -0.000441473840f, 0.0000216977145f};
  const Vec<float> a = abs(x);
  const Vec<float> near = fma(x, polynomial(x * x, small), x);
  const Vec<float> clamped = min(Vec<float>(4.0f), a);
  const Vec<float> far =
      Vec<float>(1.0f) - exp_bounded(Vec<float>::zero() - polynomial(clamped, large));
  return select(a < Vec<float>(1.0f), near, copysign(far, x));
}

// |x| < 0.625: x + x^3 P(x^2), relative error 4.2e-9. Above: 1 - 2 / (e^(2|x|) + 1).
XLMR_INLINE Vec<float> tanh(Vec<float> x) {
  const float small[5] = {-0.33333283924f, 0.13331491248f, -0.05374349526f, 0.02065057899f,
                          -0.00571703655f};
  const Vec<float> a = abs(x), s = x * x;
  const Vec<float> near = fma(x * s, polynomial(s, small), x);
  const Vec<float> far = Vec<float>(1.0f) - Vec<float>(2.0f) / (exp(a + a) + Vec<float>(1.0f));
  return select(a < Vec<float>(0.625f), near, copysign(far, x));
}

template <double (*kFunction)(double)>
XLMR_INLINE Vec<double> by_lane(Vec<double> x) {
  double lanes[Vec<double>::size];
  x.store(lanes);
  for (double& lane : lanes) lane = kFunction(lane);
  return Vec<double>::load(lanes);
}
XLMR_INLINE Vec<double> exp(Vec<double> x) { return by_lane<::exp>(x); }
XLMR_INLINE Vec<double> exp_weight(Vec<double> x) { return exp(x); }
XLMR_INLINE Vec<double> erf(Vec<double> x) { return by_lane<::erf>(x); }
XLMR_INLINE Vec<double> tanh(Vec<double> x) { return by_lane<::tanh>(x); }

template <class T>
struct ValueAndSlope {
  Vec<T> value, slope;
};

template <Activation kActivation, class T>
XLMR_INLINE Vec<T> activate(Vec<T> x) {
  const Vec<T> half(T(0.5)), one(T(1));
  if constexpr (kActivation == Activation::gelu) {
    return x * (half * (one + erf(x * Vec<T>(T(kSqrtHalf)))));
  } else if constexpr (kActivation == Activation::gelu_tanh) {
    const Vec<T> u = Vec<T>(T(kSqrt2OverPi)) * fma(Vec<T>(T(kGeluCubic)) * x, x * x, x);
    return x * (half * (one + tanh(u)));
  } else if constexpr (kActivation == Activation::relu) {
    return max(Vec<T>::zero(), x);
  } else if constexpr (kActivation == Activation::tanh) {
    return tanh(x);
  } else {
    return x;
  }
}

// act(x) and act'(x), sharing what they have in common.
template <Activation kActivation, class T>
XLMR_INLINE ValueAndSlope<T> activate_with_slope(Vec<T> x) {
  const Vec<T> half(T(0.5)), one(T(1));
  if constexpr (kActivation == Activation::gelu) {
    const Vec<T> cdf = half * (one + erf(x * Vec<T>(T(kSqrtHalf))));
    const Vec<T> pdf = Vec<T>(T(kInvSqrt2Pi)) * exp(x * x * Vec<T>(T(-0.5)));
    return {x * cdf, fma(x, pdf, cdf)};
  } else if constexpr (kActivation == Activation::gelu_tanh) {
    const Vec<T> s = x * x;
    const Vec<T> u = Vec<T>(T(kSqrt2OverPi)) * fma(Vec<T>(T(kGeluCubic)) * x, s, x);
    const Vec<T> t = tanh(u), cdf = half * (one + t);
    const Vec<T> du = Vec<T>(T(kSqrt2OverPi)) * fma(Vec<T>(T(3 * kGeluCubic)), s, one);
    return {x * cdf, fma(half * x * (one - t * t), du, cdf)};
  } else {
    static_assert(kActivation == Activation::relu, "no slope from the input for this one");
    const Vec<T> zero = Vec<T>::zero();
    return {max(zero, x), select(zero < x, one, zero)};
  }
}

template <Activation kActivation>
struct ActivationTag {
  static constexpr Activation value = kActivation;
};

// Calls f(ActivationTag<activation>{}) for a feed-forward activation known only at run time.
template <class F>
XLMR_INLINE void with_feed_forward_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::gelu_tanh:
      return f(ActivationTag<Activation::gelu_tanh>{});
    case Activation::relu:
      return f(ActivationTag<Activation::relu>{});
    default:
      return f(ActivationTag<Activation::gelu>{});
  }
}

}  // namespace
}  // namespace xlmr::XLMR_ISA
