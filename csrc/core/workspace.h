// The layout of an op's workspace.
#pragma once

#include <cstdint>

#include "core/sizes.h"

namespace xlmr {
// Internal linkage on purpose: this header is compiled once per instruction set.
namespace {

// Hands out 64-byte aligned pieces of a workspace. An op describes its layout once, in a function
// that both the query (null base: only `total` counts) and the run go through.
class Workspace {
 public:
  explicit Workspace(void* base)
      : base_(base == nullptr
                  ? 0
                  : round_up(static_cast<int64_t>(reinterpret_cast<uintptr_t>(base)), kAlign)) {}

  // Room for a * b * c elements, in bytes from the aligned base.
  template <class T>
  T* take(int64_t a, int64_t b = 1, int64_t c = 1) {
    int64_t bytes = static_cast<int64_t>(sizeof(T));
    overflow_ |=
        __builtin_mul_overflow(bytes, a, &bytes) || __builtin_mul_overflow(bytes, b, &bytes) ||
        __builtin_mul_overflow(bytes, c, &bytes) || bytes > INT64_MAX / 4 || used_ > INT64_MAX / 4;
    if (overflow_) return nullptr;
    T* p = reinterpret_cast<T*>(static_cast<uintptr_t>(base_ + used_));
    used_ += round_up(bytes, kAlign);
    most_ = max_of(most_, used_);
    return p;
  }

  // What was taken since `mark` may be given out again: for pieces that are never in use together.
  int64_t mark() const { return used_; }
  void rewind(int64_t mark) { used_ = mark; }

  // Bytes to allocate; -1 where they overflow.
  int64_t total() const { return overflow_ ? -1 : most_ + kAlign; }

 private:
  static constexpr int64_t kAlign = 64;
  int64_t base_;
  int64_t used_ = 0, most_ = 0;
  bool overflow_ = false;
};

}  // namespace
}  // namespace xlmr
