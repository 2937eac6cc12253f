// y = dropout(LayerNorm(word[id] + position[position_id] + token_type[type_id])), and its backward.
#include "cpu/kernels.h"
#include "cpu/norm_row.h"

namespace xlmr::XLMR_ISA {
namespace {

// The row of the word table, or what stands for it; Args is EmbeddingForward or EmbeddingBackward.
template <class T, class Args>
XLMR_INLINE const T* word_row(const Args& a, int64_t row) {
  return a.inputs_embeds != nullptr
             ? static_cast<const T*>(a.inputs_embeds) + row * a.inputs_embeds_stride
             : static_cast<const T*>(a.word) + a.input_ids[row] * a.hidden;
}

// The row of an 8-bit word table, as floats.
template <class T>
XLMR_INLINE void word_row_int8(const EmbeddingForward& a, int64_t row, T* out) {
  const int64_t id = a.input_ids[row];
  const int8_t* q = static_cast<const int8_t*>(a.word) + id * a.hidden;
  const T scale = static_cast<T>(a.word_scale[id]);
  for (int64_t j = 0; j < a.hidden; ++j) out[j] = static_cast<T>(q[j]) * scale;
}

// The three tables' sum for one row; `word` may be `sum`.
template <class T, class Args>
XLMR_INLINE void gather_row(const Args& a, int64_t row, const T* word, T* sum) {
  const T* position = static_cast<const T*>(a.position) + a.position_ids[row] * a.hidden;
  const int64_t type = a.token_type_ids != nullptr ? a.token_type_ids[row] : 0;
  const T* token_type = static_cast<const T*>(a.token_type) + type * a.hidden;
  for_row<T>(a.hidden, [&](int64_t j, int64_t lanes) {
    store_lanes(sum + j,
                (load_lanes(word + j, lanes) + load_lanes(token_type + j, lanes)) +
                    load_lanes(position + j, lanes),
                lanes);
  });
}

template <class T>
struct EmbeddingForwardKernel {
  int64_t row_size;
  T* mask;  // per thread, one row each
  T* sum;

  EmbeddingForwardKernel(Workspace& space, const EmbeddingForward& a, const ExecContext& ctx)
      : row_size(round_up(a.hidden, DropoutMask<T>::kGroup)),
        mask(space.take<T>(row_size, ctx.num_threads)),
        sum(space.take<T>(row_size, ctx.num_threads)) {}

  void run(const EmbeddingForward& a, const ExecContext& ctx) const {
    const DropoutMask<T> dropout(a.dropout);
    auto rows = [&](int64_t block, int32_t thread) {
      T* mask_row = mask + thread * row_size;
      T* sum_row = sum + thread * row_size;
      const int64_t begin = block * kNormRows;
      for (int64_t row = begin; row < min_of(a.rows, begin + kNormRows); ++row) {
        T* y = static_cast<T*>(a.y) + row * a.hidden;
        const T* word = sum_row;
        if (a.word_scale != nullptr && a.inputs_embeds == nullptr) {
          word_row_int8(a, row, sum_row);
        } else {
          word = word_row<T>(a, row);
        }
        gather_row(a, row, word, sum_row);
        const auto stat =
            normalize_row<T>(a.hidden, static_cast<T>(a.eps), sum_row,
                             static_cast<const T*>(a.weight), static_cast<const T*>(a.bias), y);
        if (a.mean != nullptr) {
          static_cast<T*>(a.mean)[row] = stat.mean;
          static_cast<T*>(a.rstd)[row] = stat.rstd;
        }
        if (dropout.on()) {
          dropout.row(0, row, 0, a.hidden, mask_row);
          scale_row(a.hidden, mask_row, y);
        }
      }
    };
    parallel_for(ctx, ceil_div(a.rows, kNormRows), rows);
  }
};

template <class T>
struct EmbeddingBackwardKernel {
  int64_t row_size;
  T* dy_masked;  // per thread, one row each
  T* mask;
  T* sum;
  ParameterSums<T> sums;

  EmbeddingBackwardKernel(Workspace& space, const EmbeddingBackward& a, const ExecContext& ctx)
      : row_size(round_up(a.hidden, DropoutMask<T>::kGroup)),
        dy_masked(space.take<T>(row_size, ctx.num_threads)),
        mask(space.take<T>(row_size, ctx.num_threads)),
        sum(space.take<T>(row_size, ctx.num_threads)),
        sums(space, a.dweight != nullptr, a.rows, a.hidden) {}

  void run(const EmbeddingBackward& a, const ExecContext& ctx) const {
    const DropoutMask<T> dropout(a.dropout);
    T* dsum = static_cast<T*>(a.dsum);
    auto rows = [&](int64_t block, int32_t thread) {
      T* mask_row = mask + thread * row_size;
      T* sum_row = sum + thread * row_size;
      T* dweight = sums.dweight(block, a.hidden);
      if (dweight != nullptr) fill_zero(dweight, 2 * a.hidden);
      const int64_t begin = block * kNormRows;
      for (int64_t row = begin; row < min_of(a.rows, begin + kNormRows); ++row) {
        const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
        if (dropout.on()) {
          T* masked = dy_masked + thread * row_size;
          memcpy(masked, dy, static_cast<size_t>(a.hidden) * sizeof(T));
          dropout.row(0, row, 0, a.hidden, mask_row);
          scale_row(a.hidden, mask_row, masked);
          dy = masked;
        }
        gather_row(a, row, word_row<T>(a, row), sum_row);
        normalize_row_backward<T>(
            a.hidden, {static_cast<const T*>(a.mean)[row], static_cast<const T*>(a.rstd)[row]}, dy,
            sum_row, static_cast<const T*>(a.weight), dsum + row * a.hidden, dweight,
            dweight + (dweight != nullptr ? a.hidden : 0));
      }
    };
    parallel_for(ctx, ceil_div(a.rows, kNormRows), rows);
    sums.finish(ctx, a.rows, a.hidden, static_cast<T*>(a.dweight), static_cast<T*>(a.dbias));

    // The tables: each task owns some columns and adds the rows in ascending order.
    T* dword = static_cast<T*>(a.dword);
    T* dposition = static_cast<T*>(a.dposition);
    T* dtoken_type = static_cast<T*>(a.dtoken_type);
    if (dword == nullptr && dposition == nullptr && dtoken_type == nullptr) return;
    parallel_ranges(ctx, a.hidden, kColumnBlock, [&](int64_t begin, int64_t end) {
      const auto add = [&](T* table, int64_t index, const T* d) {
        for_row<T>(end - begin, [&](int64_t j, int64_t lanes) {
          T* to = table + index * a.hidden + begin + j;
          store_lanes(to, load_lanes(to, lanes) + load_lanes(d + j, lanes), lanes);
        });
      };
      for (int64_t row = 0; row < a.rows; ++row) {
        const T* d = dsum + row * a.hidden + begin;
        if (dword != nullptr && a.input_ids[row] != a.padding_idx) add(dword, a.input_ids[row], d);
        if (dposition != nullptr && a.position_ids[row] != a.padding_idx) {
          add(dposition, a.position_ids[row], d);
        }
        if (dtoken_type != nullptr) {
          add(dtoken_type, a.token_type_ids != nullptr ? a.token_type_ids[row] : 0, d);
        }
      }
    });
  }
};

}  // namespace

XLMR_DEFINE_OP(embedding_forward, EmbeddingForward, EmbeddingForwardKernel)
XLMR_DEFINE_OP(embedding_backward, EmbeddingBackward, EmbeddingBackwardKernel)

}  // namespace xlmr::XLMR_ISA
