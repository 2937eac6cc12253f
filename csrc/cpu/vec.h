// Vec<T>: the lanes of one register, and the few operations that the kernels are written in.
// This header is the baseline (16-byte registers, the compiler's own vectors, no fused
// multiply-add) and the interface; vec_<isa>.h specialises it.
//
// Every kernel source is compiled once per instruction set with XLMR_ISA set to its name, and
// lives in xlmr::<isa>::(anonymous), so that no code leaks from one object into another.
#pragma once

#include <math.h>
#include <string.h>

#include <cstdint>

#include "core/sizes.h"

#if !defined(XLMR_ISA)
#error "compile kernel sources with -DXLMR_ISA=<name of the table>"
#endif

#define XLMR_INLINE inline __attribute__((always_inline))

namespace xlmr::XLMR_ISA {
namespace {

template <class T>
struct Vec;

#if !defined(XLMR_VEC_NATIVE)

constexpr int kVectorRegisters = 16;
// Whether a fused multiply-add may take one lane of a register for all lanes of a factor.
constexpr bool kFmaByLane = false;

template <class T>
struct LaneTypes;
template <>
struct LaneTypes<float> {
  typedef float Data __attribute__((vector_size(16)));
  typedef int32_t Mask __attribute__((vector_size(16)));
};
template <>
struct LaneTypes<double> {
  typedef double Data __attribute__((vector_size(16)));
  typedef int64_t Mask __attribute__((vector_size(16)));
};

template <class T>
struct Vec {
  using Data = typename LaneTypes<T>::Data;
  using Mask = typename LaneTypes<T>::Mask;
  static constexpr int size = 16 / sizeof(T);
  Data v;

  Vec() = default;
  XLMR_INLINE Vec(Data data) : v(data) {}
  XLMR_INLINE explicit Vec(T x) : v(Data{} + x) {}

  static XLMR_INLINE Vec zero() { return Data{}; }
  static XLMR_INLINE Vec load(const T* p) {
    Data d;
    memcpy(&d, p, sizeof d);
    return d;
  }
  // The first n lanes, 0 <= n <= size; the others are 0. Nothing else is read.
  static XLMR_INLINE Vec load(const T* p, int64_t n) {
    Data d{};
    for (int i = 0; i < size; ++i) {
      if (i < n) d[i] = p[i];
    }
    return d;
  }
  XLMR_INLINE void store(T* p) const { memcpy(p, &v, sizeof v); }
  XLMR_INLINE void store(T* p, int64_t n) const {
    for (int i = 0; i < size; ++i) {
      if (i < n) p[i] = v[i];
    }
  }
  XLMR_INLINE Vec operator+(Vec o) const { return v + o.v; }
  XLMR_INLINE Vec operator-(Vec o) const { return v - o.v; }
  XLMR_INLINE Vec operator*(Vec o) const { return v * o.v; }
  XLMR_INLINE Vec operator/(Vec o) const { return v / o.v; }
  XLMR_INLINE Mask operator<(Vec o) const { return v < o.v; }
  XLMR_INLINE T lane(int i) const { return v[i]; }
};

template <class T>
XLMR_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return a.v * b.v + c.v;
}
// a where a > b, otherwise b: b, too, where either is NaN.
template <class T>
XLMR_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return a.v > b.v ? a.v : b.v;
}
template <class T>
XLMR_INLINE Vec<T> min(Vec<T> a, Vec<T> b) {
  return a.v < b.v ? a.v : b.v;
}
template <class T>
XLMR_INLINE Vec<T> select(typename Vec<T>::Mask m, Vec<T> yes, Vec<T> no) {
  return m ? yes.v : no.v;
}
template <class T>
XLMR_INLINE Vec<T> abs(Vec<T> a) {
  typename Vec<T>::Mask bits;
  memcpy(&bits, &a.v, sizeof bits);
  bits &=
      ~(typename Vec<T>::Mask{} + (static_cast<decltype(bits[0] + 0)>(1) << (sizeof(T) * 8 - 1)));
  typename Vec<T>::Data d;
  memcpy(&d, &bits, sizeof d);
  return d;
}
// |magnitude| with the sign of s.
template <class T>
XLMR_INLINE Vec<T> copysign(Vec<T> magnitude, Vec<T> s) {
  using Mask = typename Vec<T>::Mask;
  const Mask sign = Mask{} + (static_cast<decltype(Mask{}[0] + 0)>(1) << (sizeof(T) * 8 - 1));
  Mask m, k;
  memcpy(&m, &magnitude.v, sizeof m);
  memcpy(&k, &s.v, sizeof k);
  m = (m & ~sign) | (k & sign);
  typename Vec<T>::Data d;
  memcpy(&d, &m, sizeof d);
  return d;
}
// To the nearest integer, ties to even; |a| < 2^22.
XLMR_INLINE Vec<float> round(Vec<float> a) {
  const Vec<float> magic(12582912.0f);  // 1.5 * 2^23
  return (a + magic) - magic;
}
// 2^n for integers n in [-126, 127].
XLMR_INLINE Vec<float> pow2(Vec<float> n) {
  Vec<float>::Mask bits = __builtin_convertvector(n.v, Vec<float>::Mask);
  bits = (bits + 127) << 23;
  Vec<float>::Data d;
  memcpy(&d, &bits, sizeof d);
  return d;
}
template <class T>
XLMR_INLINE T reduce_add(Vec<T> a) {
  if constexpr (Vec<T>::size == 4) return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
  return a.v[0] + a.v[1];
}
template <class T>
XLMR_INLINE T reduce_max(Vec<T> a) {
  T m = a.v[0];
  for (int i = 1; i < Vec<T>::size; ++i) m = max_of(m, a.v[i]);
  return m;
}

// 64-bit lanes, as many as fill a vector; the product of their low halves.
using Words = uint64_t __attribute__((vector_size(16)));
XLMR_INLINE Words multiply_low(Words a, Words b) {
  Words product;
  for (int i = 0; i < 2; ++i) {
    product[i] = static_cast<uint64_t>(static_cast<uint32_t>(a[i])) * static_cast<uint32_t>(b[i]);
  }
  return product;
}

// rows[i][j] becomes rows[j][i].
template <class T>
XLMR_INLINE void transpose(Vec<T> (&rows)[Vec<T>::size]) {
  for (int i = 0; i < Vec<T>::size; ++i) {
    for (int j = 0; j < i; ++j) {
      const T swap = rows[i].v[j];
      rows[i].v[j] = rows[j].v[i];
      rows[j].v[i] = swap;
    }
  }
}

#endif

}  // namespace
}  // namespace xlmr::XLMR_ISA
