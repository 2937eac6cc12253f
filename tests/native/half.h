// bfloat16 and float16 as elements of the tests' arrays: numbers that a float can hold, rounded
// where they are made. Arithmetic on them is that of float.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace test {

// `kFraction` bits behind the point, `kExponent` of the exponent; IEEE 754's layout.
template <int kExponent, int kFraction>
class Half {
 public:
  Half() = default;
  Half(double x) : bits_(encode(x)) {}
  operator float() const { return float(decode(bits_)); }

  static Half of_bits(uint16_t bits) {
    Half half;
    half.bits_ = bits;
    return half;
  }

 private:
  static constexpr int kBias = (1 << (kExponent - 1)) - 1;
  static constexpr uint16_t kInfinity = uint16_t(((1 << kExponent) - 1) << kFraction);

  static double decode(uint16_t bits) {
    const double sign = bits >> 15 ? -1 : 1;
    const int exponent = bits >> kFraction & ((1 << kExponent) - 1);
    const int fraction = bits & ((1 << kFraction) - 1);
    if (exponent == (1 << kExponent) - 1) {
      return fraction != 0 ? std::numeric_limits<double>::quiet_NaN()
                           : sign * std::numeric_limits<double>::infinity();
    }
    const int hidden = exponent == 0 ? 0 : 1 << kFraction;
    return sign * std::ldexp(hidden + fraction, std::max(exponent, 1) - kBias - kFraction);
  }

  // To nearest, ties to even.
  static uint16_t encode(double x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    if (x == 0) return sign;
    if (std::isnan(x)) return 0x7fff;
    if (std::isinf(x)) return uint16_t(sign | kInfinity);
    int exponent = 0;
    std::frexp(x, &exponent);  // |x| = m 2^exponent with 1/2 <= m < 1
    const int lowest = 1 - kBias - kFraction;
    const int place = std::max(exponent - 1 - kFraction, lowest);
    const double steps = std::nearbyint(std::ldexp(std::fabs(x), -place));
    // Numbers of one sign are in the order of their bits; a carry runs into the exponent.
    const double bits = steps + std::ldexp(double(place - lowest), kFraction);
    return uint16_t(sign | (bits >= kInfinity ? kInfinity : uint16_t(bits)));
  }

  uint16_t bits_;
};
using Bfloat16 = Half<8, 7>;
using Float16 = Half<5, 10>;

template <class T>
constexpr bool kIs16Bits = false;
template <>
inline constexpr bool kIs16Bits<Bfloat16> = true;
template <>
inline constexpr bool kIs16Bits<Float16> = true;

// The type that kernels of T compute in, and its statistics have.
template <class T>
using Arithmetic = std::conditional_t<kIs16Bits<T>, float, T>;

}  // namespace test

template <int kExponent, int kFraction>
class std::numeric_limits<test::Half<kExponent, kFraction>> {
  using T = test::Half<kExponent, kFraction>;
  static constexpr int kBias = (1 << (kExponent - 1)) - 1;

 public:
  static constexpr double epsilon() { return 1.0 / (1 << kFraction); }
  static T min() { return T(std::ldexp(1.0, 1 - kBias)); }
  static T denorm_min() { return T::of_bits(1); }
  static T max() { return T::of_bits(uint16_t((((1 << kExponent) - 1) << kFraction) - 1)); }
  static T quiet_NaN() { return T(std::numeric_limits<double>::quiet_NaN()); }
  static T infinity() { return T(std::numeric_limits<double>::infinity()); }
};
