// Vectors of the instruction set this file is compiled for, and the few functions the scan needs.
// Everything lives in a namespace named after the instruction set, so that no inline function compiled for a
// newer processor can be linked into code for an older one.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "problem.hpp"

namespace medmamba {
namespace MEDMAMBA_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t Int __attribute__((vector_size(4 * kWidth)));
typedef float VecUnaligned __attribute__((vector_size(4 * kWidth), aligned(4)));

#define MEDMAMBA_INLINE static inline __attribute__((always_inline))

// Loops over states and vectors must unroll, or what they carry lives in memory.
#define MEDMAMBA_UNROLL _Pragma("GCC unroll 16")

MEDMAMBA_INLINE Vec load(const float* from) { return *reinterpret_cast<const VecUnaligned*>(from); }
MEDMAMBA_INLINE void store(float* to, Vec value) { *reinterpret_cast<VecUnaligned*>(to) = value; }
MEDMAMBA_INLINE Vec splat(float value) { return value - Vec{}; }
MEDMAMBA_INLINE Int as_int(Vec value) { return reinterpret_cast<Int>(value); }
MEDMAMBA_INLINE Vec as_float(Int value) { return reinterpret_cast<Vec>(value); }

// Written so that a NaN in `value` survives.
MEDMAMBA_INLINE Vec at_least(Vec value, float low) { return value < low ? splat(low) : value; }
MEDMAMBA_INLINE Vec at_most(Vec value, float high) { return value > high ? splat(high) : value; }

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kLowestExponent = -126.0f;  // 2^-126 is the least normal float: no denormal slow path
constexpr float kHighestExponent = 127.99f;

#if defined(__AVX512F__)
// 2^(i/32)
struct Exp2Table {
  __m512 low, high;
};

MEDMAMBA_INLINE Exp2Table exp2_table() {
  alignas(64) static const uint32_t entries[32] = {
      0x3f800000u, 0x3f82cd87u, 0x3f85aac3u, 0x3f88980fu, 0x3f8b95c2u, 0x3f8ea43au, 0x3f91c3d3u, 0x3f94f4f0u,
      0x3f9837f0u, 0x3f9b8d3au, 0x3f9ef532u, 0x3fa27043u, 0x3fa5fed7u, 0x3fa9a15bu, 0x3fad583fu, 0x3fb123f6u,
      0x3fb504f3u, 0x3fb8fbafu, 0x3fbd08a4u, 0x3fc12c4du, 0x3fc5672au, 0x3fc9b9beu, 0x3fce248cu, 0x3fd2a81eu,
      0x3fd744fdu, 0x3fdbfbb8u, 0x3fe0ccdfu, 0x3fe5b907u, 0x3feac0c7u, 0x3fefe4bau, 0x3ff5257du, 0x3ffa83b3u};
  return {_mm512_load_ps(entries), _mm512_load_ps(entries + 16)};
}

// 2^(rate * step) for -126 <= rate * step < 128: 32-entry table and a quadratic with constant term 1, eight
// operations. The remainder is at most 1/64; the linear coefficient absorbs the cubic term: relative error 6e-8.
MEDMAMBA_INLINE Vec exp2_product(Vec step, Vec rate, const Exp2Table& table) {
  // 1.5 * 2^(23 - 5): the sum is rounded to multiples of 1/32, their number in its low bits
  const __m512 magic = _mm512_set1_ps(393216.0f);
  const __m512 shifted = _mm512_fmadd_ps(__m512(step), __m512(rate), magic);
  const __m512 rounded = _mm512_sub_ps(shifted, magic);
  const __m512 rest = _mm512_fmsub_ps(__m512(step), __m512(rate), rounded);
  const __m512 entry = _mm512_permutex2var_ps(table.low, _mm512_castps_si512(shifted), table.high);
  const __m512 slope = _mm512_fmadd_ps(rest, _mm512_set1_ps(0.240226507f), _mm512_set1_ps(0.693157331f));
  const __m512 value = _mm512_fmadd_ps(entry, _mm512_mul_ps(rest, slope), entry);
  return Vec(_mm512_scalef_ps(value, rounded));  // by 2^floor(rounded)
}
#else
struct Exp2Table {};
MEDMAMBA_INLINE Exp2Table exp2_table() { return {}; }

// Degree-6 polynomial with constant term exactly 1 on [-1/2, 1/2], relative error 2e-9 before rounding: a decay
// with a bias above 1 would grow over hundreds of thousands of steps.
MEDMAMBA_INLINE Vec exp2_product(Vec step, Vec rate, const Exp2Table&) {
  const Vec product = step * rate;
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: rounds to integers
  const Vec rounded = product + magic;
  const Vec rest = product - (rounded - magic);
  Vec value = rest * 1.535336188e-4f + 1.339887442e-3f;
  value = value * rest + 9.618437358e-3f;
  value = value * rest + 5.550332471e-2f;
  value = value * rest + 2.402264791e-1f;
  value = value * rest + 6.931472029e-1f;
  value = value * rest + 1.0f;
  return as_float(as_int(value) + (as_int(rounded) << 23));
}
#endif

// The same for any argument: saturates instead of wrapping.
MEDMAMBA_INLINE Vec exp2_product_safe(Vec step, Vec rate, const Exp2Table& table) {
  const Vec product = at_most(at_least(step * rate, kLowestExponent), kHighestExponent);
  return exp2_product(product, splat(1.0f), table);
}

// exp(-|x|), in (0, 1].
MEDMAMBA_INLINE Vec exp_of_minus_magnitude(Vec x, const Exp2Table& table) {
  const Vec magnitude = as_float(as_int(x) & 0x7fffffff);
  return exp2_product(at_least(magnitude * -kLog2E, kLowestExponent), splat(1.0f), table);
}

// 1 / x for 1 <= x <= 2.
MEDMAMBA_INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const __m512 guess = _mm512_rcp14_ps(__m512(x));  // one Newton step: 2^-28
  const __m512 rest = _mm512_fnmadd_ps(__m512(x), guess, _mm512_set1_ps(1.0f));
  return Vec(_mm512_fmadd_ps(guess, rest, guess));
#else
  return 1.0f / x;
#endif
}

MEDMAMBA_INLINE Vec sigmoid(Vec x, const Exp2Table& table) {
  const Vec e = exp_of_minus_magnitude(x, table);
  return (x < 0.0f ? e : splat(1.0f)) * reciprocal(e + 1.0f);
}

// max(x, 0) + log1p(exp(-|x|)), with e = exp(-|x|); log1p(e) / e as a polynomial on [0, 1], relative error 1.5e-7.
MEDMAMBA_INLINE Vec softplus_of(Vec x, Vec e) {
  // Estrin's scheme: four steps one after the other instead of eight
  const Vec e2 = e * e, e4 = e2 * e2;
  const Vec low = (e * -4.9999648e-1f + 1.0f) + (e * -2.48571637e-1f + 3.33213226e-1f) * e2;
  const Vec high = (e * -1.37538024e-1f + 1.9153655e-1f) + (e * -3.00657931e-2f + 7.92045368e-2f) * e2;
  const Vec series = low + (e4 * 5.36482452e-3f + high) * e4;
  return (x < 0.0f ? Vec{} : x) + e * series;
}

}  // namespace MEDMAMBA_ISA
}  // namespace medmamba
