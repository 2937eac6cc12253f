// C = epilogue(sum over segments of A B) by fused multiply-add in float32 or float64. A block makes
// a tile of C from tiles of A and B in shared memory, a thread a part of it in registers. The sum
// of an element runs over k in ascending order whatever the sizes of C are, so a row's bits do not
// depend on the rows beside it.
#pragma once

#include "cuda/gemm_args.cuh"

namespace xlmr::XLMR_CUDA_NS {
namespace {

template <class T>
struct GemmTile {
  static constexpr int kRows = 64, kColumns = 64, kDepth = 16;
  static constexpr int kThreadRows = sizeof(T) == 4 ? 8 : 4;  // of a thread, in groups of 4
  static constexpr int kThreads = kRows / kThreadRows * (kColumns / 4);
  // Steps of kDepth that are summed before they join the total: longer chains round more.
  static constexpr int kChain = 12;
  static constexpr int kAStride = kRows + kPad<T>, kBStride = kColumns + kPad<T>;
  static constexpr int kBuffer = kDepth * (kAStride + kBStride);  // elements; there are two
  static constexpr size_t kShared = 2 * kBuffer * sizeof(T);
  static_assert(kShared <= kMostShared, "shared memory of a GEMM block");
};

// One thread's share of a [kDepth, 64] tile of an operand: what it loads next, and where that goes.
template <class T, Layout kLayout, int kExtent, int kStride>
struct TileLoader {
  using Tile = GemmTile<T>;
  static constexpr int kCount = kExtent * Tile::kDepth / Tile::kThreads;
  static constexpr bool kAlongK = kLayout == Layout::k_contiguous;
  static constexpr int kRun = kAlongK ? Tile::kDepth : kExtent;  // neighbours in memory
  static constexpr int kJump = Tile::kThreads / kRun;

  const int along = static_cast<int>(threadIdx.x) % kRun;
  const int across = static_cast<int>(threadIdx.x) / kRun;
  T value[kCount];

  // Elements outside of the operand are 0.
  __device__ __forceinline__ void load(const T* data, int64_t stride, int64_t first, int64_t extent,
                                       int64_t k0, int64_t k) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int64_t i = first + (kAlongK ? across + u * kJump : along);
      const int64_t kk = k0 + (kAlongK ? along : across + u * kJump);
      value[u] = T(0);
      if (i < extent && kk < k) value[u] = data[kAlongK ? i * stride + kk : kk * stride + i];
    }
  }
  __device__ __forceinline__ void store(T* tile) const {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int i = kAlongK ? across + u * kJump : along;
      const int kk = kAlongK ? along : across + u * kJump;
      tile[kk * kStride + i] = value[u];
    }
  }
};

template <class T, Layout kA, Layout kB, class Epilogue>
__global__ void __launch_bounds__(GemmTile<T>::kThreads)
    gemm_fma_kernel(GemmArgs<T> g, Epilogue epilogue) {
  using Tile = GemmTile<T>;
  constexpr int TM = Tile::kThreadRows;
  XLMR_SHARED(T, shared);
  const int64_t columns = ceil_div(g.n, Tile::kColumns);
  const int64_t tiles = ceil_div(g.m, Tile::kRows) * columns;
  const int64_t tile = blockIdx.x % tiles;
  const int product = static_cast<int>(blockIdx.x / tiles);
  const int64_t row0 = tile / columns * Tile::kRows, column0 = tile % columns * Tile::kColumns;
  const int tx = static_cast<int>(threadIdx.x) % (Tile::kColumns / 4);
  const int ty = static_cast<int>(threadIdx.x) / (Tile::kColumns / 4);

  TileLoader<T, kA, Tile::kRows, Tile::kAStride> a_tile;
  TileLoader<T, kB, Tile::kColumns, Tile::kBStride> b_tile;
  const int64_t depth_steps = ceil_div(g.k, Tile::kDepth);
  const int64_t steps = depth_steps * g.segments;
  const auto load = [&](int64_t step) {
    const int64_t segment = product + step / depth_steps;  // one of the two is 0
    const int64_t k0 = step % depth_steps * Tile::kDepth;
    a_tile.load(g.a[segment], g.a_stride, row0, g.m, k0, g.k);
    b_tile.load(g.b[segment], g.b_stride, column0, g.n, k0, g.k);
  };

  T total[TM][4] = {}, sum[TM][4] = {};
  if (steps > 0) load(0);
  for (int64_t step = 0; step < steps; ++step) {
    // Two buffers: the one written now was last read before the barrier of the step before.
    T* a = shared + (step % 2) * Tile::kBuffer;
    T* b = a + Tile::kDepth * Tile::kAStride;
    a_tile.store(a);
    b_tile.store(b);
    __syncthreads();
    if (step + 1 < steps) load(step + 1);
#pragma unroll
    for (int kk = 0; kk < Tile::kDepth; ++kk) {
      const Quad<T> right = load_quad(b + kk * Tile::kBStride + tx * 4);
#pragma unroll
      for (int half = 0; half < TM / 4; ++half) {
        const Quad<T> left = load_quad(a + kk * Tile::kAStride + half * (Tile::kRows / 2) + ty * 4);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            T& s = sum[half * 4 + r][c];
            s = fma(left.v[r], right.v[c], s);
          }
        }
      }
    }
    if ((step + 1) % Tile::kChain == 0 || step + 1 == steps) {
#pragma unroll
      for (int r = 0; r < TM; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          total[r][c] += sum[r][c];
          sum[r][c] = T(0);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < TM; ++r) {
    const int64_t row = row0 + r / 4 * (Tile::kRows / 2) + ty * 4 + r % 4;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int64_t column = column0 + tx * 4 + c;
      if (row < g.m && column < g.n) {
        g.c[product][row * g.c_stride + column] = epilogue(product, row, column, total[r][c]);
      }
    }
  }
}

template <Layout kA, Layout kB, class T, class Epilogue>
Status gemm_fma(const char* name, const GemmArgs<T>& g, const Epilogue& epilogue,
                const ExecContext& ctx) {
  using Tile = GemmTile<T>;
  const int64_t blocks = xlmr::product(
      xlmr::product(ceil_div(g.m, Tile::kRows), ceil_div(g.n, Tile::kColumns)), g.products);
  return launch(name, gemm_fma_kernel<T, kA, kB, Epilogue>, blocks, Tile::kThreads, Tile::kShared,
                ctx, g, epilogue);
}

}  // namespace
}  // namespace xlmr::XLMR_CUDA_NS
