// Arithmetic on sizes that may overflow.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace xlmr {
// Internal linkage on purpose: this header is compiled once per instruction set.
namespace {

template <class A>
XLMR_HD constexpr A min_of(A a, A b) {
  return b < a ? b : a;
}
template <class A>
XLMR_HD constexpr A max_of(A a, A b) {
  return a < b ? b : a;
}
// For a >= 0 and b > 0; results past int64 are its largest value, which no workspace has room for.
XLMR_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }
XLMR_HD constexpr int64_t round_up(int64_t a, int64_t b) {
  return a > INT64_MAX - b ? INT64_MAX : ceil_div(a, b) * b;
}
constexpr int64_t product(int64_t a, int64_t b) {
  int64_t result = 0;
  return __builtin_mul_overflow(a, b, &result) ? INT64_MAX : result;
}

}  // namespace
}  // namespace xlmr
