// Weights packed by a table, and those of 8 and of 16 bits, under guard.
#pragma once

#include "core/bf16_layout.h"
#include "core/int8_layout.h"
#include "harness.h"

namespace test {

// `sizes`, and sizes about every power of two: products of two of them overflow.
inline std::vector<int64_t> sizes_up_to_overflow(std::vector<int64_t> sizes) {
  for (int exponent = 8; exponent < 63; ++exponent) {
    const int64_t power = int64_t(1) << exponent;
    for (const int64_t size : {power - 1, power, power + 1}) sizes.push_back(size);
  }
  sizes.push_back(std::numeric_limits<int64_t>::max());
  return sizes;
}

template <class T>
class Packed {
 public:
  Packed(TableRef table, const std::vector<T>& weight, int64_t out, int64_t in, int32_t threads)
      : packed_(1, table.packed_bytes(dtype_of<T>(), out, in) / int64_t(sizeof(T))) {
    const Guarded<T> source(weight, out, in);
    xlmr::PackWeight args{dtype_of<T>(), out, in, source.data(), packed_.data()};
    run_op(table.pack_weight, args, threads);
    CHECK(source.intact(), "packing changed the weight");
    CHECK(packed_.intact(), "packing wrote outside of packed_bytes");
    snapshot_ = packed_.values();
  }

  const T* data() const { return packed_.data(); }
  const std::vector<T>& values() const { return snapshot_; }
  // Whether nothing was written to it since.
  bool intact() const {
    return packed_.intact() &&
           std::memcmp(packed_.data(), snapshot_.data(), snapshot_.size() * sizeof(T)) == 0;
  }

 private:
  Guarded<T> packed_;
  std::vector<T> snapshot_;
};

// A weight [out, in] of 8 bits, its values q * scale.
struct Int8Values {
  int64_t out, in;
  std::vector<int8_t> q;
  std::vector<float> scale;
};

// Each row's largest value becomes 127.
inline Int8Values quantized(const std::vector<float>& weight, int64_t out, int64_t in) {
  Int8Values values{out, in, {}, {}};
  for (int64_t o = 0; o < out; ++o) {
    const float* row = weight.data() + o * in;
    float most = 0;
    for (int64_t k = 0; k < in; ++k) most = std::fmax(most, std::fabs(row[k]));
    values.scale.push_back(most / 127);
    for (int64_t k = 0; k < in; ++k) {
      values.q.push_back(int8_t(most == 0 ? 0 : std::lrint(row[k] / (most / 127))));
    }
  }
  return values;
}

class PackedInt8 {
 public:
  explicit PackedInt8(const Int8Values& values)
      : packed_(1, xlmr::packed_int8_bytes(values.out, values.in) / int64_t(sizeof(float))) {
    const Guarded<int8_t> q(values.q, values.out, values.in);
    const Guarded<float> scale(values.scale, 1, values.out);
    xlmr::pack_int8_weight(values.out, values.in, q.data(), scale.data(), packed_.data());
    CHECK(packed_.intact(), "packing wrote outside of packed_int8_bytes");
    snapshot_ = packed_.values();
  }
  const void* data() const { return packed_.data(); }
  const std::vector<float>& values() const { return snapshot_; }
  bool intact() const {
    return packed_.intact() &&
           std::memcmp(packed_.data(), snapshot_.data(), snapshot_.size() * sizeof(float)) == 0;
  }

 private:
  Guarded<float> packed_;  // aligned to its floats only
  std::vector<float> snapshot_;
};

class PackedBf16 {
 public:
  PackedBf16(const std::vector<float>& weight, int64_t out, int64_t in)
      : packed_(1, xlmr::packed_bf16_bytes(out, in) / int64_t(sizeof(uint16_t))) {
    const Guarded<float> source(weight, out, in);
    xlmr::pack_bf16_weight(out, in, source.data(), packed_.data());
    CHECK(source.intact(), "packing changed the weight");
    CHECK(packed_.intact(), "packing wrote outside of packed_bf16_bytes");
    snapshot_ = packed_.values();
  }
  const void* data() const { return packed_.data(); }
  const std::vector<uint16_t>& values() const { return snapshot_; }
  bool intact() const {
    return packed_.intact() &&
           std::memcmp(packed_.data(), snapshot_.data(), snapshot_.size() * sizeof(uint16_t)) == 0;
  }

 private:
  Guarded<uint16_t> packed_;
  std::vector<uint16_t> snapshot_;
};

}  // namespace test
