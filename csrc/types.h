// The few types that every layer of the core shares. No torch, no STL.
#pragma once

#include <cstdint>

namespace xlmr {

// The CPU's tables have kernels of the first two, CUDA's of all.
enum class DType : int32_t { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

inline constexpr bool is_16_bits(DType dtype) {
  return dtype == DType::bfloat16 || dtype == DType::float16;
}
inline constexpr int64_t dtype_size(DType dtype) {
  return dtype == DType::float64 ? 8 : is_16_bits(dtype) ? 2 : 4;
}

// What an op may use of the machine. Filled anew on every call: the thread count is
// torch.get_num_threads() of the calling thread, the stream is torch's current one.
struct ExecContext {
  int32_t num_threads = 1;    // upper bound, at least 1 (CPU)
  int32_t device = -1;        // CUDA device index, -1 for the CPU
  void* stream = nullptr;     // cudaStream_t of the call, null on the CPU
  void* workspace = nullptr;  // at least as many bytes as the op's workspace query answered
};

// Null on success; otherwise a message that lives until the calling thread's next call.
using Status = const char*;

}  // namespace xlmr
