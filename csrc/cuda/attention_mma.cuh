// What the attention kernels on tensor cores share. A block owns kOwn rows (queries, or keys in the
// gradients of keys), a warp 16 of them, and walks over the other side kWalk rows at a time, the
// next ones on their way while these are worked on. Scores live in registers: what one mma puts out
// is, packed to 16 bits, what the next takes in. Heads are filled up with zeros to kHead.
//
// In a tile of scores lane 4 g + t has rows g and g + 8 of its warp, and of every 8 columns 2 t and
// 2 t + 1: elements 0 and 1 of four are of row g, 2 and 3 of row g + 8.
#pragma once

#include "cuda/attention.cuh"
#include "cuda/tile16.cuh"

namespace xlmr::XLMR_CUDA_NS {
namespace {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = kAttentionWarps * kWarp;
constexpr int kOwn = 16 * kAttentionWarps;

// Shared memory: `kOwned` tiles of kOwn rows, and two buffers of two tiles of kWalk rows.
template <int kHeadSize, int kWalkRows, int kOwned>
struct MmaAttention {
  static constexpr int kHead = kHeadSize, kWalk = kWalkRows;
  static constexpr int kOwnTile = kTileElements<kOwn, kHead>;
  static constexpr int kWalkTile = kTileElements<kWalk, kHead>;
  static constexpr int kColumns = kWalk / 8;  // groups of 8 columns of a tile of scores
  static constexpr size_t kShared = (kOwned * kOwnTile + 2 * 2 * kWalkTile) * sizeof(uint16_t);
  static_assert(kShared <= kMostShared, "shared memory of attention on tensor cores");
};
template <int kHead>
using ForwardTiles = MmaAttention<kHead, 64, 1>;
template <int kHead>
using BackwardTiles = MmaAttention<kHead, 32, 2>;

// The exponential of the device's special function unit: off by less than 2^-16 of its value for
// every argument whose result counts, far less than rounding to 16 bits.
__device__ __forceinline__ float fast_exp(float x) { return __expf(x); }

// Begins to load rows row0 to row0 + kRows - 1 of a head.
template <int kHead, int kRows, class T>
__device__ __forceinline__ void load_head(T* tile, const T* data, int64_t stride, int64_t row0,
                                          int64_t rows, int64_t head_size) {
  load_tile16<kRows, kHead, kAttentionThreads>(tile, data, stride, row0, rows, 0, head_size);
}

// scores = own rows from `row` on times the rows of `walk`, over the head.
template <class T, class Tiles>
__device__ __forceinline__ void score_tile(float (&scores)[Tiles::kColumns][4], const T* own,
                                           int row, const T* walk) {
#pragma unroll
  for (int n = 0; n < Tiles::kColumns; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
  }
#pragma unroll 2  // all at once would spill in the gradients of keys
  for (int d = 0; d < Tiles::kHead; d += 16) {
    uint32_t left[4];
    load_left<Tiles::kHead>(left, own, row, d);
#pragma unroll
    for (int n = 0; n < Tiles::kColumns; n += 2) {
      uint32_t right[2][2];
      load_right<Tiles::kHead>(right, walk, 8 * n, d);
      multiply_add<T>(scores[n], left, right[0]);
      multiply_add<T>(scores[n + 1], left, right[1]);
    }
  }
}

// sum += scores, rounded to 16 bits, times the rows of `walk`.
template <class T, class Tiles>
__device__ __forceinline__ void add_rows(float (&sum)[Tiles::kHead / 8][4],
                                         const float (&scores)[Tiles::kColumns][4], const T* walk) {
#pragma unroll
  for (int k = 0; k < Tiles::kWalk; k += 16) {
    const float (&low)[4] = scores[k / 8];
    const float (&high)[4] = scores[k / 8 + 1];
    const uint32_t left[4] = {pack<T>(low[0], low[1]), pack<T>(low[2], low[3]),
                              pack<T>(high[0], high[1]), pack<T>(high[2], high[3])};
#pragma unroll
    for (int d = 0; d < Tiles::kHead; d += 16) {
      uint32_t right[2][2];
      load_right_transposed<Tiles::kHead>(right, walk, d, k);
      multiply_add<T>(sum[d / 8], left, right[0]);
      multiply_add<T>(sum[d / 8 + 1], left, right[1]);
    }
  }
}

// Stores 16 rows of a warp, those of element half * 2 and on times factor[half], by way of `tile`:
// rows of shared memory that no other warp reads.
template <int kHead, class T>
__device__ __forceinline__ void store_rows(T* data, int64_t stride, int64_t rows, int64_t head_size,
                                           const float (&sum)[kHead / 8][4],
                                           const float (&factor)[2], T* tile) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  __syncwarp();  // the rows have been read
#pragma unroll
  for (int n = 0; n < kHead / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      T* to = tile + (lane / 4 + 8 * half) * kLineStride<kHead> + 8 * n + lane % 4 * 2;
      *reinterpret_cast<uint32_t*>(to) =
          pack<T>(sum[n][2 * half] * factor[half], sum[n][2 * half + 1] * factor[half]);
    }
  }
  __syncwarp();
  store_lines16<16, kHead>(data, stride, rows, head_size, tile);
}

// The dropout's bits of a lane's share of a tile of scores with queries as rows, the warp's first
// being `row` of all tokens, and keys as columns from k0 on. A group of four keys belongs to two
// lanes: one computes row g, the other row g + 8.
template <int kColumns>
struct KeptKeys {
  uint32_t bits[2];  // of rows g and g + 8: bit 4 n + c for key 8 n + c of this lane's group

  __device__ __forceinline__ KeptKeys(const DropoutMask<float>& dropout, int64_t head, int64_t row,
                                      int64_t k0) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, t = lane % 4;
    uint32_t mine = 0;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      mine |= dropout.kept(head, row + lane / 4 + 8 * (t % 2), k0 / 4 + 2 * n + t / 2) << 4 * n;
    }
    const uint32_t other = __shfl_xor_sync(kAllLanes, mine, 1);
    bits[0] = t % 2 == 0 ? mine : other;
    bits[1] = t % 2 == 0 ? other : mine;
  }
  __device__ __forceinline__ bool operator()(int n, int i) const {
    const int c = static_cast<int>(threadIdx.x) % 2 * 2 + i % 2;
    return (bits[i / 2] >> (4 * n + c) & 1) != 0;
  }
};

// The same with keys as rows, the warp's first being k0, and queries as columns from `row` on. Four
// lanes share two queries' groups of keys g and g + 8: each computes one of the four.
template <int kColumns>
struct KeptQueries {
  uint32_t bits[2][2];  // of keys g and g + 8, queries 2 t and 2 t + 1: bit 4 n + g % 4

  __device__ __forceinline__ KeptQueries(const DropoutMask<float>& dropout, int64_t head,
                                         int64_t row, int64_t k0) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, t = lane % 4, g = lane / 4;
    const int which = g % 4;
    uint32_t mine = 0;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      mine |= dropout.kept(head, row + 8 * n + 2 * t + which % 2, k0 / 4 + g / 4 + 2 * (which / 2))
              << 4 * n;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bits[i / 2][i % 2] = __shfl_sync(kAllLanes, mine, (g - which + i) * 4 + t);
    }
  }
  __device__ __forceinline__ bool operator()(int n, int i) const {
    const int g = static_cast<int>(threadIdx.x) % kWarp / 4;
    return (bits[i / 2][i % 2] >> (4 * n + g % 4) & 1) != 0;
  }
};

}  // namespace
}  // namespace xlmr::XLMR_CUDA_NS
