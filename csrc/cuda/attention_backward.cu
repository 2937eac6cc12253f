// The gradients of attention: delta = rowsum(dO * O) row by row, then dQ by blocks of queries and
// dK, dV by blocks of keys. Scores are computed again in both, so no two blocks add to one element,
// and every sum has one order.
#include "cuda/attention.cuh"
#include "cuda/kernels.cuh"

namespace xlmr::XLMR_CUDA_NS {
namespace {

constexpr int kDeltaWarps = 4;

// A warp for a row of a head.
template <class T>
__global__ void __launch_bounds__(kDeltaWarps* kWarp)
    attention_delta_kernel(AttentionBackward a, int64_t queries, T* delta) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kDeltaWarps + threadIdx.x / kWarp;
  if (index >= a.num_heads * queries) return;
  const int64_t head = index / queries, row = index % queries;
  const T* dout = head_rows<T>(a.dout, row, a.dout_stride, head, a.head_size);
  const T* out = head_rows<T>(a.out, row, a.out_stride, head, a.head_size);
  T sum = 0;
  for (int64_t d = lane; d < a.head_size; d += kWarp) sum = fma(dout[d], out[d], sum);
  sum = sum_lanes(sum);
  if (lane == 0) delta[index] = sum;
}

// What a thread's share of a score tile became.
template <class T, int kThreadRows>
struct ScoreGradient {
  T probability[kThreadRows][4];  // after dropout
  T dscore[kThreadRows][4];
};

// P and dS of kThreadRows queries from q0 + row0 and 4 keys from k0 + 4 tx; 0 where there is no
// such query or key.
template <class Tile, class T>
__device__ __forceinline__ ScoreGradient<T, Tile::kThreadRows> score_gradient(
    const AttentionBackward& a, const AttentionHead& h, const DropoutMask<T>& dropout,
    const T* delta, const T* q_tile, const T* dout_tile, const T* k_tile, const T* v_tile,
    int64_t q0, int64_t k0, int row0, int tx) {
  constexpr int R = Tile::kThreadRows;
  ScoreGradient<T, R> g;
  dot_rows<T, R, Tile::kQueryStride, Tile::kKeyStride>(q_tile + row0, k_tile + 4 * tx, a.head_size,
                                                       g.probability);
  dot_rows<T, R, Tile::kQueryStride, Tile::kKeyStride>(dout_tile + row0, v_tile + 4 * tx,
                                                       a.head_size, g.dscore);
  const T scale = static_cast<T>(a.scale);
  const int64_t base = h.head * h.all_queries + h.query;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t row = q0 + row0 + r;
    const bool asks = row < h.queries;
    const T lse = asks ? static_cast<const T*>(a.lse)[base + row] : T(0);
    const T row_delta = asks ? delta[base + row] : T(0);
    const Quad<T> factor = dropout.factors(h.head, h.first + row, k0 / 4 + tx);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const bool there = asks && k0 + 4 * tx + c < h.length;
      const T p = there ? exp(g.probability[r][c] * scale - lse) : T(0);
      g.dscore[r][c] =
          there ? p * (g.dscore[r][c] * factor.v[c] - row_delta) * scale : T(0);
      g.probability[r][c] = p * factor.v[c];
    }
  }
  return g;
}

template <class T, int kHead>
constexpr size_t backward_shared(int score_tiles) {
  using Tile = AttentionTile<T, kHead>;
  return sizeof(T) * (2 * Tile::kQueryTile + 2 * Tile::kKeyTile + score_tiles * Tile::kScoreTile);
}

template <class T, int kHead>
__global__ void __launch_bounds__(AttentionTile<T, kHead>::kThreads, 1)
    attention_dquery_kernel(AttentionBackward a, DropoutMask<T> dropout, const T* delta,
                            int64_t query_blocks) {
  using Tile = AttentionTile<T, kHead>;
  constexpr int R = Tile::kThreadRows, X = Tile::kX;
  XLMR_SHARED(T, shared);
  T* q_tile = shared;
  T* dout_tile = q_tile + Tile::kQueryTile;
  T* k_tile = dout_tile + Tile::kQueryTile;
  T* v_tile = k_tile + Tile::kKeyTile;
  T* dscores = v_tile + Tile::kKeyTile;

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
  T sum[R][kHead / X] = {}, one[R];
#pragma unroll
  for (int r = 0; r < R; ++r) one[r] = T(1);
  for (int64_t k0 = 0; k0 < h.length; k0 += Tile::kKeys) {
    const int64_t keys = min_of(int64_t{Tile::kKeys}, h.length - k0);
    __syncthreads();  // the tiles have been read
    load_tile<T, kHead, Tile::kKeys, Tile::kKeyStride, Tile::kThreads>(
        k_tile, head_rows<T>(a.key, h.first + k0, a.key_stride, h.head, a.head_size), a.key_stride,
        keys, a.head_size);
    load_tile<T, kHead, Tile::kKeys, Tile::kKeyStride, Tile::kThreads>(
        v_tile, head_rows<T>(a.value, h.first + k0, a.value_stride, h.head, a.head_size),
        a.value_stride, keys, a.head_size);
    __syncthreads();
    if (!busy) continue;
    const auto g = score_gradient<Tile>(a, h, dropout, delta, q_tile, dout_tile, k_tile, v_tile, q0,
                                        k0, row0, tx);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const Quad<T> row = {{g.dscore[r][0], g.dscore[r][1], g.dscore[r][2], g.dscore[r][3]}};
      store_quad(dscores + (row0 + r) * Tile::kKeyStride + 4 * tx, row);
    }
    __syncwarp();
    add_over_keys<Tile, T, kHead>(dscores + row0 * Tile::kKeyStride,
                                  k_tile + tx * Tile::kKeyStride, keys, a.head_size, one, sum);
  }
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
                                                 int64_t head_size,
                                                 T (&sum)[4][kHead / Tile::kY]) {
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
      const auto g = score_gradient<Tile>(a, h, dropout, delta, q_tile, dout_tile, k_tile, v_tile,
                                          q0, k0, row0, tx);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int at = (row0 + r) * Tile::kKeyStride + 4 * tx;
        store_quad(probabilities + at, Quad<T>{{g.probability[r][0], g.probability[r][1],
                                                g.probability[r][2], g.probability[r][3]}});
        store_quad(dscores + at, Quad<T>{{g.dscore[r][0], g.dscore[r][1], g.dscore[r][2],
                                          g.dscore[r][3]}});
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
Status run_backward(const AttentionBackward& a, const T* delta, const ExecContext& ctx) {
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
  T* delta;  // [num_heads, queries]

  AttentionBackwardLauncher(Workspace& space, const AttentionBackward& a)
      : queries(a.first_only ? a.batch : a.rows), delta(space.take<T>(a.num_heads, queries)) {}

  Status run(const AttentionBackward& a, const ExecContext& ctx) const {
    if (Status error = check_head_size(a.head_size)) return error;
    if (Status error = launch("attention_backward delta", attention_delta_kernel<T>,
                              ceil_div(product(a.num_heads, queries), kDeltaWarps),
                              kDeltaWarps * kWarp, 0, ctx, a, queries, delta)) {
      return error;
    }
    return a.head_size <= 64 ? run_backward<T, 64>(a, delta, ctx)
                             : run_backward<T, 128>(a, delta, ctx);
  }
};

}  // namespace

XLMR_DEFINE_OP(attention_backward, AttentionBackward, AttentionBackwardLauncher)

}  // namespace xlmr::XLMR_CUDA_NS
