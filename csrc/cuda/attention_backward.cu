// The gradients of attention: delta = rowsum(dO * O) row by row, then dQ by blocks of queries and
// dK, dV by blocks of keys. Scores are computed again in both, so no two blocks add to one element,
// and every sum has one order. In 16 bits on tensor cores (attention_backward_mma.cuh), else by
// fused multiply-add as here.
#include "cuda/attention.cuh"
#include "cuda/attention_backward_mma.cuh"
#include "cuda/kernels.cuh"

namespace xlmr::XLMR_CUDA_NS {
namespace {

// delta = rowsum(dO * O) = rowsum(P * dP). In the second form the error of dP cancels where one
// probability is near 1, and dividing by rowsum(P) = 1 takes out what rounding lse did to P. It
// costs one more pass over the keys, which up to this length is next to nothing in an encoder.
constexpr int64_t kShortLength = 128;

constexpr int kDeltaWarps = 4;

// delta in its first form; a warp for a row of a head.
template <class T>
__global__ void __launch_bounds__(kDeltaWarps* kWarp)
    attention_delta_kernel(AttentionBackward a, int64_t queries, Wide<T>* delta) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kDeltaWarps + threadIdx.x / kWarp;
  if (index >= a.num_heads * queries) return;
  const int64_t head = index / queries, row = index % queries;
  const T* dout = head_rows<T>(a.dout, row, a.dout_stride, head, a.head_size);
  const T* out = head_rows<T>(a.out, row, a.out_stride, head, a.head_size);
  Wide<T> sum = 0;
  for (int64_t d = lane; d < a.head_size; d += kWarp) {
    sum = fma(widen(dout[d]), widen(out[d]), sum);
  }
  sum = sum_lanes(sum);
  if (lane == 0) delta[index] = sum;
}

// A thread's share of a tile: kThreadRows queries and 4 keys.
template <class T, int kThreadRows>
struct Scores {
  T softmax[kThreadRows][4];       // P
  T dropped[kThreadRows][4];       // P~, after dropout
  T dprobability[kThreadRows][4];  // dO V^T through the mask: the gradient of P
};

// For the queries from q0 + row0 and the keys from k0 + 4 tx; P is 0 where there is no such query
// or key.
template <class Tile, class T>
__device__ __forceinline__ Scores<T, Tile::kThreadRows> scores_again(
    const AttentionBackward& a, const AttentionHead& h, const DropoutMask<T>& dropout,
    const T* q_tile, const T* dout_tile, const T* k_tile, const T* v_tile, int64_t q0, int64_t k0,
    int row0, int tx) {
  constexpr int R = Tile::kThreadRows;
  Scores<T, R> s;
  dot_rows<T, R, Tile::kQueryStride, Tile::kKeyStride>(q_tile + row0, k_tile + 4 * tx, a.head_size,
                                                       s.softmax);
  dot_rows<T, R, Tile::kQueryStride, Tile::kKeyStride>(dout_tile + row0, v_tile + 4 * tx,
                                                       a.head_size, s.dprobability);
  const T scale = static_cast<T>(a.scale);
  const T* lse = static_cast<const T*>(a.lse) + h.head * h.all_queries + h.query;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t row = q0 + row0 + r;
    const bool asks = row < h.queries;
    const T shift = asks ? lse[row] : T(0);
    const Quad<T> factor = dropout.factors(h.head, h.first + row, k0 / 4 + tx);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const bool there = asks && k0 + 4 * tx + c < h.length;
      const T p = there ? exp(s.softmax[r][c] * scale - shift) : T(0);
      s.softmax[r][c] = p;
      s.dropped[r][c] = p * factor.v[c];
      s.dprobability[r][c] *= factor.v[c];
    }
  }
  return s;
}

// dS of row r.
template <class T, int kThreadRows>
__device__ __forceinline__ Quad<T> dscore(const Scores<T, kThreadRows>& s, int r, T delta,
                                          T scale) {
  Quad<T> row;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    row.v[c] = s.softmax[r][c] * (s.dprobability[r][c] - delta) * scale;
  }
  return row;
}

template <class T, int kHead>
constexpr size_t backward_shared(int score_tiles) {
  using Tile = AttentionTile<T, kHead>;
  return sizeof(T) * (2 * Tile::kQueryTile + 2 * Tile::kKeyTile + score_tiles * Tile::kScoreTile);
}

template <class T, int kHead>
__global__ void __launch_bounds__(AttentionTile<T, kHead>::kThreads, 1)
    attention_dquery_kernel(AttentionBackward a, DropoutMask<T> dropout, T* delta,
                            int64_t query_blocks) {
  using Tile = AttentionTile<T, kHead>;
  constexpr int R = Tile::kThreadRows, X = Tile::kX;
  XLMR_SHARED(T, shared);
  T* q_tile = shared;
  T* dout_tile = q_tile + Tile::kQueryTile;
  T* k_tile = dout_tile + Tile::kQueryTile;
  T* v_tile = k_tile + Tile::kKeyTile;
  T* dscores = v_tile + Tile::kKeyTile;
  const T scale = static_cast<T>(a.scale);

  const AttentionHead h = attention_head(a, blockIdx.x / query_blocks);
  const int64_t q0 = blockIdx.x % query_blocks * Tile::kQueries;
  const int tx = static_cast<int>(threadIdx.x) % X, row0 = static_cast<int>(threadIdx.x) / X * R;
  T* dquery = head_rows<T>(a.dquery, h.query + q0, a.dquery_stride, h.head, a.head_size);
  if (h.length == 0) {
    if (!a.first_only) return;
    for (int64_t d = threadIdx.x; d < a.head_size; d += Tile::kThreads) dquery[d] = T(0);
    return;
  }
  if (q0 >= h.queries) return;
  const int64_t rows = min_of(int64_t{Tile::kQueries}, h.queries - q0);
  const bool busy = static_cast<int>(threadIdx.x) / kWarp * (kWarp / X) * R < rows;

  load_tile<T, kHead, Tile::kQueries, Tile::kQueryStride, Tile::kThreads>(
      q_tile, head_rows<T>(a.query, h.query + q0, a.query_stride, h.head, a.head_size),
      a.query_stride, rows, a.head_size);
  load_tile<T, kHead, Tile::kQueries, Tile::kQueryStride, Tile::kThreads>(
      dout_tile, head_rows<T>(a.dout, h.query + q0, a.dout_stride, h.head, a.head_size),
      a.dout_stride, rows, a.head_size);
  // The keys block by block, and what each busy thread does with its share of one.
  const auto over_keys = [&](const auto& take) {
    for (int64_t k0 = 0; k0 < h.length; k0 += Tile::kKeys) {
      const int64_t keys = min_of(int64_t{Tile::kKeys}, h.length - k0);
      __syncthreads();  // the tiles have been read
      load_tile<T, kHead, Tile::kKeys, Tile::kKeyStride, Tile::kThreads>(
          k_tile, head_rows<T>(a.key, h.first + k0, a.key_stride, h.head, a.head_size),
          a.key_stride, keys, a.head_size);
      load_tile<T, kHead, Tile::kKeys, Tile::kKeyStride, Tile::kThreads>(
          v_tile, head_rows<T>(a.value, h.first + k0, a.value_stride, h.head, a.head_size),
          a.value_stride, keys, a.head_size);
      __syncthreads();
      if (!busy) continue;
      take(scores_again<Tile>(a, h, dropout, q_tile, dout_tile, k_tile, v_tile, q0, k0, row0, tx),
           keys);
    }
  };
  delta += h.head * h.all_queries + h.query + q0 + row0;
  T row_delta[R], one[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    row_delta[r] = row0 + r < rows ? delta[r] : T(0);
    one[r] = T(1);
  }
  if (h.length <= kShortLength) {
    T total[R] = {}, total_gradient[R] = {};
    over_keys([&](const Scores<T, R>& s, int64_t) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          total[r] += s.softmax[r][c];
          total_gradient[r] = fma(s.softmax[r][c], s.dprobability[r][c], total_gradient[r]);
        }
      }
    });
    if (busy) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const T gradient = sum_lanes(total_gradient[r], X), sum = sum_lanes(total[r], X);
        if (row0 + r >= rows) continue;
        row_delta[r] = gradient / sum;
        if (tx == 0) delta[r] = row_delta[r];  // for the gradients of the keys
      }
    }
  }
  T sum[R][kHead / X] = {};
  over_keys([&](const Scores<T, R>& s, int64_t keys) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      store_quad(dscores + (row0 + r) * Tile::kKeyStride + 4 * tx,
                 dscore(s, r, row_delta[r], scale));
    }
    __syncwarp();
    add_over_keys<Tile, T, kHead>(dscores + row0 * Tile::kKeyStride, k_tile + tx * Tile::kKeyStride,
                                  keys, a.head_size, one, sum);
  });
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (row0 + r >= rows) continue;
#pragma unroll
    for (int c = 0; c < kHead / X; ++c) {
      const int d = tx + c * X;
      if (d < a.head_size) dquery[(row0 + r) * a.dquery_stride + d] = sum[r][c];
    }
  }
}

// sum[j][c] += sum over queries of scores[query][key + j] * tile[d + c * kY][query], for `rows`
// queries (those up to a multiple of 4 have scores of 0); each block of queries apart.
template <class Tile, class T, int kHead>
__device__ __forceinline__ void add_over_queries(const T* scores, const T* tile, int64_t rows,
                                                 int64_t head_size, T (&sum)[4][kHead / Tile::kY]) {
#pragma unroll
  for (int c0 = 0; c0 < kHead / Tile::kY; c0 += 4) {
    if (c0 * Tile::kY >= head_size) break;
    T part[4][4] = {};
    for (int row = 0; row < rows; row += 4) {
      Quad<T> p[4], v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) p[i] = load_quad(scores + (row + i) * Tile::kKeyStride);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        v[c] = load_quad(tile + (c0 + c) * Tile::kY * Tile::kQueryStride + row);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
#pragma unroll
          for (int i = 0; i < 4; ++i) part[j][c] = fma(p[i].v[j], v[c].v[i], part[j][c]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[j][c0 + c] += part[j][c];
    }
  }
}

template <class T, int kHead>
__global__ void __launch_bounds__(AttentionTile<T, kHead>::kThreads, 1)
    attention_dkey_dvalue_kernel(AttentionBackward a, DropoutMask<T> dropout, const T* delta,
                                 int64_t key_blocks) {
  using Tile = AttentionTile<T, kHead>;
  constexpr int R = Tile::kThreadRows, X = Tile::kX, Y = Tile::kY;
  XLMR_SHARED(T, shared);
  T* q_tile = shared;
  T* dout_tile = q_tile + Tile::kQueryTile;
  T* k_tile = dout_tile + Tile::kQueryTile;
  T* v_tile = k_tile + Tile::kKeyTile;
  T* probabilities = v_tile + Tile::kKeyTile;
  T* dscores = probabilities + Tile::kScoreTile;
  const T scale = static_cast<T>(a.scale);

  const AttentionHead h = attention_head(a, blockIdx.x / key_blocks);
  const int64_t k0 = blockIdx.x % key_blocks * Tile::kKeys;
  if (k0 >= h.length) return;
  const int64_t keys = min_of(int64_t{Tile::kKeys}, h.length - k0);
  const int tx = static_cast<int>(threadIdx.x) % X, ty = static_cast<int>(threadIdx.x) / X;
  const int row0 = ty * R, warp_row0 = static_cast<int>(threadIdx.x) / kWarp * (kWarp / X) * R;
  load_tile<T, kHead, Tile::kKeys, Tile::kKeyStride, Tile::kThreads>(
      k_tile, head_rows<T>(a.key, h.first + k0, a.key_stride, h.head, a.head_size), a.key_stride,
      keys, a.head_size);
  load_tile<T, kHead, Tile::kKeys, Tile::kKeyStride, Tile::kThreads>(
      v_tile, head_rows<T>(a.value, h.first + k0, a.value_stride, h.head, a.head_size),
      a.value_stride, keys, a.head_size);
  delta += h.head * h.all_queries + h.query;
  T dkey[4][kHead / Y] = {}, dvalue[4][kHead / Y] = {};
  for (int64_t q0 = 0; q0 < h.queries; q0 += Tile::kQueries) {
    const int64_t rows = min_of(int64_t{Tile::kQueries}, h.queries - q0);
    __syncthreads();  // the tiles have been read
    load_tile<T, kHead, Tile::kQueries, Tile::kQueryStride, Tile::kThreads>(
        q_tile, head_rows<T>(a.query, h.query + q0, a.query_stride, h.head, a.head_size),
        a.query_stride, rows, a.head_size);
    load_tile<T, kHead, Tile::kQueries, Tile::kQueryStride, Tile::kThreads>(
        dout_tile, head_rows<T>(a.dout, h.query + q0, a.dout_stride, h.head, a.head_size),
        a.dout_stride, rows, a.head_size);
    __syncthreads();
    if (warp_row0 < rows) {
      const Scores<T, R> s =
          scores_again<Tile>(a, h, dropout, q_tile, dout_tile, k_tile, v_tile, q0, k0, row0, tx);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int at = (row0 + r) * Tile::kKeyStride + 4 * tx;
        const T row_delta = row0 + r < rows ? delta[q0 + row0 + r] : T(0);
        store_quad(probabilities + at,
                   Quad<T>{{s.dropped[r][0], s.dropped[r][1], s.dropped[r][2], s.dropped[r][3]}});
        store_quad(dscores + at, dscore(s, r, row_delta, scale));
      }
    }
    __syncthreads();
    add_over_queries<Tile, T, kHead>(probabilities + 4 * tx, dout_tile + ty * Tile::kQueryStride,
                                     rows, a.head_size, dvalue);
    add_over_queries<Tile, T, kHead>(dscores + 4 * tx, q_tile + ty * Tile::kQueryStride, rows,
                                     a.head_size, dkey);
  }
  T* dk = head_rows<T>(a.dkey, h.first + k0, a.dkv_stride, h.head, a.head_size);
  T* dv = head_rows<T>(a.dvalue, h.first + k0, a.dkv_stride, h.head, a.head_size);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (4 * tx + j >= keys) continue;
#pragma unroll
    for (int c = 0; c < kHead / Y; ++c) {
      const int d = ty + c * Y;
      if (d >= a.head_size) continue;
      dk[(4 * tx + j) * a.dkv_stride + d] = dkey[j][c];
      dv[(4 * tx + j) * a.dkv_stride + d] = dvalue[j][c];
    }
  }
}

template <class T, int kHead>
Status run_backward(const AttentionBackward& a, T* delta, const ExecContext& ctx) {
  using Tile = AttentionTile<T, kHead>;
  constexpr size_t dquery_shared = backward_shared<T, kHead>(1);
  constexpr size_t dkv_shared = backward_shared<T, kHead>(2);
  static_assert(dkv_shared <= kMostShared, "shared memory of attention backward");
  const DropoutMask<T> dropout(a.dropout);
  const int64_t heads = product(a.batch, a.num_heads);
  const int64_t query_blocks = a.first_only ? 1 : ceil_div(a.max_seqlen, Tile::kQueries);
  if (Status error = launch("attention_backward dquery", attention_dquery_kernel<T, kHead>,
                            product(heads, query_blocks), Tile::kThreads, dquery_shared, ctx, a,
                            dropout, delta, query_blocks)) {
    return error;
  }
  const int64_t key_blocks = ceil_div(a.max_seqlen, Tile::kKeys);
  return launch("attention_backward dkey dvalue", attention_dkey_dvalue_kernel<T, kHead>,
                product(heads, key_blocks), Tile::kThreads, dkv_shared, ctx, a, dropout, delta,
                key_blocks);
}

template <class T>
struct AttentionBackwardLauncher {
  int64_t queries;
  Wide<T>* delta;  // [num_heads, queries]

  AttentionBackwardLauncher(Workspace& space, const AttentionBackward& a)
      : queries(a.first_only ? a.batch : a.rows),
        delta(space.take<Wide<T>>(a.num_heads, queries)) {}

  Status run(const AttentionBackward& a, const ExecContext& ctx) const {
    if (Status error = check_head_size(a.head_size)) return error;
    if (Status error = launch("attention_backward delta", attention_delta_kernel<T>,
                              ceil_div(product(a.num_heads, queries), kDeltaWarps),
                              kDeltaWarps * kWarp, 0, ctx, a, queries, delta)) {
      return error;
    }
    if constexpr (kIs16Bits<T>) {
      return a.head_size <= 64 ? run_backward_mma<T, 64>(a, delta, ctx)
                               : run_backward_mma<T, 128>(a, delta, ctx);
    } else {
      return a.head_size <= 64 ? run_backward<T, 64>(a, delta, ctx)
                               : run_backward<T, 128>(a, delta, ctx);
    }
  }
};

}  // namespace

XLMR_DEFINE_OP(attention_backward, AttentionBackward, AttentionBackwardLauncher)

}  // namespace xlmr::XLMR_CUDA_NS
