// One set of instructions of bfloat16, or of their twins; compiled as the kernels are.
#include "bfloat16_units.h"

#if defined(XLMR_ISA_AMX)
#include "cpu/bfloat16_tiles.h"
#else
#include "cpu/bfloat16.h"
#endif

namespace xlmr::XLMR_ISA {
namespace {

constexpr int64_t V = Vec<float>::size;

Vec<float> load(const uint32_t* pairs) {
  float bits[V];
  memcpy(bits, pairs, sizeof bits);
  return Vec<float>::load(bits);
}
void store(Vec<float> x, uint32_t* pairs) {
  float bits[V];
  x.store(bits);
  memcpy(pairs, bits, sizeof bits);
}

void dot_lanes(int64_t count, const float* sum, const uint32_t* a, const uint32_t* b, float* out) {
  for (int64_t i = 0; i < count; i += V) {
    dot(Vec<float>::load(sum + i), load(a + i), load(b + i)).store(out + i);
  }
}
void join_lanes(int64_t count, const float* low, const float* high, uint32_t* pairs) {
  for (int64_t i = 0; i < count; i += V) {
    store(join(Vec<float>::load(low + i), Vec<float>::load(high + i)), pairs + i);
  }
}
void join_neighbours(int64_t count, const float* x, uint32_t* pairs) {
  for (int64_t i = 0; i < count; i += V) {
    store(neighbours(Vec<float>::load(x + 2 * i), Vec<float>::load(x + 2 * i + V)), pairs + i);
  }
}

#if defined(XLMR_ISA_AMX)
void multiply_tiles(const float* sum, const uint32_t* a, const uint32_t* b, float* out) {
  const TileSession session;
  tile_load<2>(sum, kTileBytes);
  tile_load<5>(a, kTileBytes);
  tile_load<7>(b, kTileBytes);
  tile_dot_bf16<2, 5, 7>();
  tile_store<2>(out, kTileBytes);
}
void use_tile(int use, bool after_session) {
  alignas(64) char memory[kTileRows * kTileBytes] = {};
  if (after_session) {
    const TileSession session;
    tile_zero<1>();
  }
  if (use == 0) tile_zero<1>();
  if (use == 1) tile_load<1>(memory, kTileBytes);
  if (use == 2) tile_store<1>(memory, kTileBytes);
  if (use == 3) tile_dot_bf16<1, 2, 3>();
}
#endif

}  // namespace

extern const test::Bf16Units bf16_units;
#if defined(XLMR_ISA_AMX)
const test::Bf16Units bf16_units = {dot_lanes, join_lanes, join_neighbours, multiply_tiles,
                                    use_tile};
#else
const test::Bf16Units bf16_units = {dot_lanes, join_lanes, join_neighbours, nullptr, nullptr};
#endif

}  // namespace xlmr::XLMR_ISA
