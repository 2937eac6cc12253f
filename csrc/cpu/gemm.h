// The one matrix product of the CPU kernels: C[M, N] = sum over segments of A_s B_s, then an
// epilogue. A is packed once for all threads in panels of MR rows, B by each task in panels of NR
// columns; a register tile of MR x NR walks down k.
//
// Every element of C is one chain of fused multiply-adds in k order within blocks of kBlockK, the
// blocks added in order. The chain does not depend on M, on the tile, on the split of work or on
// the threads: a row has the same bits alone and in any batch. K is never split over threads.
#pragma once

#include "cpu/math.h"
#include "cpu/parallel_for.h"

namespace xlmr::XLMR_ISA {
namespace {

template <class T>
struct Tile {
  // MR: of 16 registers 12 are accumulators, 2 hold B and 1 A; of 32, 24 are accumulators.
  static constexpr int kRows = kVectorRegisters == 32 ? 12 : 6;
  static constexpr int kVectors = 2;                        // of one row
  static constexpr int kColumns = kVectors * Vec<T>::size;  // NR
};

constexpr int64_t kBlockK = 384;     // a panel of B (24 KiB in float32) stays in L1
constexpr int64_t kBlockRows = 192;  // of A, passed over by all panels of a task: 288 KiB, in L2
constexpr int64_t kBlockPanels = 6;  // panels of B in one task: 144 KiB, in L2
constexpr int64_t kPackBytes = 8 << 20;  // packed A, all threads together: in L3

// Element (i, j) of a matrix is data[i * row + j * column].
template <class T>
struct MatrixView {
  const T* data;
  int64_t row, column;
  MatrixView at(int64_t i, int64_t j) const { return {data + i * row + j * column, row, column}; }
  MatrixView transposed() const { return {data, column, row}; }
};

// How the micro-kernel reads the MR rows of A at step k.
enum class ALayout {
  panel,     // a[k * stride + i]: rows side by side (a packed panel: stride = MR)
  row_major  // a[i * stride + k]
};

// One register tile: out(i, j) (+)= sum_k A(i, k) B(k, j), kRows x NR of it. `rows` of them are
// real; in row_major layout the others repeat the last real one, in a panel they are whatever is
// there, to the end of a vector. Not inlined: each epilogue would bring a copy of its own.
template <int kRows, ALayout kLayout, class T>
__attribute__((noinline)) void multiply_rows(int64_t k_size, const T* a, int64_t a_stride,
                                             int64_t rows, const T* b, T* out, int64_t out_stride,
                                             bool add) {
  constexpr int NV = Tile<T>::kVectors, V = Vec<T>::size;
  constexpr bool by_lane = kFmaByLane && kLayout == ALayout::panel;
  Vec<T> acc[kRows][NV];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[i][v] = Vec<T>::zero();
  }
  const T* row[kRows];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    row[i] = kLayout == ALayout::row_major ? a + min_of<int64_t>(i, rows - 1) * a_stride : a + i;
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < k_size; ++k) {
    Vec<T> bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) bv[v] = Vec<T>::load(b + v * V);
    Vec<T> lanes[ceil_div(kRows, V)];
    if constexpr (by_lane) {
#pragma GCC unroll 16
      for (int i = 0; i < kRows; i += V) lanes[i / V] = Vec<T>::load(a + i);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> av(kLayout == ALayout::row_major ? row[i][k]
                      : by_lane                     ? lanes[i / V].lane(i % V)
                                                    : a[i]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[i][v] = fma(av, bv[v], acc[i][v]);
    }
    b += NV * V;
    if (kLayout == ALayout::panel) a += a_stride;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      T* dst = out + i * out_stride + v * V;
      (add ? Vec<T>::load(dst) + acc[i][v] : acc[i][v]).store(dst);
    }
  }
}

// A tile of 1 to MR rows, by the kernel with the fewest rows that holds them: the chain of an
// element is the same in each.
template <ALayout kLayout, class T>
XLMR_INLINE void multiply_tile(int64_t k_size, const T* a, int64_t a_stride, int64_t rows,
                               const T* b, T* out, int64_t out_stride, bool add) {
  constexpr int MR = Tile<T>::kRows;
  const auto kernel = rows > MR * 2 / 3 ? multiply_rows<MR, kLayout, T>
                      : rows > MR / 3   ? multiply_rows<MR * 2 / 3, kLayout, T>
                      : rows > 1        ? multiply_rows<MR / 3, kLayout, T>
                                        : multiply_rows<1, kLayout, T>;
  kernel(k_size, a, a_stride, rows, b, out, out_stride, add);
}

// Calls fn(vector, row, column offset, valid lanes) for the real part of a tile.
template <class T, class F>
XLMR_INLINE void for_each_vector(const T* tile, int64_t rows, int64_t columns, const F& fn) {
  constexpr int64_t NR = Tile<T>::kColumns, V = Vec<T>::size;
  const int64_t valid = min_of(NR, columns);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < valid; j += V) {
      fn(Vec<T>::load(tile + i * NR + j), i, j, min_of(V, valid - j));
    }
  }
}

template <class T>
XLMR_INLINE Vec<T> load_lanes(const T* p, int64_t lanes) {
  return lanes == Vec<T>::size ? Vec<T>::load(p) : Vec<T>::load(p, lanes);
}
template <class T>
XLMR_INLINE void store_lanes(T* p, Vec<T> value, int64_t lanes) {
  if (lanes == Vec<T>::size) {
    value.store(p);
  } else {
    value.store(p, lanes);
  }
}

// dst[k * kWidth + i] = m(i, k) for k < k_size, i < rows; 0 for rows <= i < kWidth. Packs a panel
// of A (kWidth = MR) or, with its matrix transposed, of B (kWidth = NR). Where one vector is wider
// than the panel, a store runs into the next k, which is written after it.
template <int kWidth, class T>
void pack_panel(MatrixView<T> m, int64_t rows, int64_t k_size, T* dst) {
  constexpr int V = Vec<T>::size;
  const auto write = [&](int64_t k, int i, Vec<T> x) {
    if (i + V <= kWidth || (kWidth < V && k + 1 < k_size)) {
      x.store(dst + k * kWidth + i);
    } else {
      x.store(dst + k * kWidth + i, kWidth - i);
    }
  };
  if (m.row == 1) {  // neighbours in i are neighbours in memory
    for (int64_t k = 0; k < k_size; ++k) {
      const T* src = m.data + k * m.column;
      for (int i = 0; i < kWidth; i += V) {
        const int64_t lanes = min_of<int64_t>(V, rows - i);
        write(k, i,
              lanes == V  ? Vec<T>::load(src + i)
              : lanes > 0 ? Vec<T>::load(src + i, lanes)
                          : Vec<T>::zero());
      }
    }
    return;
  }
  int64_t k = 0;
  if (m.column == 1) {  // neighbours in k are neighbours in memory: transpose V x V blocks
    for (; k + V <= k_size; k += V) {
      for (int i = 0; i < kWidth; i += V) {
        Vec<T> block[V];
#pragma GCC unroll 16
        for (int j = 0; j < V; ++j) {
          block[j] = i + j < kWidth && i + j < rows ? Vec<T>::load(m.data + (i + j) * m.row + k)
                                                    : Vec<T>::zero();
        }
        transpose(block);
#pragma GCC unroll 16
        for (int j = 0; j < V; ++j) write(k + j, i, block[j]);
      }
    }
  }
  for (; k < k_size; ++k) {
    for (int64_t i = 0; i < kWidth; ++i) {
      dst[k * kWidth + i] = i < rows ? m.data[i * m.row + k * m.column] : T(0);
    }
  }
}

// pack_panel over all columns of B, a K x N matrix; panel p lies at dst + p * k_size * NR.
template <class T>
void pack_b(MatrixView<T> b, int64_t k_size, int64_t columns, T* dst) {
  constexpr int NR = Tile<T>::kColumns;
  for (int64_t j = 0; j < columns; j += NR) {
    pack_panel<NR>(b.at(0, j).transposed(), min_of<int64_t>(NR, columns - j), k_size,
                   dst + j * k_size);
  }
}

template <class T>
struct Segment {
  MatrixView<T> a;  // M x k
  MatrixView<T> b;  // k x N
  int64_t k;
};

template <class T>
struct Product {
  int64_t rows, columns;
  int num_segments;
  Segment<T> segment[3];
  T* c;  // [M, N]; holds partial sums until the last block of k
  int64_t c_stride;
  const T* packed_b = nullptr;  // pack_b of the one segment's whole B, made beforehand; may be null

  int64_t k_total() const {
    int64_t k = 0;
    for (int s = 0; s < num_segments; ++s) k += segment[s].k;
    return k;
  }
};

// The workspace of gemm() for products of up to `rows` rows and `k` steps. An op's products run one
// after the other, so all their spaces lie in the same place, behind everything else: an op takes
// them last.
template <class T>
struct GemmSpace {
  T* a;                // one chunk of rows, packed
  int64_t chunk_rows;  // a multiple of MR
  T* b;                // per thread
  int64_t b_per_thread;

  GemmSpace(Workspace& space, const ExecContext& ctx, int64_t rows, int64_t k) {
    constexpr int64_t MR = Tile<T>::kRows, NR = Tile<T>::kColumns;
    const int64_t mark = space.mark();
    const int64_t fitting = kPackBytes / static_cast<int64_t>(sizeof(T)) / max_of<int64_t>(k, 1);
    const int64_t most = max_of<int64_t>(fitting / MR * MR, 32 * MR);
    chunk_rows = rows >= most ? most : round_up(max_of<int64_t>(rows, 1), MR);
    a = space.take<T>(chunk_rows, max_of<int64_t>(k, 1));
    b_per_thread = kBlockPanels * NR * kBlockK;
    b = space.take<T>(b_per_thread, ctx.num_threads);
    space.rewind(mark);
  }
};

// Products that share their A (q, k and v) or stand alone. Every product has the same rows and the
// same segments' A. epilogue(product, vector, row, column, lanes) receives each finished vector of
// C and returns what to store.
template <class T, class Epilogue>
void gemm(const ExecContext& ctx, const GemmSpace<T>& space, const Product<T>* products,
          int num_products, Epilogue&& epilogue) {
  constexpr int64_t MR = Tile<T>::kRows, NR = Tile<T>::kColumns;
  const Product<T>& first = products[0];
  const int64_t rows = first.rows, k_total = first.k_total();
  if (rows == 0 || first.columns == 0) return;

  int64_t total_panels = 0;
  for (int p = 0; p < num_products; ++p) total_panels += ceil_div(products[p].columns, NR);
  // Enough tasks to keep every thread busy to the end, none wider than L2 likes.
  const int64_t panels_per_task = max_of<int64_t>(
      1, min_of(kBlockPanels, ceil_div(total_panels, 4 * static_cast<int64_t>(ctx.num_threads))));
  int64_t tasks = 0, first_task[4] = {0, 0, 0, 0};
  for (int p = 0; p < num_products; ++p) {
    tasks += ceil_div(ceil_div(products[p].columns, NR), panels_per_task);
    first_task[p + 1] = tasks;
  }

  for (int64_t chunk = 0; chunk < rows; chunk += space.chunk_rows) {
    const int64_t chunk_rows = min_of(space.chunk_rows, rows - chunk);
    const int64_t panels = ceil_div(chunk_rows, MR);
    const int64_t padded_rows = panels * MR;

    // Packed A: block after block of k, in each the panels one behind the other.
    auto pack = [&](int64_t panel, int32_t) {
      const int64_t row = panel * MR;
      T* block = space.a;
      for (int s = 0; s < first.num_segments; ++s) {
        const Segment<T>& segment = first.segment[s];
        for (int64_t k = 0; k < segment.k; k += kBlockK) {
          const int64_t k_size = min_of(kBlockK, segment.k - k);
          T* dst = block + row * k_size;
          pack_panel<MR>(segment.a.at(chunk + row, k), min_of(MR, chunk_rows - row), k_size, dst);
          block += padded_rows * k_size;
        }
      }
    };
    parallel_for(ctx, panels, pack);

    auto columns_task = [&](int64_t task, int32_t thread) {
      int p = 0;
      while (task >= first_task[p + 1]) ++p;
      const Product<T>& product = products[p];
      const int64_t column = (task - first_task[p]) * panels_per_task * NR;
      const int64_t columns = min_of(panels_per_task * NR, product.columns - column);
      T* packed_b = space.b + thread * space.b_per_thread;
      const T* block = space.a;
      int64_t k_done = 0;
      for (int s = 0; s < product.num_segments; ++s) {
        const Segment<T>& segment = product.segment[s];
        for (int64_t k = 0; k < segment.k; k += kBlockK) {
          const int64_t k_size = min_of(kBlockK, segment.k - k);
          const bool is_first = k_done == 0;
          k_done += k_size;
          const bool is_last = k_done == k_total;
          // Panels of NR columns: those of this block of k, or of all k with this block inside.
          const T* panels_b = packed_b;
          int64_t panel_k = k_size;
          if (product.packed_b != nullptr) {
            panels_b = product.packed_b + column * k_total + k * NR;
            panel_k = k_total;
          } else {
            pack_b(segment.b.at(k, column), k_size, columns, packed_b);
          }
          for (int64_t begin = 0; begin < chunk_rows; begin += kBlockRows) {
            const int64_t end = min_of(chunk_rows, begin + kBlockRows);
            for (int64_t j = 0; j < columns; j += NR) {
              for (int64_t row = begin; row < end; row += MR) {
                const int64_t tile_rows = min_of(MR, end - row);
                const T* a_panel = block + row * k_size;
                const T* b_panel = panels_b + j * panel_k;
                T* c = product.c + (chunk + row) * product.c_stride + column + j;
                if (!is_last && tile_rows == MR && columns - j >= NR) {
                  multiply_tile<ALayout::panel>(k_size, a_panel, MR, tile_rows, b_panel, c,
                                                product.c_stride, !is_first);
                  continue;
                }
                alignas(64) T tile[MR * NR];
                multiply_tile<ALayout::panel>(k_size, a_panel, MR, tile_rows, b_panel, tile, NR,
                                              false);
                for_each_vector(tile, tile_rows, columns - j,
                                [&](Vec<T> x, int64_t i, int64_t at, int64_t lanes) {
                                  T* dst = c + i * product.c_stride + at;
                                  if (!is_first) x = load_lanes(dst, lanes) + x;
                                  if (is_last) {
                                    x = epilogue(p, x, chunk + row + i, column + j + at, lanes);
                                  }
                                  store_lanes(dst, x, lanes);
                                });
              }
            }
          }
          block += padded_rows * k_size;
        }
      }
    };
    parallel_for(ctx, tasks, columns_task);
  }
}

template <class T>
void fill_zero(T* p, int64_t n) {
  if (n > 0) memset(static_cast<void*>(p), 0, static_cast<size_t>(n) * sizeof(T));
}

// dW[out, in] = dz^T x, the sum over rows in their order; zero for an empty batch.
template <class T>
void weight_gradient(const ExecContext& ctx, const GemmSpace<T>& space, int64_t rows,
                     MatrixView<T> dz, int64_t out_features, MatrixView<T> x, int64_t in_features,
                     T* dweight) {
  if (rows == 0) return fill_zero(dweight, out_features * in_features);
  const Product<T> product = {out_features, in_features, 1, {{dz.transposed(), x, rows}},
                              dweight,      in_features};
  gemm(ctx, space, &product, 1, [](int, Vec<T> v, int64_t, int64_t, int64_t) { return v; });
}

}  // namespace
}  // namespace xlmr::XLMR_ISA
