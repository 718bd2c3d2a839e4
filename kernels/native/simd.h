// One logical vector of sixteen float32 lanes on every instruction set: AVX-512 holds it in one register, AVX2 in two,
// NEON in four, plain C++ in an array. Sums always go over the same lanes in the same tree, products are always fused,
// and functions are the same polynomials, so every instruction set gives the same bits.
//
// This header is compiled once for each instruction set, inside the namespace that UNSPOOL_ISA names. Code here uses no
// inline function of the standard library: the linker could keep the copy that another instruction set made of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(UNSPOOL_AVX512) || defined(UNSPOOL_AVX2)
#include <immintrin.h>
#elif defined(UNSPOOL_NEON)
#include <arm_neon.h>
#endif

#define UNSPOOL_INLINE inline __attribute__((always_inline))

namespace UNSPOOL_ISA {

constexpr int LANES = 16;

struct Half { uint16_t bits; };      // IEEE binary16
struct BFloat16 { uint16_t bits; };  // the upper half of a float32

#if defined(UNSPOOL_AVX512)
#include "simd_avx512.inc"
#elif defined(UNSPOOL_AVX2)
#include "simd_avx2.inc"
#elif defined(UNSPOOL_NEON)
#include "simd_neon.inc"
#else
#include "simd_scalar.inc"
#endif

UNSPOOL_INLINE float bits_to_float(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
UNSPOOL_INLINE uint32_t float_to_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }

UNSPOOL_INLINE F32 zero() { return broadcast(0.0f); }

// The first n lanes (0 < n <= 16) from memory, the others `fill`.
template <typename T>
UNSPOOL_INLINE F32 load_first(const T* p, int n, float fill = 0.0f) {
  if (n == LANES) return load(p);
  float lanes[LANES];
  for (int i = 0; i < LANES; ++i) lanes[i] = fill;
  T padded[LANES] = {};
  for (int i = 0; i < n; ++i) padded[i] = p[i];
  float values[LANES];
  store(values, load(padded));
  for (int i = 0; i < n; ++i) lanes[i] = values[i];
  return load(lanes);
}

template <typename T>
UNSPOOL_INLINE void store_first(T* p, F32 x, int n) {
  if (n == LANES) return store(p, x);
  T lanes[LANES];
  store(lanes, x);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

template <typename T>
UNSPOOL_INLINE float load_one(const T* p) { return first_lane(load_first(p, 1)); }

template <typename T>
UNSPOOL_INLINE void store_one(T* p, float x) { store_first(p, broadcast(x), 1); }

// exp, relative error about 1e-7 (Cephes' degree-6 form); exactly 0 below -103.97, inf above 88.73, NaN for NaN.
UNSPOOL_INLINE F32 exp(F32 x) {
  const F32 clamped = max(min(x, broadcast(89.0f)), broadcast(-104.0f));
  const F32 n = round(mul(clamped, broadcast(1.44269504088896341f)));
  F32 r = fma(n, broadcast(-0.693359375f), clamped);
  r = fma(n, broadcast(2.12194440e-4f), r);
  F32 y = broadcast(1.9875691500e-4f);
  y = fma(y, r, broadcast(1.3981999507e-3f));
  y = fma(y, r, broadcast(8.3334519073e-3f));
  y = fma(y, r, broadcast(4.1665795894e-2f));
  y = fma(y, r, broadcast(1.6666665459e-1f));
  y = fma(y, r, broadcast(5.0000001201e-1f));
  y = fma(mul(r, r), y, add(r, broadcast(1.0f)));
  // Two steps, because 2^n alone leaves float32's range at both ends.
  const F32 half = round(mul(n, broadcast(0.5f)));
  y = mul(mul(y, power_of_two(half)), power_of_two(sub(n, half)));
  return where_nan(x, x, y);
}

UNSPOOL_INLINE F32 sigmoid(F32 x) {
  // exp of a number that is never positive: no overflow at either end.
  const F32 e = exp(negative_abs(x));
  const F32 large = div(broadcast(1.0f), add(broadcast(1.0f), e));
  return where_negative(x, mul(e, large), large);
}

UNSPOOL_INLINE F32 tanh(F32 x) {
  // (1 - e) / (1 + e) with e = exp(-2|x|); below 0.05 a series, where the difference would lose digits.
  const F32 a = abs(x);
  const F32 e = exp(mul(a, broadcast(-2.0f)));
  const F32 far = div(sub(broadcast(1.0f), e), add(broadcast(1.0f), e));
  const F32 s = mul(a, a);
  F32 near = fma(s, broadcast(-17.0f / 315.0f), broadcast(2.0f / 15.0f));
  near = fma(s, near, broadcast(-1.0f / 3.0f));
  near = fma(mul(s, a), near, a);
  const F32 y = where_less(a, broadcast(0.05f), near, far);
  return copy_sign(y, x);
}

UNSPOOL_INLINE F32 silu(F32 x) { return mul(x, sigmoid(x)); }

}  // namespace UNSPOOL_ISA
