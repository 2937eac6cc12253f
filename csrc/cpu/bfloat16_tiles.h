// The arithmetic of a product in bfloat16 on matrix tiles.
#pragma once

#include "cpu/bfloat16.h"
#include "cpu/tiles.h"

namespace xlmr::XLMR_ISA {
namespace {

// A panel of A is 32 rows of 32 steps, 64 bytes a row, one such block behind the other.
struct Bfloat16Tiles : Bfloat16 {
  using Session = TileSession;
  static constexpr int64_t kRows = 2 * kTileRows;

  static void pack_rows(MatrixView<float> a, int64_t rows, int64_t k_size, uint16_t* dst) {
    constexpr int V = Vec<float>::size;
    constexpr int64_t kSteps = kDepth / 2;
    const Pairs pairs(a, k_size);
    for (int64_t block = 0; block < pairs.steps; block += kSteps, dst += kRows * kDepth) {
      const int64_t steps = min_of(kSteps, pairs.steps - block);
      auto* const out = reinterpret_cast<float*>(dst);  // [kRows][kSteps] pairs
      if (steps < kSteps || rows < kRows) memset(dst, 0, kRows * kDepth * sizeof *dst);
      if (pairs.steps_adjoin() && steps == kSteps) {
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t k = 0; k < kSteps; k += V) {
            pairs.along_steps(i, block + k).store(out + i * kSteps + k);
          }
        }
      } else if (pairs.rows_adjoin() && steps == kSteps) {
        for (int64_t i = 0; i < rows; i += V) {
          const int64_t lanes = min_of<int64_t>(V, rows - i);
          for (int64_t k = 0; k < kSteps; k += V) {
            Vec<float> turned[V];
#pragma GCC unroll 16
            for (int j = 0; j < V; ++j) turned[j] = pairs.along_rows(i, block + k + j, lanes);
            transpose(turned);
            for (int64_t j = 0; j < lanes; ++j) turned[j].store(out + (i + j) * kSteps + k);
          }
        }
      } else {
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t k = 0; k < steps; ++k) out[i * kSteps + k] = pairs.at(i, block + k);
        }
      }
    }
  }

  // 2 x 2 tiles of sums, or 1 x 2 where the lower rows are not real.
  static XLMR_INLINE void multiply(int64_t k_size, const uint16_t* a, int64_t rows,
                                   const uint16_t* b, float* out, bool add, LookAhead ahead) {
    const auto kernel = rows > kTileRows ? multiply_tiles<2> : multiply_tiles<1>;
    kernel(k_size / kDepth, a, b, out, add, {ahead.at, kDepth * ahead.step});
  }

 private:
  template <int kHeight>
  static __attribute__((noinline)) void multiply_tiles(int64_t blocks, const uint16_t* a,
                                                       const uint16_t* b, float* out, bool add,
                                                       LookAhead ahead) {
    constexpr int64_t kOutStride = kColumns * sizeof(float);
    constexpr int64_t kRightStride = kColumns * 2 * sizeof(uint16_t);
    float* const lower = out + kTileRows * kColumns;
    constexpr int64_t kHalf = kColumns / 2;
    if (add) {
      tile_load<0>(out, kOutStride);
      tile_load<1>(out + kHalf, kOutStride);
      if (kHeight == 2) {
        tile_load<2>(lower, kOutStride);
        tile_load<3>(lower + kHalf, kOutStride);
      }
    } else {
      tile_zero<0>();
      tile_zero<1>();
      if (kHeight == 2) {
        tile_zero<2>();
        tile_zero<3>();
      }
    }
    for (int64_t block = 0; block < blocks; ++block) {
      tile_load<6>(b, kRightStride);
      tile_load<7>(b + kColumns, kRightStride);
      tile_load<4>(a, kTileBytes);
      tile_dot_bf16<0, 4, 6>();
      tile_dot_bf16<1, 4, 7>();
      if (kHeight == 2) {
        tile_load<5>(a + kTileRows * kDepth, kTileBytes);
        tile_dot_bf16<2, 5, 6>();
        tile_dot_bf16<3, 5, 7>();
      }
      for (int64_t at = 0; at < ahead.step; at += kTileBytes) __builtin_prefetch(ahead.at + at);
      ahead.at += ahead.step;
      a += kRows * kDepth;
      b += kColumns * kDepth;
    }
    tile_store<0>(out, kOutStride);
    tile_store<1>(out + kHalf, kOutStride);
    if (kHeight == 2) {
      tile_store<2>(lower, kOutStride);
      tile_store<3>(lower + kHalf, kOutStride);
    }
  }
};

}  // namespace
}  // namespace xlmr::XLMR_ISA
