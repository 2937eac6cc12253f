// Tiles of 16-bit elements in shared memory, and the operands that tensor cores take out of them.
//
// A tile has lines of kWidth elements, as its operand has in global memory, and 16 bytes of padding
// behind each. A line is then an odd number of 16-byte units long (kWidth is a multiple of 16), so
// that eight lines at one place, which ldmatrix reads at once, lie in eight different groups of
// four banks. Padding rather than a swizzle: every address is one base and a constant, and shared
// memory is not what limits the number of blocks.
#pragma once

#include "cuda/element.cuh"

namespace xlmr::XLMR_CUDA_NS {
namespace {

constexpr int kChunk = 8;  // elements in 16 bytes

template <int kWidth>
constexpr int kLineStride = kWidth + kChunk;

template <int kLines, int kWidth>
constexpr int kTileElements = kLines * kLineStride<kWidth>;

struct alignas(16) Chunk {
  uint32_t pair[kChunk / 2];
};

// Whether lines `stride` elements apart all begin at a multiple of 16 bytes.
__device__ __forceinline__ bool lines_aligned(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % sizeof(Chunk) == 0 && stride % kChunk == 0;
}

// Begins to fill a tile with lines from line0 and columns from column0 on, by all threads of the
// block; elements beyond `lines` and `columns` become 0. What can be copied by 16 bytes is a
// cp.async: ready after the wait for its group and a barrier.
template <int kLines, int kWidth, int kThreads, class T>
__device__ __forceinline__ void load_tile16(T* tile, const T* data, int64_t stride, int64_t line0,
                                            int64_t lines, int64_t column0, int64_t columns) {
  constexpr int kChunks = kWidth / kChunk;
  static_assert(kWidth % 16 == 0 && kLines * kChunks % kThreads == 0, "a tile of whole chunks");
  const bool aligned = lines_aligned(data, stride);
#pragma unroll
  for (int u = 0; u < kLines * kChunks / kThreads; ++u) {
    const int index = static_cast<int>(threadIdx.x) + u * kThreads;
    const int64_t line = line0 + index / kChunks, column = column0 + index % kChunks * kChunk;
    T* to = tile + index / kChunks * kLineStride<kWidth> + index % kChunks * kChunk;
    const int64_t there = line < lines ? columns - column : 0;
    if (aligned && (there >= kChunk || there <= 0)) {
      ptx::cp_async_16(to, there > 0 ? data + line * stride + column : data, there > 0);
      continue;
    }
    Chunk chunk = {};
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const uint32_t bits = i < there ? data[line * stride + column + i].bits : 0;
      chunk.pair[i / 2] |= bits << 16 * (i % 2);
    }
    *reinterpret_cast<Chunk*>(to) = chunk;
  }
}

// Stores the first `lines` lines and `columns` columns of a tile, by one warp.
template <int kLines, int kWidth, class T>
__device__ __forceinline__ void store_lines16(T* data, int64_t stride, int64_t lines,
                                              int64_t columns, const T* tile) {
  constexpr int kChunks = kWidth / kChunk;
  const bool aligned = lines_aligned(data, stride);
#pragma unroll
  for (int u = 0; u < kLines * kChunks / kWarp; ++u) {
    const int index = static_cast<int>(threadIdx.x) % kWarp + u * kWarp;
    const int line = index / kChunks, column = index % kChunks * kChunk;
    if (line >= lines || column >= columns) continue;
    const Chunk chunk = *reinterpret_cast<const Chunk*>(tile + line * kLineStride<kWidth> + column);
    T* to = data + line * stride + column;
    if (aligned && column + kChunk <= columns) {
      *reinterpret_cast<Chunk*>(to) = chunk;
      continue;
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (column + i < columns) {
        to[i] = T{static_cast<uint16_t>(chunk.pair[i / 2] >> 16 * (i % 2))};
      }
    }
  }
}

// Where a lane's row for ldmatrix lies: the four 8 x 8 matrices of 16 lines and 16 columns, in the
// order down, then across (or across, then down).
template <int kWidth, class T>
__device__ __forceinline__ const T* down_first(const T* tile, int line, int column) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  return tile + (line + lane % 16) * kLineStride<kWidth> + column + lane / 16 * 8;
}
template <int kWidth, class T>
__device__ __forceinline__ const T* across_first(const T* tile, int line, int column) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  return tile + (line + lane / 16 * 8 + lane % 8) * kLineStride<kWidth> + column + lane / 8 % 2 * 8;
}

// A's operand: 16 rows and 16 steps of k, of a tile with a line for each row; or for each step.
template <int kWidth, class T>
__device__ __forceinline__ void load_left(uint32_t (&a)[4], const T* tile, int row, int k) {
  ptx::ldmatrix(a, down_first<kWidth>(tile, row, k));
}
template <int kWidth, class T>
__device__ __forceinline__ void load_left_transposed(uint32_t (&a)[4], const T* tile, int row,
                                                     int k) {
  ptx::ldmatrix_trans(a, across_first<kWidth>(tile, k, row));
}

// B's operands for two products: 16 steps of k, 8 columns and the 8 behind them; of a tile with a
// line for each column; or for each step.
template <int kWidth, class T>
__device__ __forceinline__ void load_right(uint32_t (&b)[2][2], const T* tile, int column, int k) {
  uint32_t both[4];
  ptx::ldmatrix(both, across_first<kWidth>(tile, column, k));
#pragma unroll
  for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = both[i];
}
template <int kWidth, class T>
__device__ __forceinline__ void load_right_transposed(uint32_t (&b)[2][2], const T* tile,
                                                      int column, int k) {
  uint32_t both[4];
  ptx::ldmatrix_trans(both, down_first<kWidth>(tile, k, column));
#pragma unroll
  for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = both[i];
}

// c += a b
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  static_assert(kIs16Bits<T>, "an operand of tensor cores");
  if constexpr (std::is_same_v<T, Bfloat16>) {
    ptx::mma_bf16(c, a, b);
  } else {
    ptx::mma_f16(c, a, b);
  }
}

}  // namespace
}  // namespace xlmr::XLMR_CUDA_NS
