// What this processor can do at most: multiply-adds a second and bytes read a second, measured.
// Built and run by roofline.py; prints one JSON object: GFLOP/s, Gop/s, GB/s.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using Kernel = void (*)(int64_t repeats);

// Independent sums: more than the latency times the issue rate of any processor needs, and few
// enough for the registers.
constexpr int kSums = 12;

volatile float float_sink;
volatile int32_t int_sink;

#if defined(__x86_64__)

__attribute__((target("avx2,fma"))) void fma_avx2(int64_t repeats) {
  __m256 sums[kSums];
  for (__m256& sum : sums) sum = _mm256_setzero_ps();
  __m256 a = _mm256_set1_ps(float_sink), b = _mm256_set1_ps(1e-9f);
  for (int64_t i = 0; i < repeats; ++i) {
#pragma GCC unroll 12
    for (__m256& sum : sums) sum = _mm256_fmadd_ps(a, b, sum);
  }
  for (__m256& sum : sums) a = _mm256_add_ps(a, sum);
  float_sink = _mm256_cvtss_f32(a);
}

__attribute__((target("avx512f"))) void fma_avx512(int64_t repeats) {
  __m512 sums[kSums];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  __m512 a = _mm512_set1_ps(float_sink), b = _mm512_set1_ps(1e-9f);
  for (int64_t i = 0; i < repeats; ++i) {
#pragma GCC unroll 12
    for (__m512& sum : sums) sum = _mm512_fmadd_ps(a, b, sum);
  }
  for (__m512& sum : sums) a = _mm512_add_ps(a, sum);
  float_sink = _mm512_cvtss_f32(a);
}

// Products of 16-bit integers, two to a sum: what int8 costs once it is widened. In assembly, or
// the compiler computes the one product once. A step is four products, a repeat three steps.
__attribute__((target("avx2"))) void madd_avx2(int64_t repeats) {
  static_assert(kSums == 12);
  __m256i a = _mm256_set1_epi32(int_sink), b = _mm256_set1_epi16(1);
  __m256i s0 = b, s1 = b, s2 = b, s3 = b, p0, p1, p2, p3;
  for (int64_t i = 0; i < 3 * repeats; ++i) {
    __asm__ volatile(
        "vpmaddwd %[a], %[b], %[p0]\n\tvpmaddwd %[a], %[b], %[p1]\n\t"
        "vpmaddwd %[a], %[b], %[p2]\n\tvpmaddwd %[a], %[b], %[p3]\n\t"
        "vpaddd %[p0], %[s0], %[s0]\n\tvpaddd %[p1], %[s1], %[s1]\n\t"
        "vpaddd %[p2], %[s2], %[s2]\n\tvpaddd %[p3], %[s3], %[s3]"
        : [s0] "+x"(s0), [s1] "+x"(s1), [s2] "+x"(s2), [s3] "+x"(s3), [p0] "=&x"(p0),
          [p1] "=&x"(p1), [p2] "=&x"(p2), [p3] "=&x"(p3)
        : [a] "x"(a), [b] "x"(b));
  }
  a = _mm256_add_epi32(_mm256_add_epi32(s0, s1), _mm256_add_epi32(s2, s3));
  int_sink = _mm256_extract_epi32(a, 0);
}

__attribute__((target("avx2,avxvnni"))) void dot_avx2(int64_t repeats) {
  __m256i sums[kSums];
  for (__m256i& sum : sums) sum = _mm256_setzero_si256();
  __m256i a = _mm256_set1_epi32(int_sink), b = _mm256_set1_epi8(1);
  for (int64_t i = 0; i < repeats; ++i) {
#pragma GCC unroll 12
    for (__m256i& sum : sums) sum = _mm256_dpbusd_avx_epi32(sum, a, b);
  }
  for (__m256i& sum : sums) a = _mm256_add_epi32(a, sum);
  int_sink = _mm256_extract_epi32(a, 0);
}

__attribute__((target("avx512f,avx512vnni"))) void dot_avx512(int64_t repeats) {
  __m512i sums[kSums];
  for (__m512i& sum : sums) sum = _mm512_setzero_si512();
  __m512i a = _mm512_set1_epi32(int_sink), b = _mm512_set1_epi8(1);
  for (int64_t i = 0; i < repeats; ++i) {
#pragma GCC unroll 12
    for (__m512i& sum : sums) sum = _mm512_dpbusd_epi32(sum, a, b);
  }
  for (__m512i& sum : sums) a = _mm512_add_epi32(a, sum);
  int_sink = _mm512_cvtsi512_si32(a);
}

__attribute__((target("avx2"))) uint64_t read(const uint64_t* data, int64_t count) {
  __m256i sums[8] = {};
  for (int64_t i = 0; i < count; i += 32) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const auto* line = reinterpret_cast<const __m256i*>(data + i + 4 * j);
      sums[j] = _mm256_or_si256(sums[j], _mm256_loadu_si256(line));
    }
  }
  for (__m256i& sum : sums) sums[0] = _mm256_or_si256(sums[0], sum);
  return _mm256_extract_epi64(sums[0], 0);
}

#else

using Vector = float __attribute__((vector_size(16)));

void fma_vector(int64_t repeats) {
  Vector sums[kSums] = {};
  Vector a = {float_sink, 1, 1, 1}, b = {1e-9f, 1e-9f, 1e-9f, 1e-9f};
  for (int64_t i = 0; i < repeats; ++i) {
#pragma GCC unroll 12
    for (Vector& sum : sums) sum += a * b;
    __asm__ volatile("" : "+w"(a));
  }
  for (Vector& sum : sums) a += sum;
  float_sink = a[0];
}

uint64_t read(const uint64_t* data, int64_t count) {
  uint64_t sums[8] = {};
  for (int64_t i = 0; i < count; i += 8) {
    for (int j = 0; j < 8; ++j) sums[j] |= data[i + j];
  }
  for (uint64_t sum : sums) sums[0] |= sum;
  return sums[0];
}

#endif

template <typename Work>
double seconds(int threads, Work work) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
  work(0);
  for (std::thread& thread : others) thread.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// 1e9 operations a second, the best of several short runs: a peak, not an average.
double rate(Kernel kernel, double per_repeat, int threads) {
  constexpr int64_t kRepeats = 20'000'000;
  double best = 0;
  for (int run = 0; run < 7; ++run) {
    const double s = seconds(threads, [&](int) { kernel(kRepeats); });
    best = std::max(best, per_repeat * kRepeats * threads / s / 1e9);
  }
  return best;
}

// 1e9 bytes a second; each thread reads its own `bytes` over and over.
double bandwidth(int64_t bytes, int threads) {
  const int64_t count = bytes / 8;
  std::vector<std::vector<uint64_t>> data(threads, std::vector<uint64_t>(count, 1));
  const int64_t passes = std::max<int64_t>(1, (int64_t{512} << 20) / bytes);
  double best = 0;
  for (int run = 0; run < 5; ++run) {
    const double s = seconds(threads, [&](int t) {
      uint64_t sum = 0;
      for (int64_t pass = 0; pass < passes; ++pass) {
        sum |= read(data[t].data(), count);
        __asm__ volatile("" ::: "memory");  // or one pass would do for all
      }
      int_sink = static_cast<int32_t>(sum);
    });
    best = std::max(best, static_cast<double>(bytes) * passes * threads / s / 1e9);
  }
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  const int most = argc > 1 ? std::atoi(argv[1]) : 1;
  const char* separator = "";
  std::printf("{");
  for (int threads = 1;; threads = most) {
    auto print = [&](const char* name, double value) {
      std::printf("%s\"%s %d\": %.1f", separator, name, threads, value);
      separator = ", ";
    };
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) {
      print("fma avx2", rate(fma_avx2, 2 * 8 * kSums, threads));
      print("int8 avx2", rate(madd_avx2, 2 * 16 * kSums, threads));
    }
    if (__builtin_cpu_supports("avx512f")) {
      print("fma avx512", rate(fma_avx512, 2 * 16 * kSums, threads));
    }
    if (__builtin_cpu_supports("avxvnni")) {
      print("int8 avx2_vnni", rate(dot_avx2, 2 * 32 * kSums, threads));
    }
    if (__builtin_cpu_supports("avx512vnni")) {
      print("int8 avx512_vnni", rate(dot_avx512, 2 * 64 * kSums, threads));
    }
#else
    print("fma", rate(fma_vector, 2 * 4 * kSums, threads));
#endif
    print("read L2", bandwidth(int64_t{512} << 10, threads));
    print("read L3", bandwidth(int64_t{6} << 20, threads));
    print("read memory", bandwidth(int64_t{256} << 20, threads));
    if (threads == most) break;
  }
  std::printf("}\n");
}
