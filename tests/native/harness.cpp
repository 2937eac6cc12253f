#include "harness.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace test {

Options& options() {
  static Options instance;
  return instance;
}

uint64_t Random::bits() {
  uint64_t z = (state_ += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

int64_t Random::between(int64_t low, int64_t high) {
  return low + int64_t(bits() % uint64_t(high - low + 1));
}

double Random::uniform() { return double(bits() >> 11) * 0x1p-53; }

double Random::normal() {
  const double sum = uniform() + uniform() + uniform() + uniform();
  return (sum - 2.0) * 1.7320508075688772;
}

#if defined(__x86_64__)
constexpr uint32_t kControlMask = 0xFFC0;  // without the sticky status flags
uint32_t control_bits() { return _mm_getcsr() & kControlMask; }
void set_flush_to_zero(bool on) {
  constexpr uint32_t kFlush = 0x8040;  // FTZ and DAZ
  _mm_setcsr(on ? _mm_getcsr() | kFlush : _mm_getcsr() & ~kFlush);
}
#elif defined(__aarch64__)
uint32_t control_bits() {
  uint64_t value;
  asm volatile("mrs %0, fpcr" : "=r"(value));
  return uint32_t(value);
}
void set_flush_to_zero(bool on) {
  uint64_t value;
  asm volatile("mrs %0, fpcr" : "=r"(value));
  value = on ? value | (1u << 24) : value & ~uint64_t(1u << 24);
  asm volatile("msr fpcr, %0" : : "r"(value));
}
#else
uint32_t control_bits() { return 0; }
void set_flush_to_zero(bool) {}
#endif

Line::Line(TableRef table, const char* dtype, const char* op)
    : name_(text("%-10s %-8s %-22s", table.name, dtype, op)) {
  tally().shown = 0;
}

Line::~Line() {
  std::printf("%s cases %5lld  worst error %.3f of the tolerance\n", name_.c_str(),
              static_cast<long long>(cases_), worst_);
  std::fflush(stdout);
}

void Line::begin(const std::string& sizes) {
  ++cases_;
  tally().context = name_ + " " + sizes;
}

bool selected(const char* op) { return std::strstr(op, options().op.c_str()) != nullptr; }

}  // namespace test
