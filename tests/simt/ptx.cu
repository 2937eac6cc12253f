// The functions of simt/ptx.h: a product of matrices through all of them, right and with planted
// bugs; and the conversions of half.h.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "behaviour.h"
#include "planted.h"
#include "simt/ptx.h"

namespace {

enum class Bug {
  none,
  no_wait,
  no_last_commit,
  wait_after_use,
  no_barrier_after_wait,
  no_barrier_before_refill,
  registers_swapped,
  not_transposed,
  unaligned_row,
};

constexpr int rows = 16, columns = 16, depth = 64, tile = 16;
constexpr int stage_halves = 2 * tile * tile;  // a tile of A and one of B

using Product = void (*)(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2], simt::Site);

// C (16 x 16, float32) = A (16 x 64) B (64 x 16), both by rows. Two warps, one for each half of C's
// columns; tiles of 16 along the sum in two buffers, of which one is filled while the other is
// read.
template <Product product>
__global__ void multiply(const uint16_t* a, const uint16_t* b, float* c, Bug bug) {
  auto* shared = static_cast<uint16_t*>(simt::shared_memory());
  const int t = int(threadIdx.x), warp = t / warpSize, lane = t % warpSize;

  const auto fill = [&](int step) {  // 16 bytes a thread: warp 0 of A, warp 1 of B
    uint16_t* stage = shared + step % 2 * stage_halves + warp * tile * tile;
    const int row = lane / 2, column = lane % 2 * 8;
    const uint16_t* from = warp == 0 ? a + row * depth + step * tile + column
                                     : b + (step * tile + row) * columns + column;
    ptx::cp_async_16(stage + row * tile + column, from);
  };

  float sums[4] = {};
  fill(0);
  ptx::cp_async_commit();
  for (int step = 0; step < depth / tile; ++step) {
    const bool last = step + 1 == depth / tile;
    if (!last) fill(step + 1);
    if (!last || bug != Bug::no_last_commit) ptx::cp_async_commit();
    if (bug != Bug::no_wait && bug != Bug::wait_after_use) ptx::cp_async_wait<1>();
    if (bug != Bug::no_barrier_after_wait) __syncthreads();

    const uint16_t* tile_a = shared + step % 2 * stage_halves;
    const uint16_t* tile_b = tile_a + tile * tile;
    uint32_t of_a[4], of_b[2];
    ptx::ldmatrix(of_a, tile_a + lane % 16 * tile + lane / 16 * 8 + (bug == Bug::unaligned_row));
    const uint16_t* row_b = tile_b + lane % 16 * tile + warp * 8;
    if (bug == Bug::not_transposed) {
      ptx::ldmatrix(of_b, row_b);
    } else {
      ptx::ldmatrix_trans(of_b, row_b);
    }
    if (bug == Bug::registers_swapped) {
      const uint32_t kept = of_a[1];
      of_a[1] = of_a[2];
      of_a[2] = kept;
    }
    product(sums, of_a, of_b, simt::Site::here());
    if (bug == Bug::wait_after_use) ptx::cp_async_wait<1>();
    if (bug != Bug::no_barrier_before_refill) __syncthreads();
  }
  float* mine = c + lane / 4 * columns + warp * 8 + lane % 4 * 2;
  mine[0] = sums[0];
  mine[1] = sums[1];
  mine[8 * columns] = sums[2];
  mine[8 * columns + 1] = sums[3];
}

// An integer in [-8, 8]: products and their sums are exact, in bfloat16 and float16 alike.
int element(int matrix, int row, int column) {
  const uint32_t mixed = uint32_t(matrix * 7919 + row * 1009 + column + 1) * 2654435761u;
  return int((mixed >> 16) % 17) - 8;
}

template <Product product>
bool multiplies(uint32_t (*convert)(float), Bug bug) {
  alignas(16) uint16_t a[rows * depth];
  alignas(16) uint16_t b[depth * columns];
  std::vector<float> c(rows * columns, -1);
  for (int i = 0; i < rows * depth; ++i)
    a[i] = uint16_t(convert(float(element(0, i / depth, i % depth))));
  for (int i = 0; i < depth * columns; ++i) {
    b[i] = uint16_t(convert(float(element(1, i / columns, i % columns))));
  }
  const uint16_t* from_a = a;
  const uint16_t* from_b = b;
  float* to = c.data();
  simt::launch("multiply", 1, 64, 2 * stage_halves * sizeof(uint16_t),
               [=] { multiply<product>(from_a, from_b, to, bug); });
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < columns; ++column) {
      int want = 0;
      for (int k = 0; k < depth; ++k) want += element(0, row, k) * element(1, k, column);
      if (c[size_t(row * columns + column)] != float(want)) return false;
    }
  }
  return true;
}

template <Bug bug>
bool planted_in_product(bool planted) {
  return multiplies<ptx::mma_bf16>(simt::float_to_bf16, planted ? bug : Bug::none);
}

// Every number of a format, and what lies between two of them: `next` of them, of equal sign, up to
// `last`, which rounds to infinity.
bool rounds(float (*widen)(uint32_t), uint32_t (*narrow)(float), uint32_t infinity) {
  for (uint32_t low = 0; low + 1 < infinity; ++low) {
    const float a = widen(low), b = widen(low + 1);
    const float middle = float((double(a) + double(b)) / 2);
    const uint32_t even = low + low % 2;
    if (!(a < b) || narrow(a) != low || narrow(-a) != (low | 0x8000u)) return false;
    if (narrow(middle) != even || narrow(-middle) != (even | 0x8000u)) return false;
    if (narrow(std::nextafter(middle, a)) != low) return false;
    if (narrow(std::nextafter(middle, b)) != low + 1) return false;
  }
  return widen(infinity) == INFINITY && widen(infinity | 0x8000u) == -INFINITY &&
         narrow(INFINITY) == infinity && narrow(3.4e38f) == infinity &&
         std::isnan(widen(infinity + 1)) && std::isnan(widen(narrow(NAN)));
}

}  // namespace

namespace behaviour {

void test_ptx() {
  check(rounds(simt::f16_to_float, simt::float_to_f16, 0x7c00), "float16 rounds");
  check(rounds(simt::bf16_to_float, simt::float_to_bf16, 0x7f80), "bfloat16 rounds");
  check(simt::f16_to_float(1) == 0x1p-24f && simt::f16_to_float(0x3c00) == 1 &&
            simt::f16_to_float(0x7bff) == 65504,
        "float16 is what it is");
  check(simt::float_to_f16(65519.996f) == 0x7bff && simt::float_to_f16(65520) == 0x7c00,
        "float16 overflows");
  for (simt::Schedule schedule : simt::schedules) {
    simt::set_schedule(schedule);
    check(multiplies<ptx::mma_bf16>(simt::float_to_bf16, Bug::none), "a product of bfloat16");
    check(multiplies<ptx::mma_f16>(simt::float_to_f16, Bug::none), "a product of float16");
  }
  simt::set_schedule(simt::Schedule::forward);
}

}  // namespace behaviour

namespace planted {

std::vector<Case> ptx_cases() {
  return {
      {"cp.async: no wait", planted_in_product<Bug::no_wait>, "have landed", "ssss", "ssss",
       "ssss"},
      {"cp.async: the wait leaves the last group", planted_in_product<Bug::no_last_commit>,
       "have landed", "ssss", "ssss", "ssss"},
      {"cp.async: the wait comes after the use", planted_in_product<Bug::wait_after_use>,
       "race:", "wwww", "wwww", "ssss"},
      {"cp.async: no __syncthreads after the wait", planted_in_product<Bug::no_barrier_after_wait>,
       "race:", "wwww", "wwww", "ssss"},
      {"cp.async: a buffer is filled that others still read",
       planted_in_product<Bug::no_barrier_before_refill>, "race:", "www-", "www-", "ssss"},
      {"mma: two registers of A swapped", planted_in_product<Bug::registers_swapped>, "", "wwww",
       "wwww", "wwww"},
      {"mma: B not transposed", planted_in_product<Bug::not_transposed>, "", "wwww", "wwww",
       "wwww"},
      {"ldmatrix: a row not aligned", planted_in_product<Bug::unaligned_row>, "not aligned", "ssss",
       "ssss", "ssss"},
  };
}

}  // namespace planted
