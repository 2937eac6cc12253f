// y = dropout(LayerNorm(word[id] + position[position_id] + token_type[type_id])), and its backward.
#include "cuda/kernels.cuh"
#include "cuda/norm.cuh"

namespace xlmr::XLMR_CUDA_NS {
namespace {

template <class T>
struct EmbeddingRow {
  const T* word;  // null where `quantized` stands for it
  const int8_t* quantized;
  Wide<T> scale;
  const T* position;  // null where an id has no row in its table: the row is NaN then
  const T* token_type;
  __device__ __forceinline__ Wide<T> value(int64_t column, Wide<T>) const {
    using W = Wide<T>;
    if (position == nullptr) return static_cast<W>(NAN);
    const W w = word != nullptr ? widen(word[column]) : static_cast<W>(quantized[column]) * scale;
    return (w + widen(token_type[column])) + widen(position[column]);
  }
};

// The sums of the three tables; ids are looked at here alone.
template <class T>
struct EmbeddingRows {
  int64_t hidden;
  const int64_t* input_ids;
  const T* inputs_embeds;
  int64_t inputs_embeds_stride;
  const int64_t* position_ids;
  const int64_t* token_type_ids;
  int64_t word_rows, position_rows, token_type_rows;
  const void* word;
  const float* word_scale;
  const T* position;
  const T* token_type;

  // Args is EmbeddingForward or EmbeddingBackward.
  template <class Args>
  EmbeddingRows(const Args& a, const float* scale)
      : hidden(a.hidden),
        input_ids(a.input_ids),
        inputs_embeds(static_cast<const T*>(a.inputs_embeds)),
        inputs_embeds_stride(a.inputs_embeds_stride),
        position_ids(a.position_ids),
        token_type_ids(a.token_type_ids),
        word_rows(a.word_rows),
        position_rows(a.position_rows),
        token_type_rows(a.token_type_rows),
        word(a.word),
        word_scale(scale),
        position(static_cast<const T*>(a.position)),
        token_type(static_cast<const T*>(a.token_type)) {}

  static __device__ __forceinline__ bool inside(int64_t id, int64_t rows) {
    return id >= 0 && id < rows;
  }

  __device__ __forceinline__ EmbeddingRow<T> row(int64_t index) const {
    const int64_t at = position_ids[index];
    const int64_t type = token_type_ids == nullptr ? 0 : token_type_ids[index];
    EmbeddingRow<T> row{nullptr, nullptr, Wide<T>(1), nullptr, nullptr};
    if (!inside(at, position_rows) || !inside(type, token_type_rows)) return row;
    if (inputs_embeds != nullptr) {
      row.word = inputs_embeds + index * inputs_embeds_stride;
    } else {
      const int64_t id = input_ids[index];
      if (!inside(id, word_rows)) return row;
      if (word_scale == nullptr) {
        row.word = static_cast<const T*>(word) + id * hidden;
      } else {
        row.quantized = static_cast<const int8_t*>(word) + id * hidden;
        row.scale = static_cast<Wide<T>>(word_scale[id]);
      }
    }
    row.position = position + at * hidden;
    row.token_type = token_type + type * hidden;
    return row;
  }
};

template <class T>
struct EmbeddingForwardLauncher {
  EmbeddingForwardLauncher(Workspace&, const EmbeddingForward&) {}

  Status run(const EmbeddingForward& a, const ExecContext& ctx) const {
    NormForward<T> norm = norm_forward_of<T>(a);
    norm.after = DropoutMask<Wide<T>>(a.dropout);
    return norm_forward("embedding_forward", norm, EmbeddingRows<T>(a, a.word_scale), ctx);
  }
};

template <class T>
struct ScatterRows {
  int64_t rows, hidden;
  int64_t table_rows, left_out;  // of the ids, those beyond the table and this one get nothing
  const int64_t* index;          // [rows]; null means 0 everywhere
  const T* source;               // [rows, hidden]
  T* table;                      // [table_rows, hidden] +=
};

constexpr int kScatterThreads = 128;
constexpr int kScatterColumns = 4;  // of a thread
constexpr int kScatterWidth = kScatterThreads * kScatterColumns;

// table[id] += source[row], the rows of one id in ascending order. The block of the first row that
// has an id adds all of them; the other blocks end at once. Every warp looks through the ids by
// itself, 32 at a time: rows^2 / 2 comparisons at most, little beside the rest up to some 10^5
// rows.
template <class T>
__global__ void __launch_bounds__(kScatterThreads) scatter_rows_kernel(ScatterRows<T> a) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t column_blocks = ceil_div(a.hidden, kScatterWidth);
  const int64_t first = blockIdx.x / column_blocks;
  const int64_t column0 = blockIdx.x % column_blocks * kScatterWidth + threadIdx.x;
  const int64_t id = a.index == nullptr ? 0 : a.index[first];
  if (id == a.left_out || id < 0 || id >= a.table_rows) return;
  for (int64_t base = 0; base < first; base += kWarp) {
    const bool earlier = base + lane < first && a.index[base + lane] == id;
    if (__any_sync(kAllLanes, earlier)) return;
  }
  T* to = a.table + id * a.hidden;
  Wide<T> sum[kScatterColumns];
#pragma unroll
  for (int c = 0; c < kScatterColumns; ++c) {
    const int64_t column = column0 + c * kScatterThreads;
    sum[c] = column < a.hidden ? widen(to[column]) : Wide<T>(0);
  }
  for (int64_t base = first; base < a.rows; base += kWarp) {
    const bool same = base + lane < a.rows && (a.index == nullptr || a.index[base + lane] == id);
    const unsigned found = __ballot_sync(kAllLanes, same);
    if (found == 0) continue;
    for (int i = 0; i < kWarp; ++i) {
      if ((found >> i & 1) == 0) continue;
      const T* from = a.source + (base + i) * a.hidden;
#pragma unroll
      for (int c = 0; c < kScatterColumns; ++c) {
        const int64_t column = column0 + c * kScatterThreads;
        if (column < a.hidden) sum[c] += widen(from[column]);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kScatterColumns; ++c) {
    const int64_t column = column0 + c * kScatterThreads;
    if (column < a.hidden) to[column] = narrow<T>(sum[c]);
  }
}

template <class T>
struct EmbeddingBackwardLauncher {
  ColumnSums<T, 2> sums;

  EmbeddingBackwardLauncher(Workspace& space, const EmbeddingBackward& a)
      : sums(space, a.dweight != nullptr, a.rows, a.hidden) {}

  Status run(const EmbeddingBackward& a, const ExecContext& ctx) const {
    NormBackward<T> norm = norm_backward_of<T>(a);
    norm.after = DropoutMask<Wide<T>>(a.dropout);
    if (Status error =
            norm_backward("embedding_backward", norm, EmbeddingRows<T>(a, nullptr), sums, ctx)) {
      return error;
    }
    if (Status error = scatter("embedding_backward dword", a, a.word_rows, a.padding_idx,
                               a.input_ids, a.dword, ctx)) {
      return error;
    }
    if (Status error = scatter("embedding_backward dposition", a, a.position_rows, a.padding_idx,
                               a.position_ids, a.dposition, ctx)) {
      return error;
    }
    return scatter("embedding_backward dtoken_type", a, a.token_type_rows, -1, a.token_type_ids,
                   a.dtoken_type, ctx);
  }

 private:
  // Nothing where the table's gradient is not asked for.
  static Status scatter(const char* name, const EmbeddingBackward& a, int64_t table_rows,
                        int64_t left_out, const int64_t* index, void* table,
                        const ExecContext& ctx) {
    if (table == nullptr) return nullptr;
    const ScatterRows<T> args{a.rows,
                              a.hidden,
                              table_rows,
                              left_out,
                              index,
                              static_cast<const T*>(a.dsum),
                              static_cast<T*>(table)};
    const int64_t ids = index == nullptr ? min_of(a.rows, int64_t{1}) : a.rows;
    const int64_t blocks = product(ids, ceil_div(a.hidden, kScatterWidth));
    return launch(name, scatter_rows_kernel<T>, blocks, kScatterThreads, 0, ctx, args);
  }
};

}  // namespace

XLMR_DEFINE_OP(embedding_forward, EmbeddingForward, EmbeddingForwardLauncher)
XLMR_DEFINE_OP(embedding_backward, EmbeddingBackward, EmbeddingBackwardLauncher)

}  // namespace xlmr::XLMR_CUDA_NS
