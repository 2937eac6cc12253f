// A weight packed by a table, under guard.
#pragma once

#include "harness.h"

namespace test {

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

}  // namespace test
