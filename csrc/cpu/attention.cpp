// out = softmax(scale Q K^T) V over packed sequences, and its backward. One task is one head of
// one sequence, the longest sequences first. Scores exist only as a block of queries by a block
// of keys; key blocks start at the sequence's start, so a row's bits depend on its sequence alone.
#include "cpu/dropout.h"
#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/reduce.h"

namespace xlmr::XLMR_ISA {
namespace {

constexpr int64_t kQueries = 60;             // rows of a score block; a multiple of every MR
constexpr int64_t kKeys = 128;               // columns, at most; a multiple of 4
constexpr int64_t kKeysPadded = kKeys + 32;  // room for a whole group of the mask
constexpr double kInfinity = __builtin_huge_val();

static_assert(kKeys % DropoutMask<float>::kGroup == 0, "the mask is made a group at a time");

// Sequences ordered by length, longest first, so that the last tasks are the short ones.
class LongestFirst {
 public:
  LongestFirst(Workspace& space, int64_t batch) : order_(space.take<int32_t>(batch)) {}

  void sort(const int32_t* cu_seqlens, int64_t batch) const {
    const auto length = [&](int32_t s) { return cu_seqlens[s + 1] - cu_seqlens[s]; };
    for (int64_t i = 0; i < batch; ++i) order_[i] = static_cast<int32_t>(i);
    // Heap sort: in place, no library code in this object, n log n for any order.
    const auto sift = [&](int64_t root, int64_t size) {
      for (int64_t child = 2 * root + 1; child < size; child = 2 * root + 1) {
        if (child + 1 < size && length(order_[child + 1]) < length(order_[child])) ++child;
        if (length(order_[root]) <= length(order_[child])) return;
        swap(root, child);
        root = child;
      }
    };
    for (int64_t i = batch / 2 - 1; i >= 0; --i) sift(i, batch);
    for (int64_t i = batch - 1; i > 0; --i) {
      swap(0, i);
      sift(0, i);
    }
  }

  int32_t operator[](int64_t i) const { return order_[i]; }

 private:
  void swap(int64_t a, int64_t b) const {
    const int32_t t = order_[a];
    order_[a] = order_[b];
    order_[b] = t;
  }

  int32_t* order_;
};

// c[rows, columns] (+)= A B with A read in place and B packed by pack_b. Whole tiles are written: c
// has room for rows up to a multiple of MR and columns up to one of NR.
template <ALayout kLayout, class T>
void multiply(bool add, int64_t rows, int64_t columns, int64_t k, const T* a, int64_t a_stride,
              const T* b, int64_t b_panel_stride, T* c, int64_t c_stride) {
  constexpr int64_t MR = Tile<T>::kRows, NR = Tile<T>::kColumns;
  for (int64_t j = 0; j < columns; j += NR) {
    const T* panel = b + j / NR * b_panel_stride;
    for (int64_t i = 0; i < rows; i += MR) {
      multiply_tile<kLayout>(k, a + (kLayout == ALayout::row_major ? i * a_stride : i), a_stride,
                             min_of(MR, rows - i), panel, c + i * c_stride + j, c_stride, add);
    }
  }
}

// The same where c has no such room: a gradient.
template <ALayout kLayout, class T>
void multiply_exactly(bool add, int64_t rows, int64_t columns, int64_t k, const T* a,
                      int64_t a_stride, const T* b, int64_t b_panel_stride, T* c,
                      int64_t c_stride) {
  constexpr int64_t MR = Tile<T>::kRows, NR = Tile<T>::kColumns;
  for (int64_t j = 0; j < columns; j += NR) {
    for (int64_t i = 0; i < rows; i += MR) {
      alignas(64) T tile[MR * NR];
      const int64_t tile_rows = min_of(MR, rows - i);
      multiply<kLayout>(false, tile_rows, NR, k,
                        a + (kLayout == ALayout::row_major ? i * a_stride : i), a_stride,
                        b + j / NR * b_panel_stride, 0, tile, NR);
      for_each_vector<Exact<T>>(tile_rows, columns - j,
                                [&](int64_t row, int64_t at, int64_t lanes) {
                                  T* dst = c + (i + row) * c_stride + j + at;
                                  const Vec<T> x = Vec<T>::load(tile + row * NR + at);
                                  store_lanes(dst, add ? load_lanes(dst, lanes) + x : x, lanes);
                                });
    }
  }
}

// Which rows of the query, of out and of lse belong to a sequence whose keys begin at row `first`.
struct QueryRows {
  int64_t begin, count;
  int64_t total;  // of all sequences
  template <class Args>
  QueryRows(const Args& a, int64_t sequence, int64_t first, int64_t length)
      : begin(a.first_only ? sequence : first),
        count(a.first_only ? 1 : length),
        total(a.first_only ? a.batch : a.rows) {}
};

template <class T>
struct AttentionForwardKernel {
  static constexpr int64_t NR = Tile<T>::kColumns;
  int64_t padded_keys, padded_size;
  LongestFirst order;
  int64_t per_thread;
  T* scratch;

  AttentionForwardKernel(Workspace& space, const AttentionForward& a, const ExecContext& ctx)
      : padded_keys(round_up(a.max_seqlen, NR)),
        padded_size(round_up(a.head_size, NR)),
        order(space, a.batch),
        per_thread(kQueries * (kKeysPadded + padded_size + 4) + kKeysPadded),
        scratch(space.take<T>(per_thread, ctx.num_threads)),
        key_panels(space.take<T>(padded_keys, a.head_size, ctx.num_threads)),
        value_panels(space.take<T>(a.max_seqlen, padded_size, ctx.num_threads)) {}

  T* key_panels;    // per thread: K^T of the head, panels [head_size][NR]
  T* value_panels;  // per thread: V of the head, panels [keys][NR]

  void run(const AttentionForward& a, const ExecContext& ctx) const {
    order.sort(a.cu_seqlens, a.batch);
    auto task = [&](int64_t index, int32_t thread) {
      head(a, order[index / a.num_heads], index % a.num_heads, thread);
    };
    parallel_for(ctx, a.batch * a.num_heads, task);
  }

  void head(const AttentionForward& a, int64_t sequence, int64_t head, int32_t thread) const {
    const int64_t first = a.cu_seqlens[sequence];
    const int64_t length = a.cu_seqlens[sequence + 1] - first;
    const int64_t d = a.head_size, at = head * d;
    const QueryRows queries(a, sequence, first, length);
    T* out_rows = static_cast<T*>(a.out) + queries.begin * a.out_stride + at;
    T* lse_rows =
        a.lse == nullptr ? nullptr : static_cast<T*>(a.lse) + head * queries.total + queries.begin;
    if (length == 0) {
      if (a.first_only) fill_zero(out_rows, d);
      if (a.first_only && lse_rows != nullptr) *lse_rows = 0;
      return;
    }
    const T* query = static_cast<const T*>(a.query) + queries.begin * a.query_stride + at;
    const T* key = static_cast<const T*>(a.key) + first * a.key_stride + at;
    const T* value = static_cast<const T*>(a.value) + first * a.value_stride + at;
    T* k_packed = key_panels + thread * padded_keys * d;
    T* v_packed = value_panels + thread * a.max_seqlen * padded_size;
    pack_b<T>({key, 1, a.key_stride}, d, length, k_packed);
    pack_b<T>({value, a.value_stride, 1}, length, d, v_packed);

    T* scores = scratch + thread * per_thread;      // [kQueries, kKeysPadded]
    T* acc = scores + kQueries * kKeysPadded;       // [kQueries, padded_size]
    T* running_max = acc + kQueries * padded_size;  // [kQueries]
    T* running_sum = running_max + kQueries;
    T* mask = running_sum + kQueries;  // [kKeysPadded]
    const DropoutMask<T> dropout(a.dropout);
    const Vec<T> scale(static_cast<T>(a.scale));

    for (int64_t q = 0; q < queries.count; q += kQueries) {
      const int64_t rows = min_of(kQueries, queries.count - q);
      fill_zero(acc, kQueries * padded_size);
      for (int64_t i = 0; i < rows; ++i) {
        running_max[i] = static_cast<T>(-kInfinity);
        running_sum[i] = 0;
      }
      for (int64_t k = 0; k < length; k += kKeys) {
        const int64_t keys = min_of(kKeys, length - k);
        multiply<ALayout::row_major>(false, rows, keys, d, query + q * a.query_stride,
                                     a.query_stride, k_packed + k * d, NR * d, scores, kKeysPadded);
        for (int64_t i = 0; i < rows; ++i) {
          T* row = scores + i * kKeysPadded;
          const T rescale = softmax_step(keys, scale, row, running_max[i], running_sum[i]);
          if (k > 0) {
            const Vec<T> factor(rescale);
            for (int64_t j = 0; j < padded_size; j += Vec<T>::size) {
              T* o = acc + i * padded_size + j;
              (Vec<T>::load(o) * factor).store(o);
            }
          }
          if (dropout.on()) {
            dropout.row(head, first + q + i, k, keys, mask);
            for_row<T>(keys, [&](int64_t j, int64_t lanes) {
              store_lanes(row + j, load_lanes(row + j, lanes) * load_lanes(mask + j, lanes), lanes);
            });
          }
        }
        multiply<ALayout::row_major>(true, rows, d, keys, scores, kKeysPadded, v_packed + k * NR,
                                     NR * length, acc, padded_size);
      }
      for (int64_t i = 0; i < rows; ++i) {
        T* out = out_rows + (q + i) * a.out_stride;
        const Vec<T> inverse(T(1) / running_sum[i]);
        for_row<T>(d, [&](int64_t j, int64_t lanes) {
          store_lanes(out + j, load_lanes(acc + i * padded_size + j, lanes) * inverse, lanes);
        });
        if (lse_rows != nullptr) {
          lse_rows[q + i] =
              running_max[i] + static_cast<T>(::log(static_cast<double>(running_sum[i])));
        }
      }
    }
  }

  // Turns one row of products into exp(scale product - max) and updates the running maximum and
  // sum; returns the factor for what was accumulated under the old maximum.
  static XLMR_INLINE T softmax_step(int64_t keys, Vec<T> scale, T* row, T& running_max,
                                    T& running_sum) {
    constexpr int64_t V = Vec<T>::size;
    Vec<T> largest(running_max);
    for_row<T>(keys, [&](int64_t j, int64_t lanes) {
      Vec<T> x = Vec<T>::load(row + j) * scale;
      x.store(row + j);
      if (lanes < V) {  // no lane behind the row may win
        T part[V];
        for (int64_t i = 0; i < V; ++i) part[i] = running_max;
        x.store(part, lanes);
        x = Vec<T>::load(part);
      }
      largest = max(largest, x);
    });
    const T new_max = reduce_max(largest);
    const Vec<T> shift(new_max);
    const T sum = sum_row<T>(keys, [&](int64_t j, int64_t lanes) {
      const Vec<T> p = exp_weight(load_lanes(row + j, lanes) - shift);
      store_lanes(row + j, p, lanes);
      return lanes < V ? Vec<T>::load(row + j, lanes) : p;
    });
    const T rescale = exp_weight(Vec<T>(running_max) - shift).lane(0);
    running_sum = running_sum * rescale + sum;
    running_max = new_max;
    return rescale;
  }
};

template <class T>
struct AttentionBackwardKernel {
  static constexpr int64_t NR = Tile<T>::kColumns;
  int64_t padded_keys, padded_size;
  LongestFirst order;
  int64_t per_thread;
  T* scratch;
  T* key_transposed;    // per thread: K^T of the head, panels [head_size][NR]
  T* value_transposed;  // V^T, the same way
  T* key_panels;        // K, panels [keys][NR]
  T* query_panels;      // Q of a block of queries, panels [queries][NR]
  T* dout_panels;       // dO, the same way

  AttentionBackwardKernel(Workspace& space, const AttentionBackward& a, const ExecContext& ctx)
      : padded_keys(round_up(a.max_seqlen, NR)),
        padded_size(round_up(a.head_size, NR)),
        order(space, a.batch),
        per_thread(2 * kQueries * kKeysPadded + kQueries + kKeysPadded),
        scratch(space.take<T>(per_thread, ctx.num_threads)),
        key_transposed(space.take<T>(padded_keys, a.head_size, ctx.num_threads)),
        value_transposed(space.take<T>(padded_keys, a.head_size, ctx.num_threads)),
        key_panels(space.take<T>(a.max_seqlen, padded_size, ctx.num_threads)),
        query_panels(space.take<T>(kQueries, padded_size, ctx.num_threads)),
        dout_panels(space.take<T>(kQueries, padded_size, ctx.num_threads)) {}

  void run(const AttentionBackward& a, const ExecContext& ctx) const {
    order.sort(a.cu_seqlens, a.batch);
    auto task = [&](int64_t index, int32_t thread) {
      head(a, order[index / a.num_heads], index % a.num_heads, thread);
    };
    parallel_for(ctx, a.batch * a.num_heads, task);
  }

  void head(const AttentionBackward& a, int64_t sequence, int64_t head, int32_t thread) const {
    const int64_t first = a.cu_seqlens[sequence];
    const int64_t length = a.cu_seqlens[sequence + 1] - first;
    const int64_t d = a.head_size, at = head * d;
    const QueryRows queries(a, sequence, first, length);
    T* dquery = static_cast<T*>(a.dquery) + queries.begin * a.dquery_stride + at;
    if (length == 0) {
      if (a.first_only) fill_zero(dquery, d);
      return;
    }
    const T* query = static_cast<const T*>(a.query) + queries.begin * a.query_stride + at;
    const T* key = static_cast<const T*>(a.key) + first * a.key_stride + at;
    const T* value = static_cast<const T*>(a.value) + first * a.value_stride + at;
    const T* out = static_cast<const T*>(a.out) + queries.begin * a.out_stride + at;
    const T* dout = static_cast<const T*>(a.dout) + queries.begin * a.dout_stride + at;
    const T* lse = static_cast<const T*>(a.lse) + head * queries.total + queries.begin;
    T* dkey = static_cast<T*>(a.dkey) + first * a.dkv_stride + at;
    T* dvalue = static_cast<T*>(a.dvalue) + first * a.dkv_stride + at;

    T* k_t = key_transposed + thread * padded_keys * d;
    T* v_t = value_transposed + thread * padded_keys * d;
    T* k_packed = key_panels + thread * a.max_seqlen * padded_size;
    T* q_packed = query_panels + thread * kQueries * padded_size;
    T* dout_packed = dout_panels + thread * kQueries * padded_size;
    pack_b<T>({key, 1, a.key_stride}, d, length, k_t);
    pack_b<T>({value, 1, a.value_stride}, d, length, v_t);
    pack_b<T>({key, a.key_stride, 1}, length, d, k_packed);

    T* probs = scratch + thread * per_thread;     // [kQueries, kKeysPadded]
    T* dscores = probs + kQueries * kKeysPadded;  // the same
    T* delta = dscores + kQueries * kKeysPadded;  // [kQueries]
    T* mask = delta + kQueries;                   // [kKeysPadded]
    const DropoutMask<T> dropout(a.dropout);
    const T scale = static_cast<T>(a.scale);
    // delta = rowsum(dO * O) = rowsum(P * dP). In the second form dP's own error cancels where one
    // probability is near 1, and dividing by rowsum(P) = 1 takes out what rounding lse did to P;
    // it needs all keys of a row at once.
    const bool whole = length <= kKeys;

    for (int64_t q = 0; q < queries.count; q += kQueries) {
      const int64_t rows = min_of(kQueries, queries.count - q);
      const T* dout_q = dout + q * a.dout_stride;
      pack_b<T>({query + q * a.query_stride, a.query_stride, 1}, rows, d, q_packed);
      pack_b<T>({dout_q, a.dout_stride, 1}, rows, d, dout_packed);
      for (int64_t i = 0; i < rows && !whole; ++i) {
        delta[i] = sum_row<T>(d, [&](int64_t j, int64_t lanes) {
          return load_lanes(dout_q + i * a.dout_stride + j, lanes) *
                 load_lanes(out + (q + i) * a.out_stride + j, lanes);
        });
      }
      for (int64_t k = 0; k < length; k += kKeys) {
        const int64_t keys = min_of(kKeys, length - k);
        multiply<ALayout::row_major>(false, rows, keys, d, query + q * a.query_stride,
                                     a.query_stride, k_t + k * d, NR * d, probs, kKeysPadded);
        multiply<ALayout::row_major>(false, rows, keys, d, dout_q, a.dout_stride, v_t + k * d,
                                     NR * d, dscores, kKeysPadded);
        for (int64_t i = 0; i < rows; ++i) {
          T* p_row = probs + i * kKeysPadded;
          T* ds_row = dscores + i * kKeysPadded;
          const Vec<T> shift(lse[q + i]), scale_v(scale);
          if (dropout.on()) dropout.row(head, first + q + i, k, keys, mask);
          const auto mask_at = [&](int64_t j, int64_t lanes) {
            return dropout.on() ? load_lanes(mask + j, lanes) : Vec<T>(T(1));
          };
          const T sum_p = sum_row<T>(keys, [&](int64_t j, int64_t lanes) {
            const Vec<T> p = exp_weight(load_lanes(p_row + j, lanes) * scale_v - shift);
            store_lanes(p_row + j, p, lanes);
            return load_lanes(p_row + j, lanes);  // 0 in the lanes behind the row
          });
          const T sum_p_dp = sum_row<T>(keys, [&](int64_t j, int64_t lanes) {
            const Vec<T> dp = load_lanes(ds_row + j, lanes) * mask_at(j, lanes);
            store_lanes(ds_row + j, dp, lanes);
            return load_lanes(p_row + j, lanes) * dp;
          });
          const Vec<T> minus(whole ? sum_p_dp / sum_p : delta[i]);
          for_row<T>(keys, [&](int64_t j, int64_t lanes) {
            const Vec<T> p = load_lanes(p_row + j, lanes);
            store_lanes(ds_row + j, p * (load_lanes(ds_row + j, lanes) - minus) * scale_v, lanes);
            store_lanes(p_row + j, p * mask_at(j, lanes), lanes);
          });
        }
        multiply_exactly<ALayout::column_major>(q > 0, keys, d, rows, probs, kKeysPadded,
                                                dout_packed, NR * rows, dvalue + k * a.dkv_stride,
                                                a.dkv_stride);
        multiply_exactly<ALayout::column_major>(q > 0, keys, d, rows, dscores, kKeysPadded,
                                                q_packed, NR * rows, dkey + k * a.dkv_stride,
                                                a.dkv_stride);
        multiply_exactly<ALayout::row_major>(k > 0, rows, d, keys, dscores, kKeysPadded,
                                             k_packed + k * NR, NR * length,
                                             dquery + q * a.dquery_stride, a.dquery_stride);
      }
    }
  }
};

}  // namespace

XLMR_DEFINE_OP(attention_forward, AttentionForward, AttentionForwardKernel)
XLMR_DEFINE_OP(attention_backward, AttentionBackward, AttentionBackwardKernel)

}  // namespace xlmr::XLMR_ISA
