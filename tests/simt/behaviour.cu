#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "behaviour.h"
#include "simt/simt.h"

namespace behaviour {
namespace {

constexpr unsigned all_lanes = 0xffffffffu;
int failures = 0;

template <class Body>
void in_every_schedule(Body body) {
  for (simt::Schedule schedule : simt::schedules) {
    simt::set_schedule(schedule);
    body();
  }
  simt::set_schedule(simt::Schedule::forward);
}

// --- Indices -------------------------------------------------------------------------------------
__global__ void count_visits(int* visits) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  visits[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1;
}

void test_indices() {
  in_every_schedule([] {
    std::vector<int> visits(3 * 2 * 2 * 5 * 3 * 2, 0);
    int* data = visits.data();
    simt::launch("count_visits", dim3(3, 2, 2), dim3(5, 3, 2), 0, [=] { count_visits(data); });
    check(visits == std::vector<int>(visits.size(), 1), "each thread of each block runs once");
  });
}

// --- Collectives ---------------------------------------------------------------------------------
// Ten answers for each thread.
__global__ void all_collectives(int* out) {
  const int t = int(threadIdx.x);
  const int lane = t % warpSize;
  int* mine = out + 10 * t;
  mine[0] = __shfl_sync(all_lanes, t, 3);
  mine[1] = __shfl_sync(all_lanes, t, lane + 1, 8);
  mine[2] = __shfl_up_sync(all_lanes, t, 2);
  mine[3] = __shfl_down_sync(all_lanes, t, 2, 4);
  mine[4] = __shfl_xor_sync(all_lanes, t, 1);
  mine[5] = int(__ballot_sync(all_lanes, lane % 3 == 0));
  mine[6] = __any_sync(all_lanes, t == 35);
  mine[7] = __all_sync(all_lanes, t < 35);
  mine[8] = int(__shfl_xor_sync(all_lanes, double(t) + 0.5, 4));
  __syncwarp();
  mine[9] = int(__shfl_xor_sync(all_lanes, (long long)(t) << 40, 2) >> 40);
}

void test_collectives() {
  in_every_schedule([] {
    constexpr int threads = 32 + 8;  // the second warp is a part of one
    std::vector<int> out(10 * threads, -1);
    int* data = out.data();
    simt::launch("all_collectives", 1, threads, 0, [=] { all_collectives(data); });
    bool right = true;
    for (int t = 0; t < threads; ++t) {
      const int lane = t % 32, first = t - lane;
      const int lanes = first ? 8 : 32;
      int ballot = 0;
      for (int i = 0; i < lanes; i += 3) ballot |= 1 << i;
      const int want[10] = {first + 3,
                            t / 8 * 8 + (lane + 1) % 8,
                            lane >= 2 ? t - 2 : t,
                            t % 4 < 2 ? t + 2 : t,
                            t ^ 1,
                            ballot,
                            first == 32,
                            first == 0,
                            t ^ 4,
                            t ^ 2};
      right = right && std::memcmp(want, &out[10 * t], sizeof want) == 0;
    }
    check(right, "shuffles and votes, of a whole warp and of one with 8 lanes");
  });
}

// Collectives and barriers many times over: a lane is never more than one ahead.
__global__ void sums(const float* in, float* out, int n) {
  float* partial = static_cast<float*>(simt::shared_memory());
  const int t = int(threadIdx.x);
  const int warps = int(blockDim.x) / warpSize;
  for (int row = int(blockIdx.x); row < n; row += int(gridDim.x)) {
    float sum = in[row * int(blockDim.x) + t];
    for (int d = warpSize / 2; d > 0; d /= 2) sum += __shfl_xor_sync(all_lanes, sum, d);
    if (t % warpSize == 0) partial[t / warpSize] = sum;
    __syncthreads();
    float total = 0;
    for (int w = 0; w < warps; ++w) total += partial[w];
    __syncthreads();
    out[row * int(blockDim.x) + t] = total;
  }
}

void test_sums() {
  constexpr int rows = 50, threads = 128;
  std::vector<float> in(rows * threads);
  for (size_t i = 0; i < in.size(); ++i) in[i] = float(i * 7919 % 1009);
  in_every_schedule([&] {
    std::vector<float> out(in.size(), -1);
    const float* from = in.data();
    float* to = out.data();
    simt::launch("sums", 7, threads, threads / 32 * sizeof(float), [=] { sums(from, to, rows); });
    bool right = true;
    for (int row = 0; row < rows; ++row) {
      float want = 0;
      for (int t = 0; t < threads; ++t) want += in[size_t(row * threads + t)];
      for (int t = 0; t < threads; ++t) right = right && out[size_t(row * threads + t)] == want;
    }
    check(right, "sums of rows through shuffles and shared memory");
  });
}

// Warps may end early where no barrier follows.
__global__ void whole_warps_end(float* out) {
  if (threadIdx.x < 64) return;
  out[threadIdx.x] = __shfl_xor_sync(all_lanes, float(threadIdx.x), 1);
}

void test_ended_warps() {
  in_every_schedule([] {
    std::vector<float> out(128, -1);
    float* data = out.data();
    simt::launch("whole_warps_end", 1, 128, 0, [=] { whole_warps_end(data); });
    bool right = true;
    for (unsigned i = 0; i < 128; ++i) right = right && out[i] == (i < 64 ? -1 : float(i ^ 1));
    check(right, "a shuffle after other warps have ended");
  });
}

// --- What is no race -----------------------------------------------------------------------------
// Neighbouring bytes and halves of a word, words and vectors over each other with a barrier
// between, lanes that exchange through shared memory with __syncwarp.
__global__ void shares_memory(unsigned char* bytes, uint16_t* halves, float* out) {
  auto* shared = static_cast<unsigned char*>(simt::shared_memory());
  const unsigned t = threadIdx.x, block = blockIdx.x * blockDim.x;
  bytes[block + t] = (unsigned char)(t);
  halves[block + t] = uint16_t(t);
  shared[t] = bytes[block + t];
  __syncthreads();
  float sum = 0;
  for (unsigned i = 0; i < blockDim.x; ++i) sum += shared[i];
  __syncthreads();
  auto* numbers = static_cast<float*>(simt::shared_memory());
  if (t < blockDim.x / 4) reinterpret_cast<float4*>(numbers)[t] = {sum, sum, sum, sum};
  __syncthreads();
  const float kept = numbers[t];
  __syncthreads();
  numbers[t] = kept + 1;
  __syncwarp();
  const float other = numbers[t ^ 1];
  __syncwarp();
  numbers[t] = 0;
  out[block + t] = other;
}

void test_shared_use() {
  in_every_schedule([] {
    std::vector<unsigned char> bytes(4 * 64);
    std::vector<uint16_t> halves(bytes.size());
    std::vector<float> out(bytes.size());
    unsigned char* to_bytes = bytes.data();
    uint16_t* to_halves = halves.data();
    float* to = out.data();
    // Twice, with the blocks in other places: launches are ordered.
    for (unsigned threads : {64, 128}) {
      simt::launch("shares_memory", unsigned(bytes.size()) / threads, threads,
                   threads * sizeof(float), [=] { shares_memory(to_bytes, to_halves, to); });
      check(out == std::vector<float>(out.size(), float(threads * (threads - 1) / 2 + 1)),
            "memory that is shared as it should be");
    }
  });
}

// --- Order ---------------------------------------------------------------------------------------
struct Order {
  unsigned count = 0;
  unsigned seen[256];
};

// All threads write here, unseen by the race detector.
__attribute__((noinline, no_sanitize("thread"))) void note(Order* order, unsigned block,
                                                           unsigned thread) {
  order->seen[order->count++] = block * 1000 + thread;
}

__global__ void note_order(Order* order) {
  const unsigned lane = threadIdx.x % 32;
  if (lane == 0 || lane == 31) note(order, blockIdx.x, threadIdx.x);
  __syncwarp();
  if (lane == 0) note(order, blockIdx.x, threadIdx.x);
}

std::vector<unsigned> order_of(unsigned blocks, unsigned threads, simt::Schedule schedule,
                               uint64_t seed) {
  Order order;
  Order* to = &order;
  simt::set_schedule(schedule, seed);
  simt::launch("note_order", blocks, threads, 0, [=] { note_order(to); });
  return {order.seen, order.seen + order.count};
}

void test_order() {
  using simt::Schedule;
  using Seen = std::vector<unsigned>;  // block * 1000 + thread
  check(order_of(2, 64, Schedule::forward, 1) ==
            Seen{0, 31, 0, 32, 63, 32, 1000, 1031, 1000, 1032, 1063, 1032},
        "order of forward");
  check(order_of(2, 64, Schedule::reverse, 1) ==
            Seen{1063, 1032, 1032, 1031, 1000, 1000, 63, 32, 32, 31, 0, 0},
        "order of reverse");
  check(order_of(3, 64, Schedule::lockstep, 1) == Seen{0, 31, 32, 63, 0, 32, 2000, 2031, 2032, 2063,
                                                       2000, 2032, 1000, 1031, 1032, 1063, 1000,
                                                       1032},
        "order of lockstep");
  const Seen drawn = order_of(4, 128, Schedule::random, 1);
  check(drawn == order_of(4, 128, Schedule::random, 1), "random repeats with its seed");
  check(drawn != order_of(4, 128, Schedule::random, 2), "random differs with its seed");
}

// --- Launches ------------------------------------------------------------------------------------
void test_launches() {
  const auto answer = [](dim3 grid, dim3 block, size_t shared) {
    const char* error = simt::launch("nothing", grid, block, shared, [] {});
    return std::string(error ? error : "");
  };
  const std::string configuration = "cudaErrorInvalidConfiguration";
  check(answer(1, 1024, simt::max_shared_bytes).empty(), "the largest block");
  check(answer(0, 32, 0) == configuration, "an empty grid");
  check(answer(dim3(1, 65536), 32, 0) == configuration, "a grid too high");
  check(answer(1, 0, 0) == configuration, "an empty block");
  check(answer(1, 1056, 0) == configuration, "a block too large");
  check(answer(1, dim3(1, 1, 65), 0) == configuration, "a block too deep");
  check(answer(1, 32, simt::max_shared_bytes + 1) == "cudaErrorInvalidValue",
        "too much shared memory");

  const uint64_t before = simt::counters().switches;
  answer(10, 1024, 0);
  check(simt::counters().switches - before == 20, "threads that never wait share a fiber");
}

void test_os_threads() {
  std::vector<std::thread> threads;
  std::vector<std::vector<float>> outs(4, std::vector<float>(50 * 128, -1));
  const std::vector<float> in(50 * 128, 1);
  for (auto& out : outs) {
    threads.emplace_back([&in, &out] {
      const float* from = in.data();
      float* to = out.data();
      for (int i = 0; i < 20; ++i) {
        simt::launch("sums", 7, 128, 4 * sizeof(float), [=] { sums(from, to, 50); });
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (const auto& out : outs) {
    check(out == std::vector<float>(out.size(), 128), "launches from several threads at once");
  }
}

}  // namespace

void check(bool ok, const char* what) {
  if (ok) return;
  ++failures;
  std::printf("FAILED: %s\n", what);
}

int run() {
  test_indices();
  test_collectives();
  test_sums();
  test_ended_warps();
  test_shared_use();
  test_order();
  test_ptx();
  test_launches();
  test_os_threads();
  return failures;
}

}  // namespace behaviour
