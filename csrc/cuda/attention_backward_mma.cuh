// The gradients of attention on tensor cores: a kernel for dQ, whose blocks own queries and walk
// over keys, and one for dK and dV, whose blocks own keys and walk over queries. Scores are
// computed again in both, so no two blocks add to one element, and every sum has one order. The
// scale joins at the end, in float32.
#pragma once

#include "cuda/attention_mma.cuh"

namespace xlmr::XLMR_CUDA_NS {
namespace {

// Of a multiprocessor, as registers allow without a spill.
template <int kHead>
constexpr int kBackwardBlocks = kHead == 64 ? 2 : 1;

template <class T, int kHead>
__global__ void __launch_bounds__(kAttentionThreads, kBackwardBlocks<kHead>)
    attention_dquery_mma_kernel(AttentionBackward a, DropoutMask<float> dropout, const float* delta,
                                int64_t query_blocks) {
  using Tiles = BackwardTiles<kHead>;
  XLMR_SHARED(T, shared);
  T* q_tile = shared;
  T* dout_tile = q_tile + Tiles::kOwnTile;
  T* walk = dout_tile + Tiles::kOwnTile;  // [2 buffers][key, value]

  const AttentionHead h = attention_head(a, blockIdx.x / query_blocks);
  const int64_t q0 = blockIdx.x % query_blocks * kOwn;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int row0 = static_cast<int>(threadIdx.x) / kWarp * 16;
  T* dquery = head_rows<T>(a.dquery, h.query + q0, a.dquery_stride, h.head, a.head_size);
  if (h.length == 0) {
    if (!a.first_only) return;
    for (int64_t d = threadIdx.x; d < a.head_size; d += kAttentionThreads) dquery[d] = T{0};
    return;
  }
  if (q0 >= h.queries) return;
  const int64_t rows = min_of(int64_t{kOwn}, h.queries - q0);
  const bool busy = row0 < rows;

  const T* query = head_rows<T>(a.query, h.query + q0, a.query_stride, h.head, a.head_size);
  const T* dout = head_rows<T>(a.dout, h.query + q0, a.dout_stride, h.head, a.head_size);
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
  load_head<kHead, kOwn>(dout_tile, dout, a.dout_stride, 0, rows, a.head_size);
  load(0);

  const float scale = static_cast<float>(a.scale);
  const int64_t first = h.head * h.all_queries + h.query + q0;
  float lse[2] = {}, row_delta[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + lane / 4 + 8 * half;
    if (row >= rows) continue;
    lse[half] = static_cast<const float*>(a.lse)[first + row];
    row_delta[half] = delta[first + row];
  }
  float sum[kHead / 8][4] = {};
  const int64_t blocks = ceil_div(h.length, Tiles::kWalk);
  for (int64_t block = 0; block < blocks; ++block) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // these tiles are there, and those of the block before have been read
    if (block + 1 < blocks) load(block + 1);
    if (!busy) continue;
    const T* k_tile = walk + block % 2 * 2 * Tiles::kWalkTile;
    const T* v_tile = k_tile + Tiles::kWalkTile;
    const int64_t k0 = block * Tiles::kWalk;
    float s[Tiles::kColumns][4], dp[Tiles::kColumns][4];
    score_tile<T, Tiles>(s, q_tile, row0, k_tile);
    score_tile<T, Tiles>(dp, dout_tile, row0, v_tile);
    if (dropout.on) {
      const KeptKeys<Tiles::kColumns> kept(dropout, h.head, h.first + q0 + row0, k0);
#pragma unroll
      for (int n = 0; n < Tiles::kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) dp[n][i] = kept(n, i) ? dp[n][i] * dropout.keep : 0.0f;
      }
    }
    const int keys = static_cast<int>(min_of(int64_t{Tiles::kWalk}, h.length - k0));
#pragma unroll
    for (int n = 0; n < Tiles::kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool there = 8 * n + lane % 4 * 2 + i % 2 < keys;
        const float p = there ? fast_exp(s[n][i] * scale - lse[i / 2]) : 0.0f;
        s[n][i] = p * (dp[n][i] - row_delta[i / 2]);
      }
    }
    add_rows<T, Tiles>(sum, s, k_tile);
  }
  if (!busy) return;
  const float factor[2] = {scale, scale};
  store_rows<kHead>(dquery + row0 * a.dquery_stride, a.dquery_stride, rows - row0, a.head_size, sum,
                    factor, q_tile + row0 * kLineStride<kHead>);
}

template <class T, int kHead>
__global__ void __launch_bounds__(kAttentionThreads, kBackwardBlocks<kHead>)
    attention_dkey_dvalue_mma_kernel(AttentionBackward a, DropoutMask<float> dropout,
                                     const float* delta, int64_t key_blocks) {
  using Tiles = BackwardTiles<kHead>;
  XLMR_SHARED(T, shared);
  T* k_tile = shared;
  T* v_tile = k_tile + Tiles::kOwnTile;
  T* walk = v_tile + Tiles::kOwnTile;  // [2 buffers][query, dout]

  const AttentionHead h = attention_head(a, blockIdx.x / key_blocks);
  const int64_t k0 = blockIdx.x % key_blocks * kOwn;
  if (k0 >= h.length) return;
  const int64_t keys = min_of(int64_t{kOwn}, h.length - k0);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int row0 = static_cast<int>(threadIdx.x) / kWarp * 16;  // the warp's first key
  const bool busy = row0 < keys;

  const T* key = head_rows<T>(a.key, h.first + k0, a.key_stride, h.head, a.head_size);
  const T* value = head_rows<T>(a.value, h.first + k0, a.value_stride, h.head, a.head_size);
  const T* query = head_rows<T>(a.query, h.query, a.query_stride, h.head, a.head_size);
  const T* dout = head_rows<T>(a.dout, h.query, a.dout_stride, h.head, a.head_size);
  const auto load = [&](int64_t block) {
    T* to = walk + block % 2 * 2 * Tiles::kWalkTile;
    const int64_t q0 = block * Tiles::kWalk;
    load_head<kHead, Tiles::kWalk>(to, query, a.query_stride, q0, h.queries, a.head_size);
    load_head<kHead, Tiles::kWalk>(to + Tiles::kWalkTile, dout, a.dout_stride, q0, h.queries,
                                   a.head_size);
    ptx::cp_async_commit();
  };
  load_head<kHead, kOwn>(k_tile, key, a.key_stride, 0, keys, a.head_size);
  load_head<kHead, kOwn>(v_tile, value, a.value_stride, 0, keys, a.head_size);
  load(0);

  const float scale = static_cast<float>(a.scale);
  const float* lse = static_cast<const float*>(a.lse) + h.head * h.all_queries + h.query;
  delta += h.head * h.all_queries + h.query;
  float dkey[kHead / 8][4] = {}, dvalue[kHead / 8][4] = {};
  const int64_t blocks = ceil_div(h.queries, Tiles::kWalk);
  for (int64_t block = 0; block < blocks; ++block) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // these tiles are there, and those of the block before have been read
    if (block + 1 < blocks) load(block + 1);
    if (!busy) continue;
    const T* q_tile = walk + block % 2 * 2 * Tiles::kWalkTile;
    const T* dout_tile = q_tile + Tiles::kWalkTile;
    const int64_t q0 = block * Tiles::kWalk;
    float p[Tiles::kColumns][4];
    score_tile<T, Tiles>(p, k_tile, row0, q_tile);
#pragma unroll
    for (int n = 0; n < Tiles::kColumns; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t row = q0 + 8 * n + lane % 4 * 2 + e;
        const bool asks = row < h.queries;
        const float shift = asks ? lse[row] : 0.0f;
        p[n][e] = asks ? fast_exp(p[n][e] * scale - shift) : 0.0f;
        p[n][e + 2] = asks ? fast_exp(p[n][e + 2] * scale - shift) : 0.0f;
      }
    }
    float ds[Tiles::kColumns][4];
    score_tile<T, Tiles>(ds, v_tile, row0, dout_tile);  // the gradients of P~ first
    const auto gradient = [&](const auto& kept) {
#pragma unroll
      for (int n = 0; n < Tiles::kColumns; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int64_t row = q0 + 8 * n + lane % 4 * 2 + e;
          const float row_delta = row < h.queries ? delta[row] : 0.0f;
#pragma unroll
          for (int i = e; i < 4; i += 2) {
            const bool stays = kept(n, i);
            const float dp = stays ? ds[n][i] * dropout.keep : 0.0f;
            ds[n][i] = p[n][i] * (dp - row_delta);
            p[n][i] = stays ? p[n][i] : 0.0f;
          }
        }
      }
    };
    if (dropout.on) {
      gradient(KeptQueries<Tiles::kColumns>(dropout, h.head, h.first + q0, k0 + row0));
    } else {
      gradient([](int, int) { return true; });
    }
    add_rows<T, Tiles>(dvalue, p, dout_tile);
    add_rows<T, Tiles>(dkey, ds, q_tile);
  }
  if (!busy) return;
  const float keep[2] = {dropout.keep, dropout.keep}, scales[2] = {scale, scale};
  T* dk = head_rows<T>(a.dkey, h.first + k0 + row0, a.dkv_stride, h.head, a.head_size);
  T* dv = head_rows<T>(a.dvalue, h.first + k0 + row0, a.dkv_stride, h.head, a.head_size);
  store_rows<kHead>(dv, a.dkv_stride, keys - row0, a.head_size, dvalue, keep,
                    v_tile + row0 * kLineStride<kHead>);
  store_rows<kHead>(dk, a.dkv_stride, keys - row0, a.head_size, dkey, scales,
                    k_tile + row0 * kLineStride<kHead>);
}

template <class T, int kHead>
Status run_backward_mma(const AttentionBackward& a, float* delta, const ExecContext& ctx) {
  constexpr size_t shared = BackwardTiles<kHead>::kShared;
  const DropoutMask<float> dropout(a.dropout);
  const int64_t heads = product(a.batch, a.num_heads);
  const int64_t query_blocks = a.first_only ? 1 : ceil_div(a.max_seqlen, kOwn);
  if (Status error = launch("attention_backward dquery", attention_dquery_mma_kernel<T, kHead>,
                            product(heads, query_blocks), kAttentionThreads, shared, ctx, a,
                            dropout, delta, query_blocks)) {
    return error;
  }
  const int64_t key_blocks = ceil_div(a.max_seqlen, kOwn);
  return launch("attention_backward dkey dvalue", attention_dkey_dvalue_mma_kernel<T, kHead>,
                product(heads, key_blocks), kAttentionThreads, shared, ctx, a, dropout, delta,
                key_blocks);
}

}  // namespace
}  // namespace xlmr::XLMR_CUDA_NS
