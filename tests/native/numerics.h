// Reference arithmetic that carries its own error bound, so that tolerances are derived from the
// formula being tested and from nothing else (running error analysis: Higham, "Accuracy and
// Stability of Numerical Algorithms", 2nd ed., section 3.3).
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "half.h"
#include "ops.h"

namespace test {

// float32 kernels and those of 16 bits are held against double, float64 kernels against long
// double.
template <class T>
struct Wider {
  using type = double;
};
template <>
struct Wider<double> {
  using type = long double;
};
template <class T>
using Wide = typename Wider<T>::type;

// exp, erf and tanh of the kernels may be off by this many units in the last place; a unit in
// the last place is at most two unit roundoffs.
constexpr double kFunctionUlps = 2.5;
constexpr double kFunctionError = 2 * kFunctionUlps;

// v: the exact value. e: a bound, to first order, on the error of any reasonable evaluation in the
// arithmetic of the tested type, in units of its roundoff u = eps / 2. Kernels of 16 bits compute
// in float32 and owe float32's bound, plus one rounding to 16 bits where a number is stored:
// `stored` says where that happens on the way, and the comparison adds the last. torch's own path
// rounds at least as often.
template <class R>
struct Num {
  R v = 0;
  R e = 0;
};

template <class R>
Num<R> exact(R value) {
  return {value, 0};
}
// A real number that was rounded to the tested type once.
template <class R>
Num<R> rounded(R value) {
  return {value, std::fabs(value)};
}
// Rounded to the tested type on the way, where that is not the type of its arithmetic. Below the
// normal range of 16 bits the rounding is one of absolute size.
template <class T, class R>
Num<R> stored(Num<R> a) {
  if constexpr (kIs16Bits<T>) {
    constexpr R unit = std::numeric_limits<float>::epsilon() / 2;
    const R size = std::fabs(a.v) + a.e * unit;
    const R step =
        std::numeric_limits<T>::epsilon() * size + R(std::numeric_limits<T>::denorm_min());
    a.e += step / 2 / unit;
  }
  return a;
}
// A real number that came rounded to the tested type.
template <class T, class R>
Num<R> given(R value) {
  return kIs16Bits<T> ? stored<T>(exact(value)) : rounded(value);
}
template <class R>
Num<R> operator+(Num<R> a, Num<R> b) {
  const R v = a.v + b.v;
  return {v, a.e + b.e + std::fabs(v)};
}
template <class R>
Num<R> operator-(Num<R> a, Num<R> b) {
  const R v = a.v - b.v;
  return {v, a.e + b.e + std::fabs(v)};
}
template <class R>
Num<R> operator*(Num<R> a, Num<R> b) {
  const R v = a.v * b.v;
  return {v, std::fabs(a.v) * b.e + std::fabs(b.v) * a.e + std::fabs(v)};
}
// Twice the rounding of a quotient, for those who multiply by the reciprocal.
template <class R>
Num<R> operator/(Num<R> a, Num<R> b) {
  const R v = a.v / b.v;
  return {v, (a.e + std::fabs(v) * b.e) / std::fabs(b.v) + 2 * std::fabs(v)};
}

template <class R>
Num<R> exp(Num<R> x) {
  const R v = std::exp(x.v);
  return {v, v * (x.e + R(kFunctionError))};
}
template <class R>
Num<R> tanh(Num<R> x) {
  const R v = std::tanh(x.v);
  return {v, (1 - v * v) * x.e + std::fabs(v) * R(kFunctionError)};
}
template <class R>
Num<R> erf(Num<R> x) {
  const R v = std::erf(x.v);
  const R slope = R(1.1283791670955125739) * std::exp(-x.v * x.v);
  return {v, slope * x.e + std::fabs(v) * R(kFunctionError)};
}

// A sum in any order, fused or not: every term passes through at most count + 2 roundings.
template <class R>
class Sum {
 public:
  void add(Num<R> a) {
    value_ += a.v;
    magnitude_ += std::fabs(a.v);
    inherited_ += a.e;
    ++count_;
  }
  void add_product(Num<R> a, Num<R> b) {
    const R term = a.v * b.v;
    value_ += term;
    magnitude_ += std::fabs(term);
    inherited_ += std::fabs(a.v) * b.e + std::fabs(b.v) * a.e;
    ++count_;
  }
  // The same with factors that are exact.
  void add_product(R a, R b) {
    const R term = a * b;
    value_ += term;
    magnitude_ += std::fabs(term);
    ++count_;
  }
  Num<R> value() const {
    return {value_, count_ == 0 ? R(0) : inherited_ + R(count_ + 2) * magnitude_};
  }

 private:
  R value_ = 0;
  R magnitude_ = 0;
  R inherited_ = 0;
  int64_t count_ = 0;
};

template <class R>
Num<R> activate(xlmr::Activation activation, Num<R> x) {
  const Num<R> half = exact(R(0.5));
  const Num<R> one = exact(R(1));
  switch (activation) {
    case xlmr::Activation::tanh:
      return tanh(x);
    case xlmr::Activation::relu:
      return {x.v > 0 ? x.v : R(0), x.e};
    case xlmr::Activation::gelu:
      return half * x * (one + erf(x * rounded(R(0.70710678118654752440L))));
    case xlmr::Activation::gelu_tanh: {
      const Num<R> cubic = exact(R(1)) + rounded(R(0.044715L)) * x * x;
      return half * x * (one + tanh(rounded(R(0.79788456080286535588L)) * x * cubic));
    }
    case xlmr::Activation::none:
      break;
  }
  return x;
}

template <class R>
Num<R> activation_slope(xlmr::Activation activation, Num<R> x) {
  const Num<R> half = exact(R(0.5));
  const Num<R> one = exact(R(1));
  switch (activation) {
    case xlmr::Activation::relu:
      return exact(R(x.v > 0 ? 1 : 0));
    case xlmr::Activation::gelu: {
      const Num<R> cdf = half * (one + erf(x * rounded(R(0.70710678118654752440L))));
      const Num<R> pdf = rounded(R(0.39894228040143267794L)) * exp(exact(R(-0.5)) * x * x);
      return cdf + x * pdf;
    }
    case xlmr::Activation::gelu_tanh: {
      const Num<R> c = rounded(R(0.79788456080286535588L));
      const Num<R> square = rounded(R(0.044715L)) * x * x;
      const Num<R> t = tanh(c * x * (one + square));
      const Num<R> inner = c * (one + exact(R(3)) * square);
      return half * (one + t) + half * x * (one - t * t) * inner;
    }
    default:
      return one;
  }
}

// The largest error of `got`, in parts of the tolerance; above 1 is wrong. `where` is its index.
template <class T>
double worst_error(const std::vector<T>& got, const std::vector<Num<Wide<T>>>& want,
                   int64_t* where) {
  using R = Wide<T>;
  constexpr R unit = std::numeric_limits<Arithmetic<T>>::epsilon() / 2;
  // Results below the normal range lose their relative precision, or flush to zero.
  constexpr R tiny = 16 * std::numeric_limits<Arithmetic<T>>::min();
  double worst = 0;
  *where = -1;
  for (size_t i = 0; i < want.size(); ++i) {
    const R tolerance = R(1.01) * stored<T>(want[i]).e * unit + tiny;
    double ratio = double(std::fabs(R(got[i]) - want[i].v) / tolerance);
    if (!(ratio == ratio)) ratio = std::numeric_limits<double>::infinity();
    if (*where < 0 || ratio > worst) {
      worst = ratio;
      *where = int64_t(i);
    }
  }
  return worst;
}

}  // namespace test
