#include <vector>

#include "one_block.h"
#include "planted.h"
#include "simt/simt.h"

namespace planted {
namespace {

constexpr unsigned all_lanes = 0xffffffffu;

float* shared() { return static_cast<float*>(simt::shared_memory()); }

// --- Barriers left out ---------------------------------------------------------------------------
__global__ void missing_syncthreads(float* out, bool bug) {
  float* values = shared();
  const unsigned t = threadIdx.x;
  values[t] = float(t);
  if (!bug) __syncthreads();
  out[t] = values[t ^ 32];
}

// The shuffle between makes the warps of "lockstep" write before any reads.
__global__ void missing_syncthreads_after_shuffle(float* out, bool bug) {
  float* values = shared();
  const unsigned t = threadIdx.x;
  values[t] = __shfl_xor_sync(all_lanes, float(t), 1);
  __shfl_xor_sync(all_lanes, 0.0f, 1);
  if (!bug) __syncthreads();
  out[t] = values[t ^ 33];
}

// Each warp reads what the warp below wrote; that one has run before in "forward".
__global__ void missing_syncthreads_from_below(float* out, bool bug) {
  float* values = shared();
  const unsigned t = threadIdx.x;
  values[t] = float(t);
  if (!bug) __syncthreads();
  out[t] = t < 32 ? float(t) : values[t - 32];
}

// The second barrier of two: the buffer is written again while other warps still read.
__global__ void reused_too_early(float* out, bool bug) {
  float* sums = shared();
  const unsigned t = threadIdx.x;
  const unsigned warps = blockDim.x / warpSize;
  float total[2];
  for (int round = 0; round < 2; ++round) {
    if (t % warpSize == 0) sums[t / warpSize] = float(round + 1);
    __syncthreads();
    total[round] = 0;
    for (unsigned w = 0; w < warps; ++w) total[round] += sums[w];
    if (!bug) __syncthreads();
  }
  out[t] = 10 * total[0] + total[1];
}

__global__ void missing_syncwarp(float* out, bool bug) {
  float* values = shared();
  const unsigned lane = threadIdx.x;
  values[lane] = float(lane);
  if (!bug) __syncwarp();
  out[lane] = lane == 0 ? 0 : values[lane - 1];
}

// A shuffle is no barrier for memory, though here it happens to wait for all lanes.
__global__ void shuffle_for_syncwarp(float* out, bool bug) {
  float* values = shared();
  const unsigned lane = threadIdx.x;
  values[lane] = float(lane);
  __shfl_xor_sync(all_lanes, 0, 1);
  if (!bug) __syncwarp();
  out[lane] = lane == 0 ? 0 : values[lane - 1];
}

// --- Divergence ----------------------------------------------------------------------------------
__global__ void divergent_shuffle(float* out, bool bug) {
  const unsigned lane = threadIdx.x;
  const float value = float(lane);
  if (bug && lane >= 16) {
    out[lane] = __shfl_xor_sync(all_lanes, value, 1);
  } else {
    out[lane] = __shfl_xor_sync(all_lanes, value, 1);
  }
}

__global__ void shuffle_of_half_a_warp(float* out, bool bug) {
  const unsigned lane = threadIdx.x;
  float value = float(lane);
  if (!bug || lane < 16) value = __shfl_xor_sync(all_lanes, value, 1);
  __syncthreads();
  out[lane] = value;
}

__global__ void mask_without_its_lanes(float* out, bool bug) {
  const unsigned lane = threadIdx.x;
  out[lane] = __shfl_xor_sync(bug ? 0x0000ffffu : all_lanes, float(lane), 1);
}

__global__ void lane_ends_before_shuffle(float* out, bool bug) {
  const unsigned lane = threadIdx.x;
  out[lane] = float(lane ^ 1);
  if (bug && lane == 31) return;
  out[lane] = __shfl_xor_sync(all_lanes, float(lane), 1);
}

// 40 threads: the second warp has lanes 0 to 7.
__global__ void shuffle_from_absent_lane(float* out, bool bug) {
  const unsigned t = threadIdx.x;
  const unsigned lane = t % warpSize;
  const unsigned last = t < 32 ? 31 : bug ? 8 : 7;
  out[t] = __shfl_sync(all_lanes, float(lane), int(last));
}

__global__ void divergent_syncthreads(float* out, bool bug) {
  float* values = shared();
  const unsigned t = threadIdx.x;
  values[t] = float(t);
  if (bug && t >= 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[t] = values[t ^ 32];
}

__global__ void syncthreads_of_one_warp(float* out, bool bug) {
  float* values = shared();
  const unsigned t = threadIdx.x;
  values[t] = float(t);
  if (!bug || t < 32) __syncthreads();
  out[t] = float(t ^ 32);
}

__global__ void thread_ends_before_syncthreads(float* out, bool bug) {
  const unsigned t = threadIdx.x;
  out[t] = float(t);
  if (bug && t == 63) return;
  __syncthreads();
}

// --- Memory --------------------------------------------------------------------------------------
// Shared memory is for one number a thread.
__global__ void shared_overrun(float* out, bool bug) {
  float* values = shared();
  const unsigned t = threadIdx.x;
  values[bug ? t + 1 : t] = float(t);
  __syncthreads();
  out[t] = values[bug ? t + 1 : t];
}

__global__ void uninitialised_shared(float* out, bool bug) {
  float* values = shared();
  const unsigned t = threadIdx.x;
  if (!bug || t != 5) values[t] = float(t);
  __syncthreads();
  out[t] = values[t ^ 1];
}

__global__ void misaligned_vector(float* out, bool bug) {
  float* values = shared();
  const unsigned t = threadIdx.x;
  values[t] = float(t);
  __syncthreads();
  if (t < 15) {
    const float* from = values + 4 * t + (bug ? 1 : 0);
    const float4 four = *reinterpret_cast<const float4*>(from);
    out[t] = four.x - (bug ? 1 : 0);
  }
}

// --- Between blocks ------------------------------------------------------------------------------
// Block after block, nothing is lost here; on a device, it is.
__global__ void lost_update(float* out, bool bug) {
  if (threadIdx.x == 0) out[bug ? 0 : blockIdx.x] += 1.0f;
}

// Each block reads what the block below writes.
__global__ void reads_another_block(float* out, const float* in, bool bug) {
  const unsigned t = blockIdx.x * blockDim.x + threadIdx.x;
  const float below = blockIdx.x == 0 ? 0 : (bug ? out : in)[t - blockDim.x];
  out[t] = below + 1.0f;
}

// Two threads of a block, one element of global memory.
__global__ void global_without_barrier(float* out, bool bug) {
  const unsigned t = threadIdx.x;
  out[128 + t] = float(t);
  if (!bug) __syncthreads();
  out[t] = t < 32 ? float(t) : out[128 + t - 32];
}

// A byte of a number that another warp wrote.
__global__ void byte_of_a_number(float* out, bool bug) {
  const unsigned t = threadIdx.x;
  out[64 + t] = 1.0f;
  if (!bug) __syncthreads();
  const unsigned other = bug ? t ^ 32 : t;
  const auto* bytes = reinterpret_cast<const unsigned char*>(out + 64 + other);
  out[t] = bytes[3] == 0xbf || bytes[3] == 0x3f ? 1 : 0;  // of -1 or 1
}

// --- The hosts -----------------------------------------------------------------------------------
bool run_lost_update(bool bug) {
  std::vector<float> out(8, 0.0f);
  float* data = out.data();
  simt::launch("lost_update", 8, 32, 0, [=] { lost_update(data, bug); });
  float sum = 0;
  for (float value : out) sum += value;
  return sum == 8;
}

bool run_reads_another_block(bool bug) {
  std::vector<float> in(8 * 32, 0.0f), out(8 * 32, 0.0f);
  const float* from = in.data();
  float* to = out.data();
  simt::launch("reads_another_block", 8, 32, 0, [=] { reads_another_block(to, from, bug); });
  for (float value : out) {
    if (value != 1) return false;
  }
  return true;
}

constexpr const char* between_warps = "no __syncthreads between";
constexpr const char* between_lanes = "no __syncwarp between";

}  // namespace

// Schedules: forward, reverse, random, lockstep.
std::vector<Case> cases() {
  return {
      {"__syncthreads left out", ONE_BLOCK(missing_syncthreads, 64, 64, i ^ 32), between_warps,
       "wwww", "wwww", "ssss"},
      {"__syncthreads left out after a shuffle",
       ONE_BLOCK(missing_syncthreads_after_shuffle, 64, 64, i ^ 32), between_warps, "www-", "www-",
       "ssss"},
      {"__syncthreads left out, read from the warp below",
       ONE_BLOCK(missing_syncthreads_from_below, 128, 128, (i < 32 ? i : i - 32)), between_warps,
       "-ww-", "-ww-", "ssss"},
      {"shared memory written again too early", ONE_BLOCK(reused_too_early, 64, 64, 24),
       "race:", "wwww", "wwww", "ssss"},
      {"__syncwarp left out", ONE_BLOCK(missing_syncwarp, 32, 32, (i == 0 ? 0 : i - 1)),
       between_lanes, "-ww-", "-ww-", "ssss"},
      {"a shuffle in place of __syncwarp",
       ONE_BLOCK(shuffle_for_syncwarp, 32, 32, (i == 0 ? 0 : i - 1)), between_lanes, "----", "----",
       "ssss"},
      {"a shuffle in each of two branches", ONE_BLOCK(divergent_shuffle, 32, 32, i ^ 1),
       "different collectives", "ssss", "ssss", "ssss"},
      {"a shuffle of half a warp", ONE_BLOCK(shuffle_of_half_a_warp, 32, 32, i ^ 1), "deadlock",
       "ssss", "ssss", "ssss"},
      {"a mask without its lanes", ONE_BLOCK(mask_without_its_lanes, 32, 32, i ^ 1),
       "leaves out lanes", "ssss", "ssss", "ssss"},
      {"a lane ends before a shuffle", ONE_BLOCK(lane_ends_before_shuffle, 32, 32, i ^ 1), "ended",
       "ssss", "ssss", "ssss"},
      {"a shuffle from a lane that is not there",
       ONE_BLOCK(shuffle_from_absent_lane, 40, 40, (i < 32 ? 31 : 7)), "does not have", "ssss",
       "ssss", "ssss"},
      {"__syncthreads in each of two branches", ONE_BLOCK(divergent_syncthreads, 64, 64, i ^ 32),
       "different __syncthreads", "ssss", "ssss", "ssss"},
      {"__syncthreads of one warp", ONE_BLOCK(syncthreads_of_one_warp, 64, 64, i ^ 32), "ended",
       "ssss", "ssss", "ssss"},
      {"a thread ends before __syncthreads", ONE_BLOCK(thread_ends_before_syncthreads, 64, 64, i),
       "ended", "ssss", "ssss", "ssss"},
      {"an overrun of shared memory", ONE_BLOCK(shared_overrun, 64, 64, i), "heap-buffer-overflow",
       "----", "ssss", "----"},
      {"a read of uninitialised shared memory", ONE_BLOCK(uninitialised_shared, 64, 64, i ^ 1), "",
       "wwww", "wwww", "wwww"},
      {"a misaligned vector access", ONE_BLOCK(misaligned_vector, 64, 15, 4 * i),
       "misaligned address", "----", "ssss", "----"},
      {"an update lost between two blocks", run_lost_update, "of another block", "----", "----",
       "ssss"},
      {"one block reads what another writes", run_reads_another_block, "of another block", "w-ww",
       "w-ww", "ssss"},
      {"global memory without a barrier",
       ONE_BLOCK(global_without_barrier, 128, 128, (i < 32 ? i : i - 32)), between_warps, "-ww-",
       "-ww-", "ssss"},
      {"a byte of a number that another warp writes", ONE_BLOCK(byte_of_a_number, 64, 64, 1),
       between_warps, "----", "----", "ssss"},
  };
}

}  // namespace planted
