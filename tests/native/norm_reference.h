// LayerNorm of one row in reference arithmetic; serves layer_norm and embedding.
#pragma once

#include <vector>

#include "numerics.h"

namespace test {

template <class R>
struct RowNorm {
  Num<R> mean, rstd;
  std::vector<Num<R>> normal;  // (s - mean) * rstd
};

// For a two-pass (or equally stable) variance. An error in the mean moves the variance only by its
// square, because the deviations add up to nothing.
template <class R>
RowNorm<R> norm_row(const std::vector<Num<R>>& row, double eps, R unit) {
  RowNorm<R> out;
  const R n = R(row.size());
  Sum<R> sum;
  for (const Num<R>& s : row) sum.add(s);
  out.mean = sum.value() / exact(n);
  Sum<R> squares;
  for (const Num<R>& s : row) {
    const R d = s.v - out.mean.v;
    const Num<R> deviation{d, s.e + std::fabs(d)};
    squares.add_product(deviation, deviation);
  }
  Num<R> variance = squares.value() / exact(n);
  variance.e += out.mean.e * out.mean.e * unit;
  const Num<R> shifted = variance + rounded(R(eps));
  const R v = 1 / std::sqrt(shifted.v);
  out.rstd = {v, v * (shifted.e / (2 * shifted.v) + 3)};
  for (const Num<R>& s : row) out.normal.push_back((s - out.mean) * out.rstd);
  return out;
}

// With g = dy * weight and h = (s - mean) * rstd: rstd (g - mean(g) - h mean(g h)).
template <class R>
std::vector<Num<R>> norm_row_gradient(const std::vector<Num<R>>& g, const std::vector<Num<R>>& h,
                                      Num<R> rstd) {
  const Num<R> n = exact(R(g.size()));
  Sum<R> sum_g, sum_gh;
  for (size_t i = 0; i < g.size(); ++i) {
    sum_g.add(g[i]);
    sum_gh.add_product(g[i], h[i]);
  }
  const Num<R> mean_g = sum_g.value() / n, mean_gh = sum_gh.value() / n;
  std::vector<Num<R>> out;
  for (size_t i = 0; i < g.size(); ++i) out.push_back(rstd * (g[i] - mean_g - h[i] * mean_gh));
  return out;
}

}  // namespace test
