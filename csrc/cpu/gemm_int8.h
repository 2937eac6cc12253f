// The one product of 8-bit weights: y[M, N] = the sum over k of quantised x and w, exact in int32,
// then an epilogue in float32. Rows are quantised once, the weights lie packed
// (core/int8_layout.h), and a register tile of kRows rows walks down all of k: there is nothing to
// add up between blocks, and no order of sums to keep.
#pragma once

#include "cpu/dot_int8.h"
#include "cpu/gemm.h"
#include "cpu/reduce.h"

namespace xlmr::XLMR_ISA {
namespace {

constexpr int64_t kGroup = 16;  // values of a row that lie side by side, then come the next row's
constexpr int64_t kInt8Columns = Dot::kVectors * Dot::kChannels;  // of a register tile
constexpr int64_t kTilePanels = max_of<int64_t>(kInt8Columns / kInt8Channels, 1);
constexpr int64_t kInt8RowBytes = 384 << 10;  // a task's rows, passed over by its panels: in L2
constexpr int64_t kInt8ChunkBytes = 8 << 20;  // quantised rows of all threads together: in L3
constexpr int64_t kSerialValues = 16 << 10;   // quantised by one thread sooner than shared out
constexpr int64_t kTasksPerThread = 4;        // at least, where there are columns enough

struct Int8Weight {
  const int8_t* q;
  const float* scale;
  const int32_t* sum;
  int64_t steps;  // of 4 values of k

  Int8Weight(const void* packed, int64_t out, int64_t in) : steps(ceil_div(in, kInt8Depth)) {
    const int64_t channels = round_up(out, kInt8Channels);
    q = static_cast<const int8_t*>(packed);
    scale = reinterpret_cast<const float*>(q + channels * steps * kInt8Depth);
    sum = reinterpret_cast<const int32_t*>(scale + channels);
  }
  int64_t panel_bytes() const { return steps * kInt8Channels * kInt8Depth; }
  // Where the weights of a channel begin.
  const int8_t* at(int64_t channel) const {
    return q + channel / kInt8Channels * panel_bytes() + channel % kInt8Channels * kInt8Depth;
  }
};

// Rows are cut into tiles as even as can be: 13 rows are 7 and 6, not 12 and 1.
struct RowTiles {
  int64_t count, rows, longer;  // the first `longer` tiles have one row more

  explicit RowTiles(int64_t total)
      : count(ceil_div(total, Dot::kRows)),
        rows(count > 0 ? total / count : 0),
        longer(count > 0 ? total % count : 0) {}
  int64_t begin(int64_t tile) const { return tile * rows + min_of(tile, longer); }
  int64_t size(int64_t tile) const { return rows + (tile < longer ? 1 : 0); }
};

// One register tile of kRows rows, all of them real: out[i][j] = sum over k. `a` holds groups of
// kGroup values, a row's after the other's. What lies `ahead` bytes behind the weights is fetched
// into L2: few rows are bound by memory, and the hardware's own prefetching ends with a panel. Not
// inlined: each epilogue would bring a copy.
template <int kRows, int kVectors>
__attribute__((noinline)) void multiply_int8(int64_t steps, const Dot::Activation* a,
                                             const int8_t* b, int64_t panel_bytes, int64_t ahead,
                                             const int32_t* sum, int32_t* out) {
  constexpr int C = Dot::kChannels;
  constexpr int64_t kSteps = kGroup / kInt8Depth;
  typename Dot::Sum acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[i][v] = Dot::start(sum + v * C);
  }
  const auto step = [&](const Dot::Activation* a_step, const int8_t* b_step) {
    __builtin_prefetch(b_step + ahead, 0, 2);
    typename Dot::Weights w[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      w[v] = Dot::load(b_step + v * C / kInt8Channels * panel_bytes +
                       v * C % kInt8Channels * kInt8Depth);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const auto values = Dot::broadcast(a_step + i * kGroup);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[i][v] = Dot::dot(acc[i][v], values, w[v]);
    }
  };
  constexpr int64_t kStepBytes = kInt8Channels * kInt8Depth;
  for (; steps >= kSteps; steps -= kSteps) {
#pragma GCC unroll 4
    for (int64_t s = 0; s < kSteps; ++s) step(a + s * kInt8Depth, b + s * kStepBytes);
    a += kRows * kGroup;
    b += kSteps * kStepBytes;
  }
  for (int64_t s = 0; s < steps; ++s) step(a + s * kInt8Depth, b + s * kStepBytes);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) Dot::store(acc[i], out + i * kVectors * C);
}

using Int8Kernel = void (*)(int64_t, const Dot::Activation*, const int8_t*, int64_t, int64_t,
                            const int32_t*, int32_t*);

template <int kVectors, int kRows = Dot::kRows>
XLMR_INLINE Int8Kernel int8_kernel(int64_t rows) {
  if constexpr (kRows == 1) {
    return multiply_int8<1, kVectors>;
  } else {
    return rows == kRows ? multiply_int8<kRows, kVectors> : int8_kernel<kVectors, kRows - 1>(rows);
  }
}

// A row's values are centre + scale * q, with q in [-127, 127].
struct RowScale {
  float scale, centre;
};

// Quantised rows, and the workspace for up to `rows` rows of `k` values. An op's products run one
// after the other, so all their spaces lie in the same place: an op takes them last.
struct Int8Space {
  Dot::Activation* q;  // tile after tile, each of its rows in groups of k
  RowScale* scale;     // [rows]
  int64_t row_values;  // k, padded to whole groups
  int64_t row_bytes;
  int64_t chunk_rows;

  Int8Space(Workspace& space, int64_t rows, int64_t k)
      : row_values(round_up(k, kGroup)),
        row_bytes(product(row_values, sizeof(Dot::Activation))),
        chunk_rows(min_of(max_of<int64_t>(rows, 1),
                          max_of<int64_t>(kInt8ChunkBytes / max_of<int64_t>(row_bytes, 1), 64))) {
    const int64_t mark = space.mark();
    q = space.take<Dot::Activation>(chunk_rows, row_values);
    scale = space.take<RowScale>(chunk_rows);
    space.rewind(mark);
  }
};

// Half a range below this has no reciprocal times 127; the row counts as its centre throughout.
constexpr float kSmallestRange = 0x1p-100f;

// Lanes past the end of a row repeat its last value: that changes neither extreme, and they meet
// weights of zero.
XLMR_INLINE Vec<float> load_repeating(const float* x, int64_t lanes) {
  constexpr int64_t V = Vec<float>::size;
  if (lanes >= V) return Vec<float>::load(x);
  float filled[V];
  for (int64_t i = 0; i < V; ++i) filled[i] = x[min_of(i, lanes - 1)];
  return Vec<float>::load(filled);
}

// One row into `dst`, whose groups lie `stride` values apart.
XLMR_INLINE RowScale quantize_row(int64_t k, const float* x, Dot::Activation* dst, int64_t stride) {
  constexpr int64_t V = Vec<float>::size, kChains = 4;
  // `strange` becomes NaN by NaN and by infinity.
  Vec<float> high[kChains], low[kChains], strange[kChains];
  for (int u = 0; u < kChains; ++u) {
    high[u] = low[u] = Vec<float>(x[0]);
    strange[u] = Vec<float>::zero();
  }
  const auto look = [&](int u, Vec<float> v) {
    high[u] = max(v, high[u]);
    low[u] = min(v, low[u]);
    strange[u] = fma(v, Vec<float>::zero(), strange[u]);
  };
  int64_t j = 0;
  for (; j + kChains * V <= k; j += kChains * V) {
#pragma GCC unroll 4
    for (int u = 0; u < kChains; ++u) look(u, Vec<float>::load(x + j + u * V));
  }
  for (; j < k; j += V) look(0, load_repeating(x + j, k - j));
  const bool finite = reduce_add((strange[0] + strange[1]) + (strange[2] + strange[3])) == 0.0f;
  const Vec<float> top = max(max(high[0], high[1]), max(high[2], high[3]));
  const Vec<float> bottom = min(min(low[0], low[1]), min(low[2], low[3]));
  const float highest = finite ? reduce_max(top) : 0.0f;
  const float lowest = finite ? -reduce_max(Vec<float>::zero() - bottom) : 0.0f;
  // Halves first: the range of finite values need not be finite.
  const float centre = 0.5f * highest + 0.5f * lowest, range = 0.5f * highest - 0.5f * lowest;
  const bool flat = range < kSmallestRange;
  const Vec<float> factor(flat ? 0.0f : 127.0f / range), middle(centre);
  const auto write = [&](int64_t at, Vec<float> v) {
    quantize(flat ? Vec<float>::zero() : v - middle, factor,
             dst + at / kGroup * stride + at % kGroup);
  };
  int64_t at = 0;
  for (; at + V <= k; at += V) write(at, Vec<float>::load(x + at));
  if (at < k) write(at, load_repeating(x + at, k - at));
  return {!finite ? __builtin_nanf("") : flat ? 0.0f : range / 127.0f, centre};
}

// y = epilogue(x W^T). epilogue(vector, row, column, lanes) receives each finished vector and
// returns what to store.
template <class Epilogue>
void gemm_int8(const ExecContext& ctx, const Int8Space& space, int64_t rows, int64_t k,
               const float* x, int64_t x_stride, const Int8Weight& w, int64_t columns, float* y,
               int64_t y_stride, const Epilogue& epilogue) {
  if (columns == 0) return;
  constexpr int64_t V = Vec<float>::size, NR = kInt8Columns;
  for (int64_t chunk = 0; chunk < rows; chunk += space.chunk_rows) {
    const int64_t chunk_rows = min_of(space.chunk_rows, rows - chunk);
    const RowTiles tiles(chunk_rows);
    auto quantize_tile = [&](int64_t tile, int32_t) {
      const int64_t begin = tiles.begin(tile), size = tiles.size(tile);
      for (int64_t i = 0; i < size; ++i) {
        space.scale[begin + i] =
            quantize_row(k, x + (chunk + begin + i) * x_stride,
                         space.q + begin * space.row_values + i * kGroup, size * kGroup);
      }
    };
    ExecContext few = ctx;
    if (chunk_rows * k <= kSerialValues) few.num_threads = 1;
    parallel_for(few, tiles.count, quantize_tile);

    // Tasks of some row tiles by some column tiles, so many, and a multiple of the threads, that
    // every thread is busy to the end.
    const int64_t column_tiles = ceil_div(columns, NR), threads = ctx.num_threads;
    const int64_t fitting = max_of<int64_t>(kInt8RowBytes / space.row_bytes / Dot::kRows, 1);
    const int64_t task_tiles = ceil_div(tiles.count, ceil_div(tiles.count, fitting));
    const int64_t row_tasks = ceil_div(tiles.count, task_tiles);
    const int64_t wanted = round_up(ceil_div(kTasksPerThread * threads, row_tasks), threads);
    const int64_t task_columns = ceil_div(column_tiles, min_of(wanted, column_tiles)) * NR;
    const int64_t column_tasks = ceil_div(columns, task_columns);
    auto multiply = [=](int64_t task, int32_t) {
      const int64_t first_tile = task / column_tasks * task_tiles;
      const int64_t last_tile = min_of(tiles.count, first_tile + task_tiles);
      const int64_t first_column = task % column_tasks * task_columns;
      const int64_t last_column = min_of(columns, first_column + task_columns);
      for (int64_t column = first_column; column < last_column; column += NR) {
        const int64_t valid = min_of(NR, last_column - column);
        // Half a tile where the weights end within it.
        const bool half = NR > kInt8Channels && valid <= kInt8Channels;
        const int64_t width = half ? NR / 2 : NR;
        for (int64_t tile = first_tile; tile < last_tile; ++tile) {
          const int64_t begin = tiles.begin(tile), size = tiles.size(tile),
                        done = tile - first_tile;
          const bool more = column + NR < last_column && done < kTilePanels;
          const int64_t ahead = more ? (kTilePanels + done) * w.panel_bytes() : 0;
          alignas(64) int32_t sums[Dot::kRows * NR];
          const Int8Kernel kernel = half ? int8_kernel<max_of(Dot::kVectors / 2, 1)>(size)
                                         : int8_kernel<Dot::kVectors>(size);
          kernel(w.steps, space.q + begin * space.row_values, w.at(column), w.panel_bytes(), ahead,
                 w.sum + column, sums);
          const RowScale* row = space.scale + begin;
          for (int64_t j = 0; j < valid; j += V) {
            const int64_t at = column + j, lanes = min_of(V, valid - j);
            const Vec<float> scale = Vec<float>::load(w.scale + at);
            const Vec<float> sum = scale * to_float(w.sum + at);
            float* dst = y + (chunk + begin) * y_stride + at;
            for (int64_t i = 0; i < size; ++i, dst += y_stride) {
              const Vec<float> z =
                  to_float(sums + i * width + j) * (Vec<float>(row[i].scale) * scale) +
                  Vec<float>(row[i].centre) * sum;
              store_lanes(dst, epilogue(z, chunk + begin + i, at, lanes), lanes);
            }
          }
        }
      }
    };
    parallel_for(ctx, row_tasks * column_tasks, multiply);
  }
}

}  // namespace
}  // namespace xlmr::XLMR_ISA
