// What the attention kernels share: the sizes of their tiles, loading them, and the products in
// them. A tile lies in shared memory as [head size][rows], so that four neighbouring rows, or four
// neighbouring steps of a sum over rows, are read at once.
#pragma once

#include "cuda/dropout.cuh"

namespace xlmr::XLMR_CUDA_NS {
namespace {

// Thread (ty, tx) has the scores of kThreadRows queries from kThreadRows * ty on and the 4 keys
// from 4 * tx on: one group of the dropout's mask. All threads of a row are lanes of one warp.
template <class T, int kHead>
struct AttentionTile {
  static constexpr bool kLarge = kHead * sizeof(T) == 64 * 4;   // float32, head size up to 64
  static constexpr bool kSmall = kHead * sizeof(T) == 128 * 8;  // float64, up to 128
  static constexpr int kQueries = kLarge ? 64 : kSmall ? 16 : 32;
  static constexpr int kKeys = kSmall ? 16 : 32;
  static constexpr int kThreadRows = kSmall ? 1 : sizeof(T) == 8 ? 2 : 4;
  static constexpr int kX = kKeys / 4, kY = kQueries / kThreadRows;
  static constexpr int kThreads = kX * kY;
  static constexpr int kQueryStride = kQueries + kPad<T>, kKeyStride = kKeys + kPad<T>;
  static constexpr int kQueryTile = kHead * kQueryStride, kKeyTile = kHead * kKeyStride;
  static constexpr int kScoreTile = kQueries * kKeyStride;  // [query][key]
  static_assert(kThreads % kWarp == 0 && kWarp % kX == 0, "rows do not straddle warps");
};

// The rows of one head of one sequence.
struct AttentionHead {
  int64_t head, length;    // keys of the sequence
  int64_t first;           // its first key, of all tokens
  int64_t query, queries;  // its first query, of all; how many
  int64_t all_queries;     // of all sequences
};

template <class Args>
__device__ __forceinline__ AttentionHead attention_head(const Args& a, int64_t index) {
  const int64_t sequence = index / a.num_heads;
  // The host has not looked at the offsets: wrong ones give wrong rows, of those there are.
  const auto within = [&a](int64_t low, int64_t row) { return max_of(low, min_of(row, a.rows)); };
  const int64_t first = within(0, a.cu_seqlens[sequence]);
  const int64_t length = within(first, a.cu_seqlens[sequence + 1]) - first;
  return {index % a.num_heads,
          length,
          first,
          a.first_only ? sequence : first,
          a.first_only ? 1 : length,
          a.first_only ? a.batch : a.rows};
}

template <class T>
__device__ __forceinline__ const T* head_rows(const void* data, int64_t row, int64_t stride,
                                              int64_t head, int64_t head_size) {
  return static_cast<const T*>(data) + row * stride + head * head_size;
}
template <class T>
__device__ __forceinline__ T* head_rows(void* data, int64_t row, int64_t stride, int64_t head,
                                        int64_t head_size) {
  return static_cast<T*>(data) + row * stride + head * head_size;
}

// tile[d][row] = from[row][d]; 0 beyond `rows` and `head_size`.
template <class T, int kHead, int kRows, int kStride, int kThreads>
__device__ __forceinline__ void load_tile(T* tile, const T* from, int64_t stride, int64_t rows,
                                          int64_t head_size) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int row = static_cast<int>(threadIdx.x) / kWarp; row < kRows; row += kThreads / kWarp) {
#pragma unroll
    for (int i = 0; i < kHead / kWarp; ++i) {
      const int d = lane + i * kWarp;
      T value = 0;
      if (row < rows && d < head_size) value = from[row * stride + d];
      tile[d * kStride + row] = value;
    }
  }
}

constexpr int kDotChain = 16;  // steps of a dot product that are summed apart

// products[r][c] = left[row + r] . right[key + c], of tiles with the given strides. Sums of
// kDotChain steps are added up: a score's error becomes the relative error of its probability, and
// one long chain rounds twice as much.
template <class T, int kThreadRows, int kLeftStride, int kRightStride>
__device__ __forceinline__ void dot_rows(const T* left, const T* right, int64_t head_size,
                                         T (&products)[kThreadRows][4]) {
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) products[r][c] = T(0);
  }
  for (int d0 = 0; d0 < head_size; d0 += kDotChain) {  // the tiles are 0 behind the head's end
    T part[kThreadRows][4] = {};
#pragma unroll 4
    for (int d = d0; d < d0 + kDotChain; ++d) {
      const Quad<T> b = load_quad(right + d * kRightStride);
      T a[kThreadRows];
      if constexpr (kThreadRows == 4) {
        const Quad<T> quad = load_quad(left + d * kLeftStride);
#pragma unroll
        for (int r = 0; r < 4; ++r) a[r] = quad.v[r];
      } else {
#pragma unroll
        for (int r = 0; r < kThreadRows; ++r) a[r] = left[d * kLeftStride + r];
      }
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) part[r][c] = fma(a[r], b.v[c], part[r][c]);
      }
    }
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) products[r][c] += part[r][c];
    }
  }
}

// sum[r][c] = sum[r][c] * rescale[r] + sum over keys of scores[r][key] * tile[d + c * kX][key], for
// `keys` keys (those up to a multiple of 4 have scores of 0). Each block of keys is summed apart,
// which rounds less than one long chain.
template <class Tile, class T, int kHead>
__device__ __forceinline__ void add_over_keys(const T* scores, const T* tile, int64_t keys,
                                              int64_t head_size,
                                              const T (&rescale)[Tile::kThreadRows],
                                              T (&sum)[Tile::kThreadRows][kHead / Tile::kX]) {
  constexpr int R = Tile::kThreadRows;
#pragma unroll
  for (int c0 = 0; c0 < kHead / Tile::kX; c0 += 4) {
    if (c0 * Tile::kX >= head_size) break;
    T part[R][4] = {};
    for (int key = 0; key < keys; key += 4) {
      Quad<T> p[R], v[4];
#pragma unroll
      for (int r = 0; r < R; ++r) p[r] = load_quad(scores + r * Tile::kKeyStride + key);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        v[c] = load_quad(tile + (c0 + c) * Tile::kX * Tile::kKeyStride + key);
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
#pragma unroll
          for (int i = 0; i < 4; ++i) part[r][c] = fma(p[r].v[i], v[c].v[i], part[r][c]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[r][c0 + c] = fma(sum[r][c0 + c], rescale[r], part[r][c]);
    }
  }
}

inline Status check_head_size(int64_t head_size) {
  return head_size <= 128 ? nullptr : "attention on CUDA takes head sizes up to 128";
}

}  // namespace
}  // namespace xlmr::XLMR_CUDA_NS
