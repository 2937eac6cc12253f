// What the attention ops are asked and what they owe: plain attention in reference arithmetic.
#pragma once

#include <algorithm>
#include <limits>
#include <numeric>

#include "harness.h"
#include "philox.h"

namespace test {
namespace attention {

constexpr int64_t kSeed = -7'046'029'254'386'353'131;  // negative: both key words have high bits

template <class T>
struct Problem {
  std::vector<int32_t> lengths;
  int64_t heads, size;
  double scale;
  double p = 0;  // dropout
  int64_t site = 3;
  bool need_lse = true;
  bool joined = false;  // q, k and v are column blocks of one buffer, as the linear op lays them
  int64_t gap = 0;
  bool first_only = false;  // query and dout have a row for every sequence, and stand apart
  std::vector<T> query, key, value, dout;

  int64_t batch() const { return int64_t(lengths.size()); }
  int64_t rows() const { return std::accumulate(lengths.begin(), lengths.end(), int64_t(0)); }
  int64_t query_rows() const { return first_only ? batch() : rows(); }
  int64_t width() const { return heads * size; }
  std::vector<int32_t> offsets() const {
    std::vector<int32_t> out{0};
    for (int32_t length : lengths) out.push_back(out.back() + length);
    return out;
  }
  std::string sizes() const {
    std::string list;
    for (int32_t length : lengths) list += text(" %d", int(length));
    return text("lengths=[%s ] heads=%lld size=%lld p=%g joined=%d gap=%lld lse=%d first_only=%d",
                list.c_str(), (long long)heads, (long long)size, p, int(joined), (long long)gap,
                int(need_lse), int(first_only));
  }
};

template <class T>
Problem<T> make(Random& random, std::vector<int32_t> lengths, int64_t heads, int64_t size,
                double p) {
  Problem<T> out;
  out.lengths = std::move(lengths);
  out.heads = heads;
  out.size = size;
  out.scale = 1 / std::sqrt(double(size));
  out.p = p;
  out.need_lse = random.chance(0.7);
  out.joined = random.chance(0.5);
  out.gap = random.chance(0.5) ? random.between(1, 19) : 0;
  const int64_t count = out.rows() * out.width();
  out.query = random.values<T>(count);
  out.key = random.values<T>(count);
  out.value = random.values<T>(count);
  out.dout = random.values<T>(count);
  return out;
}

// The problem in which the first tokens ask alone. What belongs to empty sequences is NaN: nobody
// may read it.
template <class T>
Problem<T> first_tokens(const Problem<T>& p) {
  Problem<T> out = p;
  out.first_only = true;
  const auto gather = [&](const std::vector<T>& from) {
    std::vector<T> to(size_t(p.batch() * p.width()), std::numeric_limits<T>::quiet_NaN());
    const std::vector<int32_t> offsets = p.offsets();
    for (int64_t b = 0; b < p.batch(); ++b) {
      if (p.lengths[size_t(b)] == 0) continue;
      std::copy_n(from.begin() + offsets[size_t(b)] * p.width(), p.width(),
                  to.begin() + b * p.width());
    }
    return to;
  };
  out.query = gather(p.query);
  out.dout = gather(p.dout);
  return out;
}

template <class R>
struct Reference {
  std::vector<Num<R>> out, lse, dquery, dkey, dvalue;
};

// Plain attention: the whole matrix of scores, then softmax, then the product; the gradients from
// the softmax's Jacobian.
template <class T>
Reference<Wide<T>> reference(const Problem<T>& p, bool gradients) {
  using R = Wide<T>;
  const int64_t rows = p.query_rows(), width = p.width();
  Reference<R> ref;
  ref.out.resize(size_t(rows * width));
  ref.lse.resize(size_t(p.heads * rows));
  if (gradients) {
    ref.dquery.resize(size_t(rows * width));
    ref.dkey.resize(size_t(p.rows() * width));
    ref.dvalue.resize(size_t(p.rows() * width));
  }
  const Num<R> scale = rounded(R(p.scale));
  const Num<R> keep = rounded(R(1 / (1 - p.p)));
  int64_t first = 0, sequence = 0;
  for (int32_t length : p.lengths) {
    // Rows of the query: `asking` of them from `asked` on.
    const int64_t asking = p.first_only ? std::min(length, 1) : length;
    const int64_t asked = p.first_only ? sequence : first;
    // Running maxima move the pivot at most once for each block of keys; 16 keys are the smallest
    // block that would make sense.
    const R rescales = R(length / 16 + 2);
    for (int64_t head = 0; head < p.heads; ++head) {
      const auto index = [&](int64_t row, int64_t d) {
        return size_t(row * width + head * p.size + d);
      };
      const auto query = [&](int64_t i, int64_t d) { return R(p.query[index(asked + i, d)]); };
      const auto dout = [&](int64_t i, int64_t d) { return R(p.dout[index(asked + i, d)]); };
      const auto key = [&](int64_t j, int64_t d) { return R(p.key[index(first + j, d)]); };
      const auto value = [&](int64_t j, int64_t d) { return R(p.value[index(first + j, d)]); };
      std::vector<Num<R>> probability(size_t(asking) * size_t(length));  // after dropout
      std::vector<Num<R>> softmax(probability.size());                   // before
      for (int64_t i = 0; i < asking; ++i) {
        std::vector<Num<R>> score;
        R top = 0, peak = -std::numeric_limits<R>::infinity(), top_error = 0;
        for (int64_t j = 0; j < length; ++j) {
          Sum<R> sum;
          for (int64_t d = 0; d < p.size; ++d) sum.add_product(query(i, d), key(j, d));
          score.push_back(sum.value() * scale);
          top = std::max(top, std::fabs(score.back().v));
          peak = std::max(peak, score.back().v);
          top_error = std::max(top_error, score.back().e);
        }
        Sum<R> total;
        std::vector<Num<R>> weight;
        for (int64_t j = 0; j < length; ++j) {
          // exp(score - pivot): the difference, a change of base, and the pivot's moves.
          const Num<R> s = score[size_t(j)];
          const R argument_error = s.e + 2 * top_error + 3 * (std::fabs(s.v) + 3 * top);
          Num<R> w{s.v - peak, argument_error + (R(kFunctionError) + 1) * rescales};
          weight.push_back(exp(w));
          total.add(weight.back());
        }
        const Num<R> sum = total.value();
        ref.lse[size_t(head * rows + asked + i)] = {
            peak + std::log(sum.v), top_error + 2 * top + sum.e / sum.v +
                                        R(kFunctionError) * std::fabs(std::log(sum.v)) +
                                        std::fabs(peak + std::log(sum.v)) + 3 * top};
        for (int64_t j = 0; j < length; ++j) {
          const size_t ij = size_t(i * length + j);
          softmax[ij] = weight[size_t(j)] / sum;
          probability[ij] = stored<T>(softmax[ij]);
          if (p.p > 0) {
            probability[ij] = keeps(p.p, kSeed, p.site, head, first + i, j) ? probability[ij] * keep
                                                                            : exact(R(0));
          }
        }
        for (int64_t d = 0; d < p.size; ++d) {
          Sum<R> dot;
          for (int64_t j = 0; j < length; ++j) {
            dot.add_product(probability[size_t(i * length + j)], exact(value(j, d)));
          }
          ref.out[index(asked + i, d)] = dot.value();
        }
      }
      if (!gradients) continue;
      std::vector<Num<R>> dscore(probability.size());
      for (int64_t i = 0; i < asking; ++i) {
        const R lse_size = std::fabs(ref.lse[size_t(head * rows + asked + i)].v);
        std::vector<Num<R>> dprobability;
        // rowsum(dO * O) and rowsum(P * dP) are the same number with different errors.
        Sum<R> delta, same_delta;
        for (int64_t d = 0; d < p.size; ++d) {
          delta.add_product(exact(dout(i, d)), given<T>(ref.out[index(asked + i, d)].v));
        }
        for (int64_t j = 0; j < length; ++j) {
          const size_t ij = size_t(i * length + j);
          Sum<R> dot;
          Sum<R> score;
          for (int64_t d = 0; d < p.size; ++d) {
            dot.add_product(dout(i, d), value(j, d));
            score.add_product(query(i, d), key(j, d));
          }
          // The backward computes the probability again, from the rounded lse.
          const Num<R> s = score.value() * scale;
          const R v = softmax[ij].v;
          softmax[ij].e = v * (s.e + 4 * (std::fabs(s.v) + lse_size) + R(kFunctionError));
          if (p.p == 0) {
            probability[ij] = stored<T>(softmax[ij]);
          } else if (probability[ij].v != 0) {
            probability[ij] = stored<T>(softmax[ij]) * keep;
          }
          Num<R> dp = dot.value();
          if (p.p > 0) {
            const bool kept = keeps(p.p, kSeed, p.site, head, first + i, j);
            dp = kept ? dp * keep : exact(R(0));
          }
          dprobability.push_back(dp);
          same_delta.add_product(softmax[ij], dp);
        }
        const Num<R> either{delta.value().v, std::max(delta.value().e, same_delta.value().e)};
        for (int64_t j = 0; j < length; ++j) {
          const size_t ij = size_t(i * length + j);
          dscore[ij] = stored<T>(softmax[ij] * (dprobability[size_t(j)] - either)) * scale;
        }
      }
      for (int64_t d = 0; d < p.size; ++d) {
        for (int64_t i = 0; i < asking; ++i) {
          Sum<R> dq;
          for (int64_t j = 0; j < length; ++j) {
            dq.add_product(dscore[size_t(i * length + j)], exact(key(j, d)));
          }
          ref.dquery[index(asked + i, d)] = dq.value();
        }
        for (int64_t j = 0; j < length; ++j) {
          Sum<R> dk, dv;
          for (int64_t i = 0; i < asking; ++i) {
            dk.add_product(dscore[size_t(i * length + j)], exact(query(i, d)));
            dv.add_product(probability[size_t(i * length + j)], exact(dout(i, d)));
          }
          ref.dkey[index(first + j, d)] = dk.value();
          ref.dvalue[index(first + j, d)] = dv.value();
        }
      }
    }
    first += length;
    ++sequence;
  }
  return ref;
}

}  // namespace attention
}  // namespace test
