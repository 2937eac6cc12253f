// CUDA's dim3 and short vectors, aligned as on a device.
#pragma once

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define SIMT_VECTOR2(Type, Element, alignment) \
  struct alignas(alignment) Type {             \
    Element x, y;                              \
  };                                           \
  inline Type make_##Type(Element x, Element y) { return {x, y}; }
#define SIMT_VECTOR4(Type, Element, alignment) \
  struct alignas(alignment) Type {             \
    Element x, y, z, w;                        \
  };                                           \
  inline Type make_##Type(Element x, Element y, Element z, Element w) { return {x, y, z, w}; }

SIMT_VECTOR2(float2, float, 8)
SIMT_VECTOR4(float4, float, 16)
SIMT_VECTOR2(double2, double, 16)
SIMT_VECTOR2(int2, int, 8)
SIMT_VECTOR4(int4, int, 16)
SIMT_VECTOR2(uint2, unsigned, 8)
SIMT_VECTOR4(uint4, unsigned, 16)

#undef SIMT_VECTOR2
#undef SIMT_VECTOR4
