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

// Sizes in elements; the caches meant are those of float32 on a core with 32 KiB and 512 KiB.
constexpr int64_t kBlockK = 192;          // a panel of B (12 KiB) in L1; longer chains round more
constexpr int64_t kBlockRows = 192;       // of A, passed over by all panels of a task: in L2
constexpr int64_t kBlockColumns = 96;     // of B in one task: in L2 beside the sums of the block
constexpr int64_t kSpanK = 16 * kBlockK;  // of a B that a task packs for itself
constexpr int64_t kPackBytes = 8 << 20;   // packed A, all threads together: in L3

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
  panel,         // packed: a[k * MR + i], the next panel behind it
  column_major,  // a[k * stride + i]
  row_major      // a[i * stride + k]
};

// What a tile asks the caches for while it is computed: from `at`, `step` bytes further at each k.
struct LookAhead {
  const char* at;
  int64_t step;
};

// One register tile: out(i, j) (+)= sum_k A(i, k) B(k, j), kRows x NR of it. `rows` of them are
// real; in row_major layout the others repeat the last real one, otherwise they are whatever is
// there, to the end of a vector. Not inlined: each epilogue would bring a copy of its own. Bound by
// the multipliers as long as both panels arrive in time, hence the prefetches.
template <int kRows, ALayout kLayout, class T>
__attribute__((noinline)) void multiply_rows(int64_t k_size, const T* a, int64_t a_stride,
                                             int64_t rows, const T* b, T* out, int64_t out_stride,
                                             bool add, LookAhead ahead) {
  constexpr int NV = Tile<T>::kVectors, V = Vec<T>::size;
  constexpr bool by_lane = kFmaByLane && kLayout != ALayout::row_major;
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
  const int64_t next_panel = k_size * a_stride;
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
    if (kLayout != ALayout::row_major) a += a_stride;
    if (kLayout == ALayout::panel) {
      __builtin_prefetch(a + next_panel);
      __builtin_prefetch(ahead.at);
      ahead.at += ahead.step;
    }
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
                               const T* b, T* out, int64_t out_stride, bool add,
                               LookAhead ahead = {nullptr, 0}) {
  constexpr int MR = Tile<T>::kRows;
  const auto kernel = rows > MR * 2 / 3 ? multiply_rows<MR, kLayout, T>
                      : rows > MR / 3   ? multiply_rows<MR * 2 / 3, kLayout, T>
                      : rows > 1        ? multiply_rows<MR / 3, kLayout, T>
                                        : multiply_rows<1, kLayout, T>;
  kernel(k_size, a, a_stride, rows, b, out, out_stride, add, ahead);
}

// Calls fn(row, column, valid lanes) for every vector of the real part of a tile. The bounds of a
// whole tile are constants.
template <class T, class F>
XLMR_INLINE void for_each_vector(int64_t rows, int64_t columns, const F& fn) {
  constexpr int64_t MR = Tile<T>::kRows, NR = Tile<T>::kColumns, V = Vec<T>::size;
  if (rows == MR && columns >= NR) {
    for (int64_t i = 0; i < MR; ++i) {
#pragma GCC unroll 4
      for (int64_t j = 0; j < NR; j += V) fn(i, j, V);
    }
    return;
  }
  const int64_t valid = min_of(NR, columns);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < valid; j += V) fn(i, j, min_of(V, valid - j));
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
  T* c;  // [M, N]; holds the sums between two spans of k, where there are several
  int64_t c_stride;
  const T* packed_b = nullptr;  // pack_b of the one segment's whole B, made beforehand; may be null

  int64_t k_total() const {
    int64_t k = 0;
    for (int s = 0; s < num_segments; ++s) k += segment[s].k;
    return k;
  }
};

// Steps [k, k + size) of one segment: a link of every element's chain.
template <class T>
struct BlockOfK {
  const Product<T>* product;
  int segment = 0;
  int64_t k = 0;

  bool end() const { return segment == product->num_segments; }
  int64_t size() const { return min_of(kBlockK, product->segment[segment].k - k); }
  void advance() {
    k += size();
    for (; !end() && k == product->segment[segment].k; ++segment) k = 0;
  }
};

// The workspace of gemm() for products of up to `rows` rows and `k` steps. An op's products run one
// after the other, so all their spaces lie in the same place, behind everything else: an op takes
// them last.
template <class T>
struct GemmSpace {
  T* a;                // one chunk of rows, packed
  int64_t chunk_rows;  // a multiple of MR
  T* b;                // per thread: a span of the task's columns, packed
  int64_t b_per_thread;
  T* sums;  // per thread: a block of rows by the columns of a task, tile after tile
  static constexpr int64_t kSums = kBlockRows * kBlockColumns;

  GemmSpace(Workspace& space, const ExecContext& ctx, int64_t rows, int64_t k,
            bool is_packed = false) {
    constexpr int64_t MR = Tile<T>::kRows;
    static_assert(kBlockRows % MR == 0 && kBlockColumns % Tile<T>::kColumns == 0);
    const int64_t mark = space.mark();
    const int64_t fitting = kPackBytes / static_cast<int64_t>(sizeof(T)) / max_of<int64_t>(k, 1);
    const int64_t most = max_of<int64_t>(fitting / MR * MR, 32 * MR);
    chunk_rows = rows >= most ? most : round_up(max_of<int64_t>(rows, 1), MR);
    a = space.take<T>(chunk_rows, max_of<int64_t>(k, 1));
    b_per_thread = is_packed ? 0 : kBlockColumns * min_of(kSpanK, k);
    b = space.take<T>(b_per_thread, ctx.num_threads);
    sums = space.take<T>(kSums, ctx.num_threads);
    space.rewind(mark);
  }
};

// Products that share their A (q, k and v) or stand alone. Every product has the same rows and the
// same segments' A, none of them empty; all B are packed beforehand, or none is.
// epilogue(product, vector, row, column, lanes) receives each finished vector of C and returns what
// to store.
template <class T, class Epilogue>
class Gemm {
  static constexpr int64_t MR = Tile<T>::kRows, NR = Tile<T>::kColumns;

 public:
  Gemm(const ExecContext& ctx, const GemmSpace<T>& space, const Product<T>* products,
       int num_products, const Epilogue& epilogue)
      : ctx_(ctx),
        space_(space),
        products_(products),
        epilogue_(epilogue),
        is_packed_(products[0].packed_b != nullptr),
        k_total_(products[0].k_total()) {
    int64_t all_columns = 0;
    for (int p = 0; p < num_products; ++p) all_columns += round_up(products[p].columns, NR);
    // Enough tasks to keep every thread busy to the end, none wider than L2 likes.
    const int64_t wanted = 8 * static_cast<int64_t>(ctx.num_threads);
    task_columns_ = min_of(kBlockColumns, round_up(ceil_div(all_columns, wanted), NR));
    for (int p = 0; p < num_products; ++p) {
      first_task_[p + 1] = first_task_[p] + ceil_div(products[p].columns, task_columns_);
    }
    column_tasks_ = first_task_[num_products];
  }

  void run() {
    const int64_t rows = products_[0].rows;
    for (chunk_ = 0; chunk_ < rows; chunk_ += chunk_rows_) {
      chunk_rows_ = min_of(space_.chunk_rows, rows - chunk_);
      padded_rows_ = round_up(chunk_rows_, MR);
      block_rows_ = round_up(ceil_div(chunk_rows_, ceil_div(chunk_rows_, kBlockRows)), MR);
      parallel_for(ctx_, padded_rows_ / MR, [this](int64_t panel, int32_t) { pack_a(panel); });
      // Rows are split over tasks only where B is packed: each task would pack it again. The tasks
      // of the same columns follow each other, so that B comes from memory once.
      const int64_t parts = is_packed_ ? ceil_div(chunk_rows_, block_rows_) : 1;
      parallel_for(ctx_, column_tasks_ * parts, [this, parts](int64_t task, int32_t thread) {
        const int64_t begin = task % parts * block_rows_;
        const int64_t end = parts == 1 ? chunk_rows_ : min_of(chunk_rows_, begin + block_rows_);
        columns(task / parts, begin, end, thread);
      });
    }
  }

 private:
  // A block of rows by the columns of a task.
  struct Block {
    int p;  // the product
    int64_t row, rows;
    int64_t column, columns;
    T* sums;  // tile after tile, a column of tiles after the other

    // fn(tile, row in the block, column in the block) for every tile.
    template <class F>
    XLMR_INLINE void for_each_tile(const F& fn) const {
      T* tile = sums;
      for (int64_t j = 0; j < columns; j += NR) {
        for (int64_t i = 0; i < rows; i += MR, tile += MR * NR) fn(tile, i, j);
      }
    }
  };

  // Packed A: block after block of k, in each the panels one behind the other.
  void pack_a(int64_t panel) const {
    const int64_t row = panel * MR;
    T* to = space_.a;
    for (BlockOfK<T> k{products_}; !k.end(); k.advance()) {
      pack_panel<MR>(products_->segment[k.segment].a.at(chunk_ + row, k.k),
                     min_of(MR, chunk_rows_ - row), k.size(), to + row * k.size());
      to += padded_rows_ * k.size();
    }
  }

  // Rows [begin, end) of the chunk by the columns of one task. B is packed in spans of k: all of
  // it, but for the gradients of very many rows, whose sums wait in C between the spans.
  void columns(int64_t task, int64_t begin, int64_t end, int32_t thread) const {
    Block block{};
    while (task >= first_task_[block.p + 1]) ++block.p;
    const Product<T>& product = products_[block.p];
    block.column = (task - first_task_[block.p]) * task_columns_;
    block.columns = min_of(task_columns_, product.columns - block.column);
    block.sums = space_.sums + thread * GemmSpace<T>::kSums;
    T* const own_b = space_.b + thread * space_.b_per_thread;
    const int64_t padded_columns = round_up(block.columns, NR);
    BlockOfK<T> first{&product};
    for (int64_t k_begin = 0; k_begin < k_total_;) {
      BlockOfK<T> last = first;
      int64_t k_end = k_begin;
      while (!last.end() && (is_packed_ || k_end - k_begin + last.size() <= kSpanK)) {
        k_end += last.size();
        last.advance();
      }
      for (block.row = begin; block.row < end; block.row += block_rows_) {
        block.rows = min_of(block_rows_, end - block.row);
        if (k_begin > 0) load(block);
        int64_t k = k_begin;
        for (BlockOfK<T> step = first; k < k_end; step.advance()) {
          if (is_packed_) {
            multiply(block, k, step.size(), product.packed_b + block.column * k_total_ + k * NR,
                     k_total_, k_end);
          } else {
            // The first block of rows packs, for itself and the others.
            T* const panels =
                own_b + (end - begin <= block_rows_ ? 0 : k - k_begin) * padded_columns;
            if (block.row == begin) {
              pack_b(product.segment[step.segment].b.at(step.k, block.column), step.size(),
                     block.columns, panels);
            }
            multiply(block, k, step.size(), panels, step.size(), k_end);
          }
          k += step.size();
        }
      }
      first = last;
      k_begin = k_end;
    }
  }

  // Adds steps [k, k + k_size) to a block's sums. `b` holds panels of NR columns, panel_k steps
  // from one to the next. At k_end the block goes to C.
  void multiply(const Block& block, int64_t k, int64_t k_size, const T* b, int64_t panel_k,
                int64_t k_end) const {
    constexpr int64_t kBytes = NR * static_cast<int64_t>(sizeof(T));  // of B at one k
    const T* const a = space_.a + padded_rows_ * k + block.row * k_size;
    const int64_t tiles = ceil_div(block.rows, MR);
    const bool finishes = k + k_size == k_end, is_last = k_end == k_total_;
    block.for_each_tile([&](T* tile, int64_t i, int64_t j) {
      const int64_t rows = min_of(MR, block.rows - i);
      const T* panel = b + j * panel_k;
      // The tiles over a panel of B ask for the next one, each for its part.
      const LookAhead ahead = {
          reinterpret_cast<const char*>(panel + NR * panel_k) + i / MR * k_size * kBytes / tiles,
          kBytes / tiles};
      if (finishes) prefetch_tile(block, rows, i, j);
      multiply_tile<ALayout::panel>(k_size, a + i * k_size, MR, rows, panel, tile, NR, k > 0,
                                    ahead);
      if (!finishes) return;
      for_each_vector<T>(rows, block.columns - j, [&](int64_t row, int64_t at, int64_t lanes) {
        Vec<T> x = Vec<T>::load(tile + row * NR + at);
        if (is_last) {
          x = epilogue_(block.p, x, chunk_ + block.row + i + row, block.column + j + at, lanes);
        }
        store_lanes(c_at(block, i + row, j + at), x, lanes);
      });
    });
  }

  // The sums of the spans before.
  void load(const Block& block) const {
    block.for_each_tile([&](T* tile, int64_t i, int64_t j) {
      for_each_vector<T>(
          min_of(MR, block.rows - i), block.columns - j,
          [&](int64_t row, int64_t at, int64_t lanes) {
            load_lanes(c_at(block, i + row, j + at), lanes).store(tile + row * NR + at);
          });
    });
  }

  XLMR_INLINE T* c_at(const Block& block, int64_t i, int64_t j) const {
    const Product<T>& product = products_[block.p];
    return product.c + (chunk_ + block.row + i) * product.c_stride + block.column + j;
  }

  // Asks for the place that a tile goes to.
  XLMR_INLINE void prefetch_tile(const Block& block, int64_t rows, int64_t i, int64_t j) const {
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t at = 0; at < NR; at += kLine) {
        __builtin_prefetch(c_at(block, i + row, j + at), 1);
      }
    }
  }

  const ExecContext& ctx_;
  const GemmSpace<T>& space_;
  const Product<T>* products_;
  const Epilogue& epilogue_;
  const bool is_packed_;
  const int64_t k_total_;
  int64_t task_columns_, column_tasks_;
  int64_t first_task_[4] = {0, 0, 0, 0};
  // The chunk of rows at work: its first row, its rows, rows of its packed A, of a block.
  int64_t chunk_ = 0, chunk_rows_ = 0, padded_rows_ = 0, block_rows_ = 0;
};

template <class T, class Epilogue>
void gemm(const ExecContext& ctx, const GemmSpace<T>& space, const Product<T>* products,
          int num_products, const Epilogue& epilogue) {
  if (products[0].rows == 0 || products[0].columns == 0) return;
  Gemm<T, Epilogue>(ctx, space, products, num_products, epilogue).run();
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
