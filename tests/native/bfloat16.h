// What products of table.bf16 owe: operands rounded to bfloat16, everything else float32.
#pragma once

#include <initializer_list>
#include <utility>
#include <vector>

#include "harness.h"

namespace test {

// Whose products are to be tested: the table's own, or those of table.bf16, whose operands are
// rounded where the table has units for them.
struct Products {
  bool bf16 = false;
  bool rounds = false;
};
// Without units the bfloat16 products of float32 weights are the float32 ones.
inline Products bf16_products(TableRef table) {
  return {true, table.bf16.linear_backward.run != table.linear_backward.run};
}

// To nearest, ties to even; what is below the normal range becomes zero.
inline double as_bf16(double x) {
  if (std::fabs(x) < double(std::numeric_limits<float>::min())) return std::copysign(0.0, x);
  return double(Bfloat16(x));
}

template <class T>
std::vector<T> rounded_to_bf16(std::vector<T> values) {
  for (T& value : values) value = T(as_bf16(double(value)));
  return values;
}
// Every third number in the middle between two of bfloat16.
template <class T>
std::vector<T> with_ties(std::vector<T> values) {
  if constexpr (std::is_same_v<T, float>) {
    for (size_t i = 0; i < values.size(); i += 3) {
      uint32_t bits;
      std::memcpy(&bits, &values[i], sizeof bits);
      bits = (bits & 0xffff0000u) | 0x8000u;
      std::memcpy(&values[i], &bits, sizeof bits);
    }
  }
  return values;
}
// As operands may come: numbers of bfloat16, or all kinds.
template <class T>
void prepare(bool rounded, std::initializer_list<std::vector<T>*> operands) {
  for (std::vector<T>* values : operands) {
    *values = rounded ? rounded_to_bf16(std::move(*values)) : with_ties(std::move(*values));
  }
}
// What the products read where `values` are given.
template <class T>
std::vector<T> operands(const std::vector<T>& values, Products products) {
  return products.rounds ? rounded_to_bf16(values) : values;
}

// A number that is rounded to bfloat16 on its way into a product. Its own error moves the result
// only where it can cross the middle between two neighbours, and then by the step between them.
template <class R>
Num<R> operand(Num<R> a, Products products) {
  if (!products.rounds) return a;
  constexpr R unit = std::numeric_limits<float>::epsilon() / 2;
  const R error = R(1.01) * a.e * unit;
  const R value = R(as_bf16(double(a.v)));
  const R low = R(as_bf16(double(a.v - error))), high = R(as_bf16(double(a.v + error)));
  return {value, std::max(high - value, value - low) / unit};
}

}  // namespace test
