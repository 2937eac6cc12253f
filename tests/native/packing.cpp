// packed_bytes and pack_weight. That a packed weight serves as the plain one does is tested where
// it is used: linear.cpp, feed_forward.cpp, encoder.cpp.
#include "packed.h"

namespace test {
namespace {

// Room for the weight, little more, and -1 only where that does not fit into int64.
template <class T>
void check_bytes(Line& line, TableRef table) {
  std::vector<int64_t> sizes{1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 100};
  for (int exponent = 8; exponent < 63; ++exponent) {
    const int64_t power = int64_t(1) << exponent;
    for (const int64_t size : {power - 1, power, power + 1}) sizes.push_back(size);
  }
  sizes.push_back(std::numeric_limits<int64_t>::max());
  line.begin("packed_bytes");
  for (const int64_t out : sizes) {
    for (const int64_t in : sizes) {
      const __int128 plain = __int128(out) * in;
      const __int128 padded = (__int128(out) + 63) * in;
      const int64_t bytes = table.packed_bytes(dtype_of<T>(), out, in);
      const int64_t elements = bytes / int64_t(sizeof(T));
      const bool right = bytes == -1
                             ? padded > std::numeric_limits<int64_t>::max() / int64_t(sizeof(T))
                             : plain <= elements && elements <= padded;
      if (!CHECK(right, "[%lld, %lld] is packed into %lld bytes", (long long)out, (long long)in,
                 (long long)bytes)) {
        return;
      }
    }
  }
}

template <class T>
void run(TableRef table) {
  if (!selected("packing")) return;
  Line line(table, dtype_name<T>(), "packing");
  check_bytes<T>(line, table);
  Random random(17);
  const std::vector<int64_t> sizes = {1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 65, 97};
  for (size_t i = 0; i < sizes.size(); i += options().quick ? 3 : 1) {
    for (const int64_t in : sizes) {
      const int64_t out = sizes[i];
      line.begin(text("out=%lld in=%lld", (long long)out, (long long)in));
      const std::vector<T> weight = random.values<T>(out * in);
      run_on_threads(line, [&](int32_t threads) {
        return std::vector<std::vector<T>>{Packed<T>(table, weight, out, in, threads).values()};
      });
    }
  }
}

}  // namespace

void test_packing(TableRef table) {
  for_types(table, [&](auto element) { run<decltype(element)>(table); });
}

}  // namespace test
