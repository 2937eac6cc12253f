// Instructions that CUDA C++ has no words for: tensor core products, loads of their operands, and
// asynchronous copies into shared memory; compute capability 8.0 and newer. All lanes of a warp
// must come to mma and ldmatrix together. tests/simt/simt/ptx.h has the same functions for the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace ptx {

// C (16 x 8, float32) += A (16 x 16) B (16 x 8). In lane 4 g + t:
//   a[0], a[1]  rows g, g + 8, columns 2 t, 2 t + 1 of A; a[2], a[3] the same of columns + 8
//   b[0], b[1]  rows 2 t, 2 t + 1 of B's column g; those + 8
//   c           columns 2 t, 2 t + 1 of rows g; of g + 8
// The element of lower index is in the lower half of a register.
#define XLMR_MMA(name, type)                                                          \
  __device__ __forceinline__ void name(float (&c)[4], const uint32_t (&a)[4],         \
                                       const uint32_t (&b)[2]) {                      \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type               \
                 ".f32 "                                                              \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"    \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])); \
  }
XLMR_MMA(mma_bf16, "bf16")
XLMR_MMA(mma_f16, "f16")
#undef XLMR_MMA

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

// 1, 2 or 4 matrices of 8 x 8 elements of 16 bits from shared memory. Lanes 8 i to 8 i + 7 give the
// address of a row of matrix i, aligned to 16 bytes (other lanes' is not looked at). Lane 4 r + p
// receives in registers[i] elements 2 p and 2 p + 1 of row r; with _trans, of column r.
#define XLMR_LDMATRIX(name, modifier)                                                             \
  template <int matrices>                                                                         \
  __device__ __forceinline__ void name(uint32_t (&registers)[matrices], const void* row) {        \
    static_assert(matrices == 1 || matrices == 2 || matrices == 4, "x1, x2 or x4");               \
    if constexpr (matrices == 1) {                                                                \
      asm volatile("ldmatrix.sync.aligned.m8n8.x1" modifier ".shared.b16 {%0}, [%1];"             \
                   : "=r"(registers[0])                                                           \
                   : "r"(shared_address(row))                                                     \
                   : "memory");                                                                   \
    } else if constexpr (matrices == 2) {                                                         \
      asm volatile("ldmatrix.sync.aligned.m8n8.x2" modifier ".shared.b16 {%0, %1}, [%2];"         \
                   : "=r"(registers[0]), "=r"(registers[1])                                       \
                   : "r"(shared_address(row))                                                     \
                   : "memory");                                                                   \
    } else {                                                                                      \
      asm volatile("ldmatrix.sync.aligned.m8n8.x4" modifier ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                   : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]),                  \
                     "=r"(registers[3])                                                           \
                   : "r"(shared_address(row))                                                     \
                   : "memory");                                                                   \
    }                                                                                             \
  }
XLMR_LDMATRIX(ldmatrix, "")
XLMR_LDMATRIX(ldmatrix_trans, ".trans")
#undef XLMR_LDMATRIX

// Begins to copy 16 bytes, or to write 16 zeros where not `valid` (`global` is then not read, but
// must be aligned); both addresses aligned to 16 bytes. cp_async_commit makes a group of the
// thread's copies since the last; cp_async_wait<n> waits until at most the n newest groups are on
// their way. Other threads see the copies after a barrier that follows the wait.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid = true) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int groups_left>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
}

// Two numbers rounded to nearest, ties to even, in one register; and back.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ float2 unpack_bf16(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
__device__ __forceinline__ float2 unpack_f16(uint32_t pair) {
  float2 both;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\n"
      "cvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
      : "=f"(both.x), "=f"(both.y)
      : "r"(pair));
  return both;
}

}  // namespace ptx
