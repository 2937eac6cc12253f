#include "guarded.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <new>

namespace test {
namespace {

constexpr unsigned char kCanary = 0xA5;
constexpr size_t kCanaryBytes = 192;

size_t round_up(size_t value, size_t step) { return (value + step - 1) / step * step; }

}  // namespace

Placement Block::next_placement() {
  // Mixed, not in turn: with an even number of buffers to a case, one that comes in turn would
  // never meet some of the placements.
  static uint64_t state = 0;
  uint64_t z = (state += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  return static_cast<Placement>((z ^ (z >> 27)) >> 62);
}

Block::Block(size_t bytes, Placement placement, size_t alignment) : bytes_(bytes) {
  if (bytes == 0) return;
  if (placement == Placement::exact) {
    void* memory = nullptr;
    if (posix_memalign(&memory, alignment < 16 ? 16 : alignment, bytes) != 0) {
      throw std::bad_alloc();
    }
    base_ = data_ = first_ = static_cast<unsigned char*>(memory);
    last_ = data_ + bytes;
    return;
  }
  if (placement == Placement::canaries) {
    // One element past a 64-byte boundary: aligned to the element and to nothing more.
    const size_t total = 2 * kCanaryBytes + bytes + alignment;
    base_ = first_ = static_cast<unsigned char*>(std::aligned_alloc(64, round_up(total, 64)));
    if (base_ == nullptr) throw std::bad_alloc();
    last_ = base_ + total;
    data_ = base_ + kCanaryBytes + (alignment < 64 ? alignment : 0);
  } else {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    const size_t inside = round_up(bytes, page);
    mapped_ = inside + 2 * page;
    void* map = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<unsigned char*>(map);
    first_ = base_ + page;
    last_ = first_ + inside;
    if (mprotect(base_, page, PROT_NONE) != 0 || mprotect(last_, page, PROT_NONE) != 0) {
      std::perror("mprotect");
      std::abort();
    }
    data_ = placement == Placement::page_end ? last_ - round_up(bytes, alignment) : first_;
  }
  std::memset(first_, kCanary, size_t(data_ - first_));
  std::memset(data_ + bytes, kCanary, size_t(last_ - (data_ + bytes)));
}

Block::~Block() {
  if (mapped_ != 0) {
    munmap(base_, mapped_);
  } else {
    std::free(base_);
  }
}

bool Block::intact() const {
  for (const unsigned char* p = first_; p < data_; ++p) {
    if (*p != kCanary) return false;
  }
  for (const unsigned char* p = data_ + bytes_; p < last_; ++p) {
    if (*p != kCanary) return false;
  }
  return true;
}

}  // namespace test
