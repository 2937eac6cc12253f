// Memory that notices what it should not see: a write before, behind or between its rows, and
// (where the placement is a page or the exact heap block) a read there too.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

namespace test {

// The kinds of block that buffers are laid in, mixed; the same mix in every run.
enum class Placement {
  exact,       // malloc of the very size: ASan and valgrind see one element too many
  canaries,    // between canaries, aligned to the element only
  page_end,    // the last byte touches a page that cannot be read
  page_begin,  // the first byte comes right behind such a page
};

class Block {
 public:
  Block(size_t bytes, Placement placement, size_t alignment);
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // Null where the size is 0, as torch gives for an empty tensor.
  void* data() const { return data_; }
  // Whether every canary byte is as it was.
  bool intact() const;

  static Placement next_placement();

 private:
  unsigned char* base_ = nullptr;
  size_t mapped_ = 0;               // bytes of the mapping; 0 for the heap
  unsigned char* first_ = nullptr;  // the readable range
  unsigned char* last_ = nullptr;
  unsigned char* data_ = nullptr;
  size_t bytes_ = 0;
};

// A row-major [rows, width] array with `stride` elements from row to row. All of it begins as
// bytes 0xFF, which is NaN for floats, so that what is read too much shows in the result.
template <class T>
class Guarded {
 public:
  Guarded(int64_t rows, int64_t width, int64_t stride)
      : rows_(rows),
        width_(width),
        stride_(stride),
        count_(rows == 0 || width == 0 ? 0 : size_t((rows - 1) * stride + width)),
        block_(count_ * sizeof(T), Block::next_placement(), sizeof(T)) {
    if (count_ != 0) std::memset(block_.data(), 0xFF, count_ * sizeof(T));
  }
  Guarded(int64_t rows, int64_t width) : Guarded(rows, width, width) {}

  // An input: filled, and not to be changed by the op.
  Guarded(const std::vector<T>& values, int64_t rows, int64_t width, int64_t stride)
      : Guarded(rows, width, stride) {
    fill(values);
    frozen_ = true;
    const T* begin = data();
    snapshot_.assign(begin, begin + count_);
  }
  Guarded(const std::vector<T>& values, int64_t rows, int64_t width)
      : Guarded(values, rows, width, width) {}

  void fill(const std::vector<T>& values) {
    for (int64_t row = 0; row < rows_ && width_ > 0; ++row) {
      std::memcpy(data() + row * stride_, values.data() + row * width_, width_ * sizeof(T));
    }
  }

  T* data() const { return static_cast<T*>(block_.data()); }
  int64_t stride() const { return stride_; }

  // The values without the gaps.
  std::vector<T> values() const { return columns(0, width_); }
  std::vector<T> columns(int64_t begin, int64_t count) const {
    std::vector<T> out(size_t(rows_ * count));
    for (int64_t row = 0; row < rows_ && count > 0; ++row) {
      std::memcpy(out.data() + row * count, data() + row * stride_ + begin, count * sizeof(T));
    }
    return out;
  }

  bool intact() const {
    if (!block_.intact()) return false;
    if (count_ == 0) return true;
    if (frozen_) return std::memcmp(data(), snapshot_.data(), count_ * sizeof(T)) == 0;
    const size_t gap = size_t(stride_ - width_) * sizeof(T);
    for (int64_t row = 0; row + 1 < rows_; ++row) {
      const auto* bytes = reinterpret_cast<const unsigned char*>(data() + row * stride_ + width_);
      for (size_t i = 0; i < gap; ++i) {
        if (bytes[i] != 0xFF) return false;
      }
    }
    return true;
  }

 private:
  int64_t rows_, width_, stride_;
  size_t count_;
  Block block_;
  bool frozen_ = false;
  std::vector<T> snapshot_;
};

}  // namespace test
