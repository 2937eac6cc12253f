// C = epilogue(sum over segments of A B) of 16-bit matrices on tensor cores, summed in float32.
// Tiles of A and B come into shared memory several steps ahead of their use. An element's sum is
// one chain of products of 16 steps of k in ascending order, whatever the tile and the sizes of C
// are, so a row's bits do not depend on the rows beside it.
#pragma once

#include "cuda/gemm_args.cuh"
#include "cuda/tile16.cuh"

namespace xlmr::XLMR_CUDA_NS {
namespace {

// A block's part of C, and a warp's of that.
template <int kBlockRows, int kBlockColumns, int kWarpRowsOf, int kWarpColumnsOf>
struct MmaTile {
  static constexpr int kRows = kBlockRows, kColumns = kBlockColumns;
  static constexpr int kWarpRows = kWarpRowsOf, kWarpColumns = kWarpColumnsOf;
  static constexpr int kDepth = 32, kStages = 4;
  static constexpr int kWarpsAcross = kColumns / kWarpColumns;
  static constexpr int kThreads = kRows / kWarpRows * kWarpsAcross * kWarp;
  static_assert(kWarpRows % 16 == 0 && kWarpColumns == kWarp, "a lane stores one column");

  template <Layout kLayout, int kExtent>
  static constexpr int kOperand = kLayout == Layout::k_contiguous ? kTileElements<kExtent, kDepth>
                                                                  : kTileElements<kDepth, kExtent>;
  // Sums on their way to the epilogue: 16 rows of a warp. The stride spreads pairs over the banks.
  static constexpr int kSumStride = kWarpColumns + 8, kSums = 16 * kSumStride;

  template <Layout kA, Layout kB>
  static constexpr size_t shared() {
    const size_t stages = kStages * (kOperand<kA, kRows> + kOperand<kB, kColumns>)*sizeof(uint16_t);
    const size_t sums = kThreads / kWarp * kSums * sizeof(float);
    return max_of(stages, sums);
  }
};
using LargeMmaTile = MmaTile<128, 128, 64, 32>;
using SmallMmaTile = MmaTile<64, 64, 32, 32>;
// Products that would not give this many large tiles, about one for every multiprocessor of a large
// device, are cut into small ones.
constexpr int64_t kEnoughTiles = 128;

template <class T, class Tile, Layout kA, Layout kB, class Epilogue>
__global__ void __launch_bounds__(Tile::kThreads)
    gemm_mma_kernel(GemmArgs<T> g, Epilogue epilogue) {
  constexpr int kAElements = Tile::template kOperand<kA, Tile::kRows>;
  constexpr int kBElements = Tile::template kOperand<kB, Tile::kColumns>;
  constexpr int kDown = Tile::kWarpRows / 16, kAcross = Tile::kWarpColumns / 8;
  XLMR_SHARED(T, shared);
  const int64_t columns = ceil_div(g.n, Tile::kColumns);
  const int64_t tiles = ceil_div(g.m, Tile::kRows) * columns;
  const int64_t tile = blockIdx.x % tiles;
  const int product = static_cast<int>(blockIdx.x / tiles);
  const int64_t row0 = tile / columns * Tile::kRows, column0 = tile % columns * Tile::kColumns;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warp_row = warp / Tile::kWarpsAcross * Tile::kWarpRows;
  const int warp_column = warp % Tile::kWarpsAcross * Tile::kWarpColumns;
  // Warps that have no element of C only load.
  const bool busy = row0 + warp_row < g.m && column0 + warp_column < g.n;

  const int64_t steps = ceil_div(g.k, Tile::kDepth) * g.segments;
  int64_t next_k = 0;                          // of the step to be loaded next
  int next_segment = product, next_stage = 0;  // product or segment: one of the two is 0
  const auto load_next = [&] {
    if (next_segment < product + g.segments && g.k > 0) {
      T* a = shared + next_stage * (kAElements + kBElements);
      T* b = a + kAElements;
      const T* from_a = g.a[next_segment];
      const T* from_b = g.b[next_segment];
      if constexpr (kA == Layout::k_contiguous) {
        load_tile16<Tile::kRows, Tile::kDepth, Tile::kThreads>(a, from_a, g.a_stride, row0, g.m,
                                                               next_k, g.k);
      } else {
        load_tile16<Tile::kDepth, Tile::kRows, Tile::kThreads>(a, from_a, g.a_stride, next_k, g.k,
                                                               row0, g.m);
      }
      if constexpr (kB == Layout::k_contiguous) {
        load_tile16<Tile::kColumns, Tile::kDepth, Tile::kThreads>(b, from_b, g.b_stride, column0,
                                                                  g.n, next_k, g.k);
      } else {
        load_tile16<Tile::kDepth, Tile::kColumns, Tile::kThreads>(b, from_b, g.b_stride, next_k,
                                                                  g.k, column0, g.n);
      }
      next_k += Tile::kDepth;
      if (next_k >= g.k) {
        next_k = 0;
        ++next_segment;
      }
      next_stage = (next_stage + 1) % Tile::kStages;
    }
    ptx::cp_async_commit();  // a group for every step, empty behind the last: waits count groups
  };

  float sum[kDown][kAcross][4] = {};
#pragma unroll
  for (int stage = 0; stage + 1 < Tile::kStages; ++stage) load_next();
  for (int64_t step = 0; step < steps; ++step) {
    ptx::cp_async_wait<Tile::kStages - 2>();
    // This step's tiles are there, and those of the step before, which are filled next, are read.
    __syncthreads();
    load_next();
    if (!busy) continue;
    const T* a = shared + step % Tile::kStages * (kAElements + kBElements);
    const T* b = a + kAElements;
#pragma unroll
    for (int k = 0; k < Tile::kDepth; k += 16) {
      uint32_t left[kDown][4], right[kAcross][2];
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        if constexpr (kA == Layout::k_contiguous) {
          load_left<Tile::kDepth>(left[i], a, warp_row + 16 * i, k);
        } else {
          load_left_transposed<Tile::kRows>(left[i], a, warp_row + 16 * i, k);
        }
      }
#pragma unroll
      for (int j = 0; j < kAcross; j += 2) {
        uint32_t pair[2][2];
        if constexpr (kB == Layout::k_contiguous) {
          load_right<Tile::kDepth>(pair, b, warp_column + 8 * j, k);
        } else {
          load_right_transposed<Tile::kColumns>(pair, b, warp_column + 8 * j, k);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) right[j + i / 2][i % 2] = pair[i / 2][i % 2];
      }
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
#pragma unroll
        for (int j = 0; j < kAcross; ++j) multiply_add<T>(sum[i][j], left[i], right[j]);
      }
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // the tiles have been read; their place is for sums now
  if (!busy) return;
  // Through shared memory, so that the lanes of a warp read and write neighbours of a row.
  float* sums = reinterpret_cast<float*>(shared) + warp * Tile::kSums;
  const int64_t column = column0 + warp_column + lane;
#pragma unroll
  for (int i = 0; i < kDown; ++i) {
    const int64_t first = row0 + warp_row + 16 * i;
#pragma unroll
    for (int j = 0; j < kAcross; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* to = sums + (lane / 4 + 8 * half) * Tile::kSumStride + 8 * j + lane % 4 * 2;
        *reinterpret_cast<float2*>(to) = {sum[i][j][2 * half], sum[i][j][2 * half + 1]};
      }
    }
    __syncwarp();
    const int rows = static_cast<int>(min_of(int64_t{16}, g.m - first));
    for (int r = 0; r < rows && column < g.n; ++r) {
      const float z = sums[r * Tile::kSumStride + lane];
      g.c[product][(first + r) * g.c_stride + column] =
          narrow<T>(epilogue(product, first + r, column, z));
    }
    __syncwarp();
  }
}

template <class Tile, Layout kA, Layout kB, class T, class Epilogue>
Status gemm_mma_of(const char* name, const GemmArgs<T>& g, const Epilogue& epilogue,
                   const ExecContext& ctx) {
  constexpr size_t shared = Tile::template shared<kA, kB>();
  static_assert(shared <= kMostShared, "shared memory of a GEMM block on tensor cores");
  const int64_t blocks = xlmr::product(
      xlmr::product(ceil_div(g.m, Tile::kRows), ceil_div(g.n, Tile::kColumns)), g.products);
  return launch(name, gemm_mma_kernel<T, Tile, kA, kB, Epilogue>, blocks, Tile::kThreads, shared,
                ctx, g, epilogue);
}

template <Layout kA, Layout kB, class T, class Epilogue>
Status gemm_mma(const char* name, const GemmArgs<T>& g, const Epilogue& epilogue,
                const ExecContext& ctx) {
  using Large = LargeMmaTile;
  const int64_t large = xlmr::product(
      xlmr::product(ceil_div(g.m, Large::kRows), ceil_div(g.n, Large::kColumns)), g.products);
  return large >= kEnoughTiles ? gemm_mma_of<LargeMmaTile, kA, kB>(name, g, epilogue, ctx)
                               : gemm_mma_of<SmallMmaTile, kA, kB>(name, g, epilogue, ctx);
}

}  // namespace
}  // namespace xlmr::XLMR_CUDA_NS
