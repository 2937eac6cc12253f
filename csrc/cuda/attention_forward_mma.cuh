// out = softmax(scale Q K^T) V on tensor cores (Dao 2023, arXiv 2307.08691, alg. 1): a block for 64
// queries of a head of a sequence. Key blocks start at the sequence's start, so a row's bits depend
// on its sequence alone.
#pragma once

#include "cuda/attention_mma.cuh"

namespace xlmr::XLMR_CUDA_NS {
namespace {

template <class T, int kHead>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_forward_mma_kernel(AttentionForward a, DropoutMask<float> dropout,
                                 int64_t query_blocks) {
  using Tiles = ForwardTiles<kHead>;
  XLMR_SHARED(T, shared);
  T* q_tile = shared;
  T* walk = q_tile + Tiles::kOwnTile;  // [2 buffers][key, value]

  const AttentionHead h = attention_head(a, blockIdx.x / query_blocks);
  const int64_t q0 = blockIdx.x % query_blocks * kOwn;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int row0 = static_cast<int>(threadIdx.x) / kWarp * 16;  // the warp's first
  T* out = head_rows<T>(a.out, h.query + q0, a.out_stride, h.head, a.head_size);
  float* lse = a.lse == nullptr
                   ? nullptr
                   : static_cast<float*>(a.lse) + h.head * h.all_queries + h.query + q0;
  if (h.length == 0) {  // a sequence without tokens has a row here where only first tokens ask
    if (!a.first_only) return;
    for (int64_t d = threadIdx.x; d < a.head_size; d += kAttentionThreads) out[d] = T{0};
    if (threadIdx.x == 0 && lse != nullptr) *lse = 0.0f;
    return;
  }
  if (q0 >= h.queries) return;
  const int64_t rows = min_of(int64_t{kOwn}, h.queries - q0);
  const bool busy = row0 < rows;

  const T* query = head_rows<T>(a.query, h.query + q0, a.query_stride, h.head, a.head_size);
  const T* key = head_rows<T>(a.key, h.first, a.key_stride, h.head, a.head_size);
  const T* value = head_rows<T>(a.value, h.first, a.value_stride, h.head, a.head_size);
  const auto load = [&](int64_t block) {
    T* to = walk + block % 2 * 2 * Tiles::kWalkTile;
    const int64_t k0 = block * Tiles::kWalk;
    load_head<kHead, Tiles::kWalk>(to, key, a.key_stride, k0, h.length, a.head_size);
    load_head<kHead, Tiles::kWalk>(to + Tiles::kWalkTile, value, a.value_stride, k0, h.length,
                                   a.head_size);
    ptx::cp_async_commit();
  };
  load_head<kHead, kOwn>(q_tile, query, a.query_stride, 0, rows, a.head_size);
  load(0);

  const float scale = static_cast<float>(a.scale);
  float sum[kHead / 8][4] = {};
  float running_max[2] = {-INFINITY, -INFINITY}, running_sum[2] = {};
  const int64_t blocks = ceil_div(h.length, Tiles::kWalk);
  for (int64_t block = 0; block < blocks; ++block) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // these tiles are there, and those of the block before have been read
    if (block + 1 < blocks) load(block + 1);
    if (!busy) continue;
    const T* k_tile = walk + block % 2 * 2 * Tiles::kWalkTile;
    const T* v_tile = k_tile + Tiles::kWalkTile;
    const int64_t k0 = block * Tiles::kWalk;
    float s[Tiles::kColumns][4];
    score_tile<T, Tiles>(s, q_tile, row0, k_tile);
    const int keys = static_cast<int>(min_of(int64_t{Tiles::kWalk}, h.length - k0));
    float largest[2] = {running_max[0], running_max[1]};
#pragma unroll
    for (int n = 0; n < Tiles::kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool there = 8 * n + lane % 4 * 2 + i % 2 < keys;
        s[n][i] = there ? s[n][i] * scale : -INFINITY;
        largest[i / 2] = fmax(largest[i / 2], s[n][i]);
      }
    }
    float rescale[2], total[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      largest[half] = max_lanes(largest[half], 4);
      rescale[half] = fast_exp(running_max[half] - largest[half]);
      running_max[half] = largest[half];
    }
#pragma unroll
    for (int n = 0; n < Tiles::kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = fast_exp(s[n][i] - largest[i / 2]);
        total[i / 2] += s[n][i];
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      running_sum[half] = fma(running_sum[half], rescale[half], sum_lanes(total[half], 4));
    }
    if (dropout.on) {  // 1 / (1 - p) waits for the end: it could be beyond 16 bits
      const KeptKeys<Tiles::kColumns> kept(dropout, h.head, h.first + q0 + row0, k0);
#pragma unroll
      for (int n = 0; n < Tiles::kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = kept(n, i) ? s[n][i] : 0.0f;
      }
    }
#pragma unroll
    for (int n = 0; n < kHead / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[n][i] *= rescale[i / 2];
    }
    add_rows<T, Tiles>(sum, s, v_tile);
  }
  if (!busy) return;
  const float factor[2] = {dropout.keep / running_sum[0], dropout.keep / running_sum[1]};
  store_rows<kHead>(out + row0 * a.out_stride, a.out_stride, rows - row0, a.head_size, sum, factor,
                    q_tile + row0 * kLineStride<kHead>);
  if (lse == nullptr || lane % 4 != 0) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + lane / 4 + 8 * half;
    if (row < rows) lse[row] = running_max[half] + log(running_sum[half]);
  }
}

template <class T, int kHead>
Status run_forward_mma(const AttentionForward& a, const ExecContext& ctx) {
  const int64_t query_blocks = a.first_only ? 1 : ceil_div(a.max_seqlen, kOwn);
  const int64_t blocks = product(product(a.batch, a.num_heads), query_blocks);
  return launch("attention_forward", attention_forward_mma_kernel<T, kHead>, blocks,
                kAttentionThreads, ForwardTiles<kHead>::kShared, ctx, a,
                DropoutMask<float>(a.dropout), query_blocks);
}

}  // namespace
}  // namespace xlmr::XLMR_CUDA_NS
