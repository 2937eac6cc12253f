// What products in bfloat16 stand on: the layout of their weights, and the instructions, on
// hardware and as twins, against their definition: all the same bits.
#include "bfloat16.h"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cfenv>
#include <csignal>

#include "bfloat16_units.h"
#include "core/cpu_features.h"
#include "packed.h"

namespace xlmr {
namespace avx512_bf16_twin {
extern const test::Bf16Units bf16_units;
}
namespace amx_twin {
extern const test::Bf16Units bf16_units;
}
namespace amx_tiles_twin {
extern const test::Bf16Units bf16_units;
}
namespace amx_units {
extern const test::Bf16Units bf16_units;
}
}  // namespace xlmr

namespace test {
namespace {

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
float of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// --- The definition (Intel's manual, volume 2) ---------------------------------------------------

// vcvtneps2bf16
uint16_t round_bits(uint32_t bits) {
  const float x = of_bits(bits);
  if (std::isnan(x)) return uint16_t(bits >> 16 | 0x40);
  return uint16_t(bits_of(float(as_bf16(double(x)))) >> 16);
}

float flushed(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}

// a b + c, rounded once. The exact sum is a double and what its rounding lost; a loss makes the
// last digit odd, and so the rounding to float sees it.
float fused(float a, float b, float c) {
  const double product = double(flushed(a)) * double(flushed(b)), addend = double(flushed(c));
  double sum = product + addend;
  if (!std::isfinite(sum) || sum == 0) return float(sum);
  const double part = sum - product;
  const double lost = (product - (sum - part)) + (addend - part);
  uint64_t digits;
  std::memcpy(&digits, &sum, sizeof digits);
  if (lost != 0 && digits % 2 == 0) {
    digits = (lost > 0) == (sum > 0) ? digits + 1 : digits - 1;
    std::memcpy(&sum, &digits, sizeof digits);
  }
  int exponent = 0;
  const float fraction = float(std::frexp(sum, &exponent));  // 24 digits, however small it is
  const double rounded = std::ldexp(double(fraction), exponent);
  return std::fabs(rounded) < double(std::numeric_limits<float>::min())
             ? std::copysign(0.0f, fraction)
             : float(rounded);
}

float half_of(uint32_t pair, int half) { return of_bits(half == 0 ? pair << 16 : pair & ~0xffffu); }

// vdpbf16ps: the upper halves first.
float pair_dot(float sum, uint32_t a, uint32_t b) {
  sum = fused(half_of(a, 1), half_of(b, 1), sum);
  return fused(half_of(a, 0), half_of(b, 0), sum);
}

// TDPBF16PS: lower and upper halves apart, from zero; then both, then the tile.
float tile_element(float sum, const uint32_t* a, const uint32_t* b) {
  float halves[2] = {0, 0};
  for (int k = 0; k < 16; ++k) {
    for (int half = 0; half < 2; ++half) {
      halves[half] = fused(half_of(a[k], half), half_of(b[16 * k], half), halves[half]);
    }
  }
  return fused(1, sum, fused(1, halves[0], halves[1]));
}

// --- Operands ------------------------------------------------------------------------------------

// Bits of all kinds: any; numbers near to one, which cancel; of a few orders of magnitude, which
// round away; special ones; and products about the smallest normal number.
enum class Kind { any, near_one, spread, special, tiny };
constexpr Kind kKinds[] = {Kind::any, Kind::near_one, Kind::spread, Kind::special, Kind::tiny};

uint32_t with_exponent(uint64_t bits, uint32_t exponent) {
  return (uint32_t(bits) & 0x807fffffu) | exponent << 23;
}

uint32_t random_sum(Random& random, Kind kind) {
  static const std::vector<uint32_t> special = {
      0,          0x80000000, 1,          0x80000001, 0x007fffff, 0x00800000,
      0x80800000, 0x7f800000, 0xff800000, 0x7fc12345, 0x7fa12345, 0xffa00001,
      0x7f7fffff, 0xff7fffff, 0x3f800000, 0xbf800000, 0x3f7fffff};
  const uint64_t bits = random.bits();
  if (kind == Kind::special) return random.pick(special);
  if (kind == Kind::near_one) return with_exponent(bits, uint32_t(random.between(124, 129)));
  if (kind == Kind::spread) return with_exponent(bits, uint32_t(random.between(96, 159)));
  if (kind == Kind::tiny) {  // a few units from the smallest normal number, or any beside it
    const uint32_t few = uint32_t(random.between(0x007ffffe, 0x00800004));
    return (random.chance(0.5) ? few : with_exponent(bits, uint32_t(random.between(0, 3)))) |
           (uint32_t(bits >> 32) & 0x80000000u);
  }
  return uint32_t(bits);
}

uint32_t random_half(Random& random, Kind kind) {
  static const std::vector<uint32_t> special = {
      0,      0x8000, 1,      0x8001, 0x007f, 0x0080, 0x8080, 0x7f80, 0xff80, 0x7fc0,
      0x7fa1, 0xffa2, 0x7f7f, 0xff7f, 0x3f80, 0xbf80, 0x4000, 0x0100, 0x3f81};
  const uint64_t bits = random.bits();
  const auto exponent = [&](int64_t low, int64_t high) {
    return with_exponent(bits << 16, uint32_t(random.between(low, high))) >> 16;
  };
  if (kind == Kind::special) return random.pick(special);
  if (kind == Kind::near_one) return exponent(121, 128);
  if (kind == Kind::spread) return exponent(112, 143);
  if (kind == Kind::tiny) {  // whole powers of two make ties
    const uint32_t half = exponent(48, 70);
    return random.chance(0.4) ? half & 0xff80u : half;
  }
  return uint32_t(bits & 0xffff);
}

uint32_t random_pair(Random& random, Kind kind) {
  // One product alone, too.
  const uint32_t upper = random.chance(0.3) ? 0 : random_half(random, kind);
  return random_half(random, kind) | upper << 16;
}

// --- The instructions against the definition -----------------------------------------------------

void check_same(const char* what, float got, float want, uint32_t a, uint32_t b, float sum) {
  // Which of several NaN comes out is the processor's affair, but it is a quiet one.
  const bool same = std::isnan(want) ? std::isnan(got) && (bits_of(got) & 0x00400000u) != 0
                                     : bits_of(got) == bits_of(want);
  CHECK(same, "%s: %08x and pairs %08x, %08x give %08x, expected %08x", what, bits_of(sum), a, b,
        bits_of(got), bits_of(want));
}

// Rounding up and flush to zero: instructions of bfloat16 do not ask the control word; twins do.
class OtherModes {
 public:
  explicit OtherModes(bool on) {
    if (on) std::fesetround(FE_UPWARD);
    set_flush_to_zero(on);
  }
  ~OtherModes() {
    set_flush_to_zero(false);
    std::fesetround(FE_TONEAREST);
  }
};

void check_dot(const Bf16Units& units, Random& random, int64_t rounds, bool other_modes) {
  constexpr int64_t kCount = 64;
  float sum[kCount], got[kCount];
  uint32_t a[kCount], b[kCount];
  for (const Kind kind : kKinds) {
    for (int64_t round = 0; round < rounds; ++round) {
      for (int64_t i = 0; i < kCount; ++i) {
        sum[i] = of_bits(random_sum(random, kind));
        a[i] = random_pair(random, kind);
        b[i] = random_pair(random, kind);
      }
      {
        const OtherModes modes(other_modes);
        units.dot(kCount, sum, a, b, got);
      }
      for (int64_t i = 0; i < kCount; ++i) {
        check_same("dot product", got[i], pair_dot(sum[i], a[i], b[i]), a[i], b[i], sum[i]);
      }
    }
  }
}

// Every upper half with lower halves before, at and behind the middle, in both places of a pair.
void check_rounding(const Bf16Units& units) {
  std::vector<float> x;
  const uint32_t step = options().quick ? 37 : 1;
  for (uint32_t upper = 0; upper < 0x10000; upper += step) {
    for (const uint32_t lower : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      x.push_back(of_bits(upper << 16 | lower));
    }
  }
  x.resize(x.size() / 32 * 32);
  const size_t count = x.size();
  const std::vector<float> reversed(x.rbegin(), x.rend());
  std::vector<uint16_t> want;
  for (const float value : x) want.push_back(round_bits(bits_of(value)));
  std::vector<uint32_t> joined(count), adjoining(count / 2);
  units.join(int64_t(count), x.data(), reversed.data(), joined.data());
  units.neighbours(int64_t(count / 2), x.data(), adjoining.data());
  for (size_t i = 0; i < count; ++i) {
    const uint32_t pair = want[i] | uint32_t{want[count - 1 - i]} << 16;
    CHECK(joined[i] == pair, "%08x and %08x are joined to %08x, expected %08x", bits_of(x[i]),
          bits_of(reversed[i]), joined[i], pair);
    const uint32_t half = adjoining[i / 2] >> (i % 2 * 16) & 0xffff;
    CHECK(half == want[i], "%08x among neighbours becomes %04x, expected %04x", bits_of(x[i]), half,
          unsigned(want[i]));
  }
}

void check_tile_dot(const Bf16Units& units, Random& random, int64_t rounds, bool other_modes) {
  float sum[256], got[256];
  uint32_t a[256], b[256];
  for (const Kind kind : kKinds) {
    for (int64_t round = 0; round < rounds; ++round) {
      for (int i = 0; i < 256; ++i) {
        sum[i] = of_bits(random_sum(random, kind));
        a[i] = random_pair(random, kind);
        b[i] = random_pair(random, kind);
        // NaN spreads; with few of them the rest is seen, too.
        if (kind == Kind::special && random.chance(0.9)) a[i] = 0;
      }
      {
        const OtherModes modes(other_modes);
        units.tile_dot(sum, a, b, got);
      }
      for (int i = 0; i < 256; ++i) {
        const float want = tile_element(sum[i], a + i / 16 * 16, b + i % 16);
        check_same("tile", got[i], want, a[i / 16 * 16], b[i % 16], sum[i]);
      }
    }
  }
}

// A tile that is used where no session is ends the process, whatever was before.
void check_faults(const Bf16Units& units) {
  for (const bool after_session : {false, true}) {
    for (int use = 0; use < 4; ++use) {
      std::fflush(stdout);
      const pid_t child = fork();
      if (child == 0) {
        // Sanitizers and emulators have handlers of their own; a core file is of no use.
        for (const int number : {SIGILL, SIGTRAP, SIGSEGV}) std::signal(number, SIG_DFL);
        const rlimit none{0, 0};
        setrlimit(RLIMIT_CORE, &none);
        units.use_tile(use, after_session);
        _exit(0);
      }
      int status = 0;
      waitpid(child, &status, 0);
      const bool fault =
          WIFSIGNALED(status) && (WTERMSIG(status) == SIGILL || WTERMSIG(status) == SIGTRAP);
      CHECK(fault, "use %d of a tile %s: wait status %d, expected a fault", use,
            after_session ? "after a session" : "without a session", status);
    }
  }
}

void check_units(const char* name, const Bf16Units& units, bool is_twin) {
  tally().context = std::string("the instructions of ") + name;
  tally().shown = 0;
  Random random(41);
  for (const bool other_modes : {false, true}) {
    if (other_modes && is_twin) continue;
    check_dot(units, random, options().quick ? 20 : 1500, other_modes);
    if (units.tile_dot != nullptr) {
      check_tile_dot(units, random, options().quick ? 2 : 20, other_modes);
    }
  }
  check_rounding(units);
  if (units.use_tile != nullptr) check_faults(units);
  std::printf("bf16_units: %s: the bits of the definition\n", name);
}

// --- Layout --------------------------------------------------------------------------------------

void check_layout(Random& random, int64_t out, int64_t in) {
  tally().context =
      text("the layout of bfloat16 weights, out=%lld in=%lld", (long long)out, (long long)in);
  std::vector<float> weight;
  for (int64_t i = 0; i < out * in; ++i) {
    const Kind kind = kKinds[random.between(0, 4)];
    weight.push_back(of_bits(random_sum(random, kind)));
  }
  const PackedBf16 packed(weight, out, in);
  const int64_t channels = (out + 31) / 32 * 32, depth = (in + 31) / 32 * 32;
  if (!CHECK(int64_t(packed.values().size()) == channels * depth, "size")) return;
  for (int64_t o = 0; o < channels; ++o) {
    for (int64_t k = 0; k < depth; ++k) {
      const bool real = o < out && k < in;
      const uint16_t want = real ? round_bits(bits_of(weight[size_t(o * in + k)])) : uint16_t(0);
      const int64_t at = ((o / 32 * (depth / 2) + k / 2) * 32 + o % 32) * 2 + k % 2;
      CHECK(packed.values()[size_t(at)] == want, "weight %lld, %lld", (long long)o, (long long)k);
    }
  }
}

void check_layout_size() {
  tally().context = "packed_bf16_bytes";
  const std::vector<int64_t> sizes = sizes_up_to_overflow({1, 2, 31, 32, 33, 64, 65, 100});
  for (const int64_t out : sizes) {
    for (const int64_t in : sizes) {
      // Each rounded up is below 2^64, and so is a quarter of what the product of both may be.
      const unsigned __int128 elements = (static_cast<unsigned __int128>(out) + 31) / 32 * 32 *
                                         ((static_cast<unsigned __int128>(in) + 31) / 32 * 32);
      const bool fits = elements <= uint64_t(std::numeric_limits<int64_t>::max()) / 2;
      const int64_t bytes = xlmr::packed_bf16_bytes(out, in);
      if (!CHECK(bytes == (fits ? int64_t(elements) * 2 : -1), "[%lld, %lld] takes %lld",
                 (long long)out, (long long)in, (long long)bytes)) {
        return;
      }
    }
  }
}

}  // namespace

void test_bf16_layout() {
  if (!selected("bf16_layout")) return;
  tally().shown = 0;
  check_layout_size();
  Random random(40);
  for (const int64_t out : {1, 31, 32, 33, 65}) {
    for (const int64_t in : {1, 2, 31, 32, 33, 67}) check_layout(random, out, in);
  }
  std::printf("bf16_layout: sizes, weights, padding\n");
}

void test_bf16_units() {
  if (!selected("bf16_units")) return;
  const auto run = [](const char* name, const Bf16Units& units, uint32_t required) {
    const char* missing = xlmr::missing_feature(required, xlmr::cpu_features());
    if (missing == nullptr) {
      check_units(name, units, required == 0);
    } else {
      std::printf("bf16_units: %s: not run: this processor has no %s\n", name, missing);
    }
  };
  run("avx512_bf16_twin", xlmr::avx512_bf16_twin::bf16_units, 0);
  run("amx_twin", xlmr::amx_twin::bf16_units, 0);
#if defined(XLMR_HAVE_AVX512_BF16)
  Bf16Units dots = xlmr::amx_tiles_twin::bf16_units;
  dots.tile_dot = nullptr;  // those are twins there
  dots.use_tile = nullptr;
  run("avx512_bf16", dots, xlmr::kFeatureAvx512 | xlmr::kFeatureAvx512Bf16);
#endif
#if defined(XLMR_HAVE_AMX)
  run("amx", xlmr::amx_units::bf16_units,
      xlmr::kFeatureAvx512 | xlmr::kFeatureAvx512Bf16 | xlmr::kFeatureAmxBf16);
#endif
}

}  // namespace test
