// The matrix tiles of AMX: eight registers of 16 rows of 64 bytes, and the products of pairs of
// bfloat16 that they multiply; elsewhere the same in plain C++.
//
// Intel's manual, volume 2: TDPBF16PS sums the first and the second products of the pairs apart, in
// float32 from zero, adds the two sums to each other and then to the tile. Every step rounds to
// nearest, takes denormals for zeros and leaves none, whatever MXCSR says.
#pragma once

#include "core/bf16.h"
#include "cpu/isa.h"

#if defined(XLMR_ISA_AMX) && !defined(XLMR_BF16_TWIN) && !defined(XLMR_TILES_TWIN)
#define XLMR_TILES_NATIVE
#endif

namespace xlmr::XLMR_ISA {
namespace {

constexpr int kTileRows = 16, kTileBytes = 64, kTiles = 8;

#if defined(XLMR_TILES_NATIVE)

// All tiles are whole while a session lives; at its end the thread has none, so that the system
// need not save them. Written in assembler: GCC's intrinsics take literals only, and do not tell
// the compiler that they read memory.
class TileSession {
 public:
  TileSession() {
    // Palette 1, then at 16 the bytes of every tile's rows, and at 48 its rows.
    alignas(64) static constexpr uint8_t kConfig[64] = {
        1,  0,  0,  0,  0,  0,  0,  0, 0,  0, 0,  0, 0,  0, 0,  0,  //
        64, 0,  64, 0,  64, 0,  64, 0, 64, 0, 64, 0, 64, 0, 64, 0,  //
        0,  0,  0,  0,  0,  0,  0,  0, 0,  0, 0,  0, 0,  0, 0,  0,  //
        16, 16, 16, 16, 16, 16, 16, 16};
    asm volatile("ldtilecfg %0" ::"m"(kConfig));
  }
  ~TileSession() { asm volatile("tilerelease" ::: "memory"); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

template <int t>
XLMR_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(t));
}
template <int t>
XLMR_INLINE void tile_load(const void* from, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(t) : "memory");
}
template <int t>
XLMR_INLINE void tile_store(void* to, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(t) : "memory");
}
template <int sum, int a, int b>
XLMR_INLINE void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
}

#else

// The tiles of a thread. Outside of a session every use is a fault, as on the processor.
struct TileState {
  bool configured;
  uint8_t bytes[kTiles][kTileRows][kTileBytes];
};
inline TileState& tile_state() {
  static thread_local TileState state;
  return state;
}
inline uint8_t (&tile(int t)) [kTileRows][kTileBytes] {
  if (!tile_state().configured) __builtin_trap();
  return tile_state().bytes[t];
}

class TileSession {
 public:
  TileSession() { memset(&tile_state(), 0, sizeof(TileState)), tile_state().configured = true; }
  ~TileSession() { tile_state().configured = false; }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

template <int t>
void tile_zero() {
  memset(tile(t), 0, sizeof(tile(t)));
}
template <int t>
void tile_load(const void* from, int64_t stride_bytes) {
  for (int i = 0; i < kTileRows; ++i) {
    memcpy(tile(t)[i], static_cast<const char*>(from) + i * stride_bytes, kTileBytes);
  }
}
template <int t>
void tile_store(void* to, int64_t stride_bytes) {
  for (int i = 0; i < kTileRows; ++i) {
    memcpy(static_cast<char*>(to) + i * stride_bytes, tile(t)[i], kTileBytes);
  }
}
template <int sum, int a, int b>
void tile_dot_bf16() {
  constexpr int kPairs = kTileBytes / 4, kColumns = kTileBytes / 4;
  for (int i = 0; i < kTileRows; ++i) {
    uint16_t left[2 * kPairs];
    float sums[kColumns];
    memcpy(left, tile(a)[i], kTileBytes);
    memcpy(sums, tile(sum)[i], kTileBytes);
    float halves[kColumns][2] = {};
    for (int k = 0; k < kPairs; ++k) {
      uint16_t right[2 * kColumns];
      memcpy(right, tile(b)[k], kTileBytes);
      for (int j = 0; j < kColumns; ++j) {
        for (int half = 0; half < 2; ++half) {
          halves[j][half] = bf16_multiply_add(from_bf16(left[2 * k + half]),
                                              from_bf16(right[2 * j + half]), halves[j][half]);
        }
      }
    }
    for (int j = 0; j < kColumns; ++j) {
      sums[j] =
          flush_denormal(flush_denormal(sums[j]) + flush_denormal(halves[j][0] + halves[j][1]));
    }
    memcpy(tile(sum)[i], sums, kTileBytes);
  }
}

#endif

}  // namespace
}  // namespace xlmr::XLMR_ISA
