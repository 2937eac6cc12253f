// The one matrix product of the CPU kernels: C[M, N] = sum over segments of A_s B_s, then an
// epilogue. A is packed once for all threads in panels of MR rows, B by each task in panels of NR
// columns; a register tile of MR x NR walks down k.
//
// How panels are packed and tiles are multiplied is the arithmetic's affair: Exact (float32 and
// float64, register_tile.h), Bfloat16 and what its weights are elsewhere (bfloat16.h).
//
// Every element of C is one chain of sums in k order within blocks of kBlockK, the blocks added in
// order. The chain does not depend on M, on the tile, on the split of work or on the threads: a row
// has the same bits alone and in any batch. K is never split over threads.
#pragma once

#include "cpu/register_tile.h"

namespace xlmr::XLMR_ISA {
namespace {

// Sizes in elements; the caches meant are those of float32 on a core with 32 KiB and 512 KiB.
constexpr int64_t kBlockRows = 192;      // of A, passed over by all panels of a task: in L2
constexpr int64_t kBlockColumns = 96;    // of B in one task: in L2 beside the sums of the block
constexpr int64_t kSpanBlocks = 16;      // of k, of a B that a task packs for itself
constexpr int64_t kPackBytes = 8 << 20;  // packed A, all threads together: in L3

// The length of k in panels, and a weight as Product::packed_b.
template <class A>
int64_t padded(int64_t k) {
  return round_up(k, A::kDepth);
}
template <class A>
const typename A::Packed* packed_weight(const void* weight, bool packed) {
  const bool reads = A::kReadsPacked && packed;
  return reads ? static_cast<const typename A::Packed*>(weight) : nullptr;
}

template <class A>
struct Segment {
  MatrixView<typename A::Value> a;  // M x k
  typename A::Right b;              // k x N
  int64_t k;
};

template <class A>
struct Product {
  int64_t rows, columns;
  int num_segments;
  Segment<A> segment[3];
  typename A::Value* c;  // [M, N]; holds the sums between two spans of k, where there are several
  int64_t c_stride;
  // The one segment's whole B, packed beforehand; may be null.
  const typename A::Packed* packed_b = nullptr;

  // With the padding of every segment.
  int64_t k_total() const {
    int64_t k = 0;
    for (int s = 0; s < num_segments; ++s) k += padded<A>(segment[s].k);
    return k;
  }
};

// Steps [k, k + size) of one segment: a link of every element's chain.
template <class A>
struct BlockOfK {
  const Product<A>* product;
  int segment = 0;
  int64_t k = 0;

  bool end() const { return segment == product->num_segments; }
  int64_t size() const { return min_of(A::kBlockK, product->segment[segment].k - k); }
  int64_t padded_size() const { return padded<A>(size()); }
  void advance() {
    k += size();
    for (; !end() && k == product->segment[segment].k; ++segment) k = 0;
  }
};

// The workspace of gemm() for products of up to `rows` rows and `k` padded steps. An op's products
// run one after the other, so all their spaces lie in the same place, behind everything else: an op
// takes them last.
template <class A>
struct GemmSpace {
  using T = typename A::Value;
  using Packed = typename A::Packed;
  Packed* a;           // one chunk of rows, packed
  int64_t chunk_rows;  // a multiple of MR
  Packed* b;           // per thread: a span of the task's columns, packed
  int64_t b_per_thread;
  T* sums;  // per thread: a block of rows by the columns of a task, tile after tile
  static constexpr int64_t kSums = kBlockRows * kBlockColumns;

  GemmSpace(Workspace& space, const ExecContext& ctx, int64_t rows, int64_t k,
            bool is_packed = false) {
    constexpr int64_t MR = A::kRows;
    static_assert(kBlockRows % MR == 0 && kBlockColumns % A::kColumns == 0);
    static_assert(A::kBlockK % A::kDepth == 0);
    const int64_t mark = space.mark();
    const int64_t fitting =
        kPackBytes / static_cast<int64_t>(sizeof(Packed)) / max_of<int64_t>(k, 1);
    const int64_t most = max_of<int64_t>(fitting / MR * MR, 32 * MR);
    chunk_rows = rows >= most ? most : round_up(max_of<int64_t>(rows, 1), MR);
    a = space.take<Packed>(chunk_rows, max_of<int64_t>(k, 1));
    b_per_thread = is_packed ? 0 : kBlockColumns * min_of(kSpanBlocks * A::kBlockK, k);
    b = space.take<Packed>(b_per_thread, ctx.num_threads);
    sums = space.take<T>(kSums, ctx.num_threads);
    space.rewind(mark);
  }
};

// Products that share their A (q, k and v) or stand alone. Every product has the same rows and the
// same segments' A, none of them empty; all B are packed beforehand, or none is.
// epilogue(product, vector, row, column, lanes) receives each finished vector of C and returns what
// to store.
template <class A, class Epilogue>
class Gemm {
  using T = typename A::Value;
  using Packed = typename A::Packed;
  static constexpr int64_t MR = A::kRows, NR = A::kColumns;

 public:
  Gemm(const ExecContext& ctx, const GemmSpace<A>& space, const Product<A>* products,
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
        [[maybe_unused]] const typename A::Session session;
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
    Packed* to = space_.a;
    for (BlockOfK<A> k{products_}; !k.end(); k.advance()) {
      A::pack_rows(products_->segment[k.segment].a.at(chunk_ + row, k.k),
                   min_of(MR, chunk_rows_ - row), k.size(), to + row * k.padded_size());
      to += padded_rows_ * k.padded_size();
    }
  }

  // Rows [begin, end) of the chunk by the columns of one task. B is packed in spans of k: all of
  // it, but for the gradients of very many rows, whose sums wait in C between the spans.
  void columns(int64_t task, int64_t begin, int64_t end, int32_t thread) const {
    Block block{};
    while (task >= first_task_[block.p + 1]) ++block.p;
    const Product<A>& product = products_[block.p];
    block.column = (task - first_task_[block.p]) * task_columns_;
    block.columns = min_of(task_columns_, product.columns - block.column);
    block.sums = space_.sums + thread * GemmSpace<A>::kSums;
    Packed* const own_b = space_.b + thread * space_.b_per_thread;
    const int64_t padded_columns = round_up(block.columns, NR);
    BlockOfK<A> first{&product};
    for (int64_t k_begin = 0; k_begin < k_total_;) {
      BlockOfK<A> last = first;
      int64_t k_end = k_begin;
      while (!last.end() &&
             (is_packed_ || k_end - k_begin + last.padded_size() <= kSpanBlocks * A::kBlockK)) {
        k_end += last.padded_size();
        last.advance();
      }
      for (block.row = begin; block.row < end; block.row += block_rows_) {
        block.rows = min_of(block_rows_, end - block.row);
        if (k_begin > 0) load(block);
        int64_t k = k_begin;
        for (BlockOfK<A> step = first; k < k_end; step.advance()) {
          if (is_packed_) {
            multiply(block, k, step.padded_size(),
                     product.packed_b + block.column * k_total_ + k * NR, k_total_, k_end);
          } else {
            // The first block of rows packs, for itself and the others.
            Packed* const panels =
                own_b + (end - begin <= block_rows_ ? 0 : k - k_begin) * padded_columns;
            if (block.row == begin) {
              A::pack_columns(product.segment[step.segment].b.at(step.k, block.column), step.size(),
                              block.columns, panels);
            }
            multiply(block, k, step.padded_size(), panels, step.padded_size(), k_end);
          }
          k += step.padded_size();
        }
      }
      first = last;
      k_begin = k_end;
    }
  }

  // Adds steps [k, k + k_size) to a block's sums. `b` holds panels of NR columns, panel_k steps
  // from one to the next. At k_end the block goes to C.
  void multiply(const Block& block, int64_t k, int64_t k_size, const Packed* b, int64_t panel_k,
                int64_t k_end) const {
    constexpr int64_t kBytes = NR * static_cast<int64_t>(sizeof(Packed));  // of B at one k
    const Packed* const a = space_.a + padded_rows_ * k + block.row * k_size;
    const int64_t tiles = ceil_div(block.rows, MR);
    const bool finishes = k + k_size == k_end, is_last = k_end == k_total_;
    block.for_each_tile([&](T* tile, int64_t i, int64_t j) {
      const int64_t rows = min_of(MR, block.rows - i);
      const Packed* panel = b + j * panel_k;
      // The tiles over a panel of B ask for the next one, each for its part.
      const LookAhead ahead = {
          reinterpret_cast<const char*>(panel + NR * panel_k) + i / MR * k_size * kBytes / tiles,
          kBytes / tiles};
      if (finishes) prefetch_tile(block, rows, i, j);
      A::multiply(k_size, a + i * k_size, rows, panel, tile, k > 0, ahead);
      if (!finishes) return;
      for_each_vector<A>(rows, block.columns - j, [&](int64_t row, int64_t at, int64_t lanes) {
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
      for_each_vector<A>(
          min_of(MR, block.rows - i), block.columns - j,
          [&](int64_t row, int64_t at, int64_t lanes) {
            load_lanes(c_at(block, i + row, j + at), lanes).store(tile + row * NR + at);
          });
    });
  }

  XLMR_INLINE T* c_at(const Block& block, int64_t i, int64_t j) const {
    const Product<A>& product = products_[block.p];
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
  const GemmSpace<A>& space_;
  const Product<A>* products_;
  const Epilogue& epilogue_;
  const bool is_packed_;
  const int64_t k_total_;
  int64_t task_columns_, column_tasks_;
  int64_t first_task_[4] = {0, 0, 0, 0};
  // The chunk of rows at work: its first row, its rows, rows of its packed A, of a block.
  int64_t chunk_ = 0, chunk_rows_ = 0, padded_rows_ = 0, block_rows_ = 0;
};

template <class A, class Epilogue>
void gemm(const ExecContext& ctx, const GemmSpace<A>& space, const Product<A>* products,
          int num_products, const Epilogue& epilogue) {
  if (products[0].rows == 0 || products[0].columns == 0) return;
  Gemm<A, Epilogue>(ctx, space, products, num_products, epilogue).run();
}

template <class T>
void fill_zero(T* p, int64_t n) {
  if (n > 0) memset(static_cast<void*>(p), 0, static_cast<size_t>(n) * sizeof(T));
}

// dW[out, in] = dz^T x, the sum over rows in their order; zero for an empty batch.
template <class A, class T = typename A::Value>
void weight_gradient(const ExecContext& ctx, const GemmSpace<A>& space, int64_t rows,
                     MatrixView<T> dz, int64_t out_features, MatrixView<T> x, int64_t in_features,
                     T* dweight) {
  if (rows == 0) return fill_zero(dweight, out_features * in_features);
  const Product<A> product = {out_features, in_features, 1, {{dz.transposed(), x, rows}},
                              dweight,      in_features};
  gemm(ctx, space, &product, 1, [](int, Vec<T> v, int64_t, int64_t, int64_t) { return v; });
}

}  // namespace
}  // namespace xlmr::XLMR_ISA
