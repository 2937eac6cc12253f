// out = softmax(scale Q K^T) V over packed sequences: in 16 bits on tensor cores
// (attention_forward_mma.cuh), else by fused multiply-add as here. A block has a block of queries
// of one head of one sequence and goes over the keys; scores exist as one tile in shared memory.
// Key blocks start at the sequence's start, so a row's bits depend on its sequence alone.
#include "cuda/attention.cuh"
#include "cuda/attention_forward_mma.cuh"
#include "cuda/kernels.cuh"

namespace xlmr::XLMR_CUDA_NS {
namespace {

template <class T, int kHead>
constexpr size_t forward_shared() {
  using Tile = AttentionTile<T, kHead>;
  return sizeof(T) * (Tile::kQueryTile + 2 * Tile::kKeyTile + Tile::kScoreTile);
}

template <class T, int kHead>
__global__ void __launch_bounds__(AttentionTile<T, kHead>::kThreads, 1)
    attention_forward_kernel(AttentionForward a, DropoutMask<T> dropout, int64_t query_blocks) {
  using Tile = AttentionTile<T, kHead>;
  constexpr int R = Tile::kThreadRows, X = Tile::kX;
  XLMR_SHARED(T, shared);
  T* q_tile = shared;
  T* k_tile = q_tile + Tile::kQueryTile;
  T* v_tile = k_tile + Tile::kKeyTile;
  T* scores = v_tile + Tile::kKeyTile;

  const AttentionHead h = attention_head(a, blockIdx.x / query_blocks);
  const int64_t q0 = blockIdx.x % query_blocks * Tile::kQueries;
  const int tx = static_cast<int>(threadIdx.x) % X, row0 = static_cast<int>(threadIdx.x) / X * R;
  T* out = head_rows<T>(a.out, h.query + q0, a.out_stride, h.head, a.head_size);
  T* lse =
      a.lse == nullptr ? nullptr : static_cast<T*>(a.lse) + h.head * h.all_queries + h.query + q0;
  if (h.length == 0) {  // a sequence without tokens has a row here where only first tokens ask
    if (!a.first_only) return;
    for (int64_t d = threadIdx.x; d < a.head_size; d += Tile::kThreads) out[d] = T(0);
    if (threadIdx.x == 0 && lse != nullptr) *lse = T(0);
    return;
  }
  if (q0 >= h.queries) return;
  const int64_t rows = min_of(int64_t{Tile::kQueries}, h.queries - q0);
  // Warps whose rows all lie behind the last one have nothing to compute.
  const bool busy = static_cast<int>(threadIdx.x) / kWarp * (kWarp / X) * R < rows;

  load_tile<T, kHead, Tile::kQueries, Tile::kQueryStride, Tile::kThreads>(
      q_tile, head_rows<T>(a.query, h.query + q0, a.query_stride, h.head, a.head_size),
      a.query_stride, rows, a.head_size);
  const T scale = static_cast<T>(a.scale);
  T sum[R][kHead / X] = {};
  T running_max[R], running_sum[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    running_max[r] = static_cast<T>(-INFINITY);
    running_sum[r] = T(0);
  }
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
    T s[R][4], rescale[R];
    dot_rows<T, R, Tile::kQueryStride, Tile::kKeyStride>(q_tile + row0, k_tile + 4 * tx,
                                                         a.head_size, s);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      T largest = running_max[r];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        s[r][c] = 4 * tx + c < keys ? s[r][c] * scale : static_cast<T>(-INFINITY);
        largest = fmax(largest, s[r][c]);
      }
      largest = max_lanes(largest, X);
      T total = 0;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        s[r][c] = exp(s[r][c] - largest);
        total += s[r][c];
      }
      rescale[r] = exp(running_max[r] - largest);
      running_sum[r] = fma(running_sum[r], rescale[r], sum_lanes(total, X));
      running_max[r] = largest;
      Quad<T> p = dropout.factors(h.head, h.first + q0 + row0 + r, k0 / 4 + tx);
#pragma unroll
      for (int c = 0; c < 4; ++c) p.v[c] *= s[r][c];
      store_quad(scores + (row0 + r) * Tile::kKeyStride + 4 * tx, p);
    }
    __syncwarp();
    add_over_keys<Tile, T, kHead>(scores + row0 * Tile::kKeyStride, v_tile + tx * Tile::kKeyStride,
                                  keys, a.head_size, rescale, sum);
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (row0 + r >= rows) continue;
    const T inverse = T(1) / running_sum[r];
#pragma unroll
    for (int c = 0; c < kHead / X; ++c) {
      const int d = tx + c * X;
      if (d < a.head_size) out[(row0 + r) * a.out_stride + d] = sum[r][c] * inverse;
    }
    if (tx == 0 && lse != nullptr) lse[row0 + r] = running_max[r] + log(running_sum[r]);
  }
}

template <class T, int kHead>
Status run_forward(const AttentionForward& a, const ExecContext& ctx) {
  using Tile = AttentionTile<T, kHead>;
  constexpr size_t shared = forward_shared<T, kHead>();
  static_assert(shared <= kMostShared, "shared memory of attention forward");
  const int64_t query_blocks = a.first_only ? 1 : ceil_div(a.max_seqlen, Tile::kQueries);
  const int64_t blocks = product(product(a.batch, a.num_heads), query_blocks);
  return launch("attention_forward", attention_forward_kernel<T, kHead>, blocks, Tile::kThreads,
                shared, ctx, a, DropoutMask<T>(a.dropout), query_blocks);
}

template <class T>
struct AttentionForwardLauncher {
  AttentionForwardLauncher(Workspace&, const AttentionForward&) {}

  Status run(const AttentionForward& a, const ExecContext& ctx) const {
    if (Status error = check_head_size(a.head_size)) return error;
    if constexpr (kIs16Bits<T>) {
      return a.head_size <= 64 ? run_forward_mma<T, 64>(a, ctx) : run_forward_mma<T, 128>(a, ctx);
    } else {
      return a.head_size <= 64 ? run_forward<T, 64>(a, ctx) : run_forward<T, 128>(a, ctx);
    }
  }
};

}  // namespace

XLMR_DEFINE_OP(attention_forward, AttentionForward, AttentionForwardLauncher)

}  // namespace xlmr::XLMR_CUDA_NS
