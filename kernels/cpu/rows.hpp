// Moving rows between tensors of any supported type and stride and float tiles [token][lane] in cache.
#pragma once

#include "vector.hpp"

namespace medmamba {
namespace MEDMAMBA_ISA {

MEDMAMBA_INLINE float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  uint32_t bits;
  float value;
  if (magnitude >= 0x7c00u) {  // infinity and NaN
    bits = 0x7f800000u | (magnitude & 0x3ffu) << 13;
  } else if (magnitude >= 0x400u) {
    bits = (magnitude << 13) + (112u << 23);
  } else {  // subnormal: exact in float
    value = float(magnitude) * 5.9604644775390625e-8f;  // 2^-24
    std::memcpy(&bits, &value, 4);
  }
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

MEDMAMBA_INLINE uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to 65520 or more
  if (bits < 0x38800000u) {  // below 2^-14: let the adder round to multiples of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;  // ulp of [0.5, 1) is 2^-24
    std::memcpy(&bits, &magnitude, 4);
    return uint16_t(sign | (bits - 0x3f000000u));
  }
  bits += 0xfffu + (bits >> 13 & 1u);
  return uint16_t(sign | (bits - (112u << 23)) >> 13);
}

typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));

// One value, or kWidth neighbours, of each type; nearest even when narrowing. The compiler does not find the
// vectors by itself: it must assume that rows and tiles overlap.
struct Float32 {
  typedef float Stored;
  MEDMAMBA_INLINE float widen(float value) { return value; }
  MEDMAMBA_INLINE float narrow(float value) { return value; }
  MEDMAMBA_INLINE Vec widen_all(const float* from) { return load(from); }
  MEDMAMBA_INLINE void narrow_all(Vec value, float* to) { store(to, value); }
};

struct BFloat16 {
  typedef uint16_t Stored;
  MEDMAMBA_INLINE float widen(uint16_t value) {
    const uint32_t bits = uint32_t(value) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
  }
  MEDMAMBA_INLINE uint16_t narrow(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const uint32_t quiet = bits >> 16 | 0x40u;  // a NaN stays one
    return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
  }
  MEDMAMBA_INLINE Vec widen_all(const uint16_t* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return reinterpret_cast<Vec>(__builtin_convertvector(halves, Words) << 16);
  }
  MEDMAMBA_INLINE void narrow_all(Vec value, uint16_t* to) {
    const Words bits = reinterpret_cast<Words>(value);
    const Words rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const Words quiet = bits >> 16 | 0x40u;
    const Halves halves = __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, Halves);
    std::memcpy(to, &halves, sizeof halves);
  }
};

struct Float16 {
  typedef uint16_t Stored;
#if defined(__F16C__)
  MEDMAMBA_INLINE float widen(uint16_t value) { return _cvtsh_ss(value); }
  MEDMAMBA_INLINE uint16_t narrow(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
#else
  MEDMAMBA_INLINE float widen(uint16_t value) { return half_to_float(value); }
  MEDMAMBA_INLINE uint16_t narrow(float value) { return float_to_half(value); }
#endif
  MEDMAMBA_INLINE Vec widen_all(const uint16_t* from) {
#if defined(__AVX512F__)
    return Vec(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
    return Vec(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    Vec value;
    for (int i = 0; i < kWidth; ++i) value[i] = widen(from[i]);
    return value;
#endif
  }
  MEDMAMBA_INLINE void narrow_all(Vec value, uint16_t* to) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtps_ph(__m512(value), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph(__m256(value), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kWidth; ++i) to[i] = narrow(value[i]);
#endif
  }
};

// `count` neighbouring values into a row of `pitch` floats, zeros behind.
template <class T>
MEDMAMBA_INLINE void widen_row(const typename T::Stored* from, float* to, int count, int pitch) {
  int i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, T::widen_all(from + i));
  if (i < count && pitch - i >= kWidth) {  // as one vector, which can be loaded again without waiting
    typename T::Stored part[kWidth] = {};
    std::memcpy(part, from + i, sizeof(typename T::Stored) * size_t(count - i));
    store(to + i, T::widen_all(part));
    i += kWidth;
  }
  for (; i < count; ++i) to[i] = T::widen(from[i]);
  for (; i < pitch; ++i) to[i] = 0.0f;
}

template <class T>
MEDMAMBA_INLINE void narrow_row(const float* from, typename T::Stored* to, int count) {
  int i = 0;
  for (; i + kWidth <= count; i += kWidth) T::narrow_all(load(from + i), to + i);
  for (; i < count; ++i) to[i] = T::narrow(from[i]);
}

// Tokens of one tile: token[t] for t < count, and 0 behind.
struct Tokens {
  int64_t token[kTile];
  int count;
};

typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInt __attribute__((vector_size(16)));
#if defined(__clang__)
#define MEDMAMBA_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MEDMAMBA_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, FourInt{__VA_ARGS__})
#endif

// Rows become columns: out[i][j] = in[j][i].
MEDMAMBA_INLINE void transpose(Four* v) {
  const Four a = MEDMAMBA_SHUFFLE(v[0], v[1], 0, 4, 1, 5);
  const Four b = MEDMAMBA_SHUFFLE(v[2], v[3], 0, 4, 1, 5);
  const Four c = MEDMAMBA_SHUFFLE(v[0], v[1], 2, 6, 3, 7);
  const Four d = MEDMAMBA_SHUFFLE(v[2], v[3], 2, 6, 3, 7);
  v[0] = MEDMAMBA_SHUFFLE(a, b, 0, 1, 4, 5);
  v[1] = MEDMAMBA_SHUFFLE(a, b, 2, 3, 6, 7);
  v[2] = MEDMAMBA_SHUFFLE(c, d, 0, 1, 4, 5);
  v[3] = MEDMAMBA_SHUFFLE(c, d, 2, 3, 6, 7);
}

// 1 or -1 where four positions from t on visit four neighbouring tokens in that direction, else 0.
MEDMAMBA_INLINE int direction(const Tokens& tokens, int t) {
  if (t + 4 > tokens.count) return 0;
  const int64_t step = tokens.token[t + 1] - tokens.token[t];
  if (step != 1 && step != -1) return 0;
  const bool even = tokens.token[t + 2] == tokens.token[t] + 2 * step &&
                    tokens.token[t + 3] == tokens.token[t] + 3 * step;
  return even ? int(step) : 0;
}

// Where the tokens, not the channels, are neighbours: four by four where the order allows, else one by one.
template <class T>
static void load_columns(const typename T::Stored* base, const Rows& rows, const Tokens& tokens,
                         int lanes, float* tile, int pitch) {
  for (int t = 0; t < tokens.count;) {
    const int step = rows.token_stride == 1 ? direction(tokens, t) : 0;
    int lane = 0;
    for (; step != 0 && lane + 4 <= lanes; lane += 4) {
      const int64_t first = tokens.token[step > 0 ? t : t + 3];
      Four v[4];
      for (int i = 0; i < 4; ++i) {
        const typename T::Stored* from = base + (lane + i) * rows.channel_stride + first;
        v[i] = Four{T::widen(from[0]), T::widen(from[1]), T::widen(from[2]), T::widen(from[3])};
      }
      transpose(v);
      for (int i = 0; i < 4; ++i) {
        std::memcpy(tile + (t + (step > 0 ? i : 3 - i)) * pitch + lane, &v[i], sizeof(Four));
      }
    }
    const int next = step != 0 ? t + 4 : t + 1;
    for (; lane < lanes; ++lane) {
      const typename T::Stored* column = base + lane * rows.channel_stride;
      for (int i = t; i < next; ++i) {
        tile[i * pitch + lane] = T::widen(column[tokens.token[i] * rows.token_stride]);
      }
    }
    t = next;
  }
}

template <class T>
static void store_columns(typename T::Stored* base, const Rows& rows, const Tokens& tokens, int lanes,
                          const float* tile) {
  for (int t = 0; t < tokens.count;) {
    const int step = rows.token_stride == 1 ? direction(tokens, t) : 0;
    int lane = 0;
    for (; step != 0 && lane + 4 <= lanes; lane += 4) {
      const int64_t first = tokens.token[step > 0 ? t : t + 3];
      Four v[4];
      for (int i = 0; i < 4; ++i) {
        std::memcpy(&v[i], tile + (t + (step > 0 ? i : 3 - i)) * kLanes + lane, sizeof(Four));
      }
      transpose(v);
      for (int i = 0; i < 4; ++i) {
        typename T::Stored* to = base + (lane + i) * rows.channel_stride + first;
        for (int k = 0; k < 4; ++k) to[k] = T::narrow(v[i][k]);
      }
    }
    const int next = step != 0 ? t + 4 : t + 1;
    for (; lane < lanes; ++lane) {
      typename T::Stored* column = base + lane * rows.channel_stride;
      for (int i = t; i < next; ++i) {
        column[tokens.token[i] * rows.token_stride] = T::narrow(tile[i * kLanes + lane]);
      }
    }
    t = next;
  }
}

template <class T>
static void load_tile_as(const Rows& rows, int64_t offset, const Tokens& tokens, int lanes, float* tile,
                         int pitch) {
  const typename T::Stored* base = static_cast<const typename T::Stored*>(rows.data) + offset;
  if (rows.channel_stride == 1 && lanes == kLanes && pitch == kLanes) {  // whole rows, without a question asked for each
    for (int t = 0; t < tokens.count; ++t) {
      const typename T::Stored* from = base + tokens.token[t] * rows.token_stride;
      MEDMAMBA_UNROLL for (int i = 0; i < kLanes; i += kWidth) store(tile + t * kLanes + i, T::widen_all(from + i));
    }
    return;
  }
  if (rows.channel_stride == 1) {
    for (int t = 0; t < tokens.count; ++t) {
      widen_row<T>(base + tokens.token[t] * rows.token_stride, tile + t * pitch, lanes, pitch);
    }
    return;
  }
  if (rows.channel_stride == 0) {  // one value for all channels of a token
    for (int t = 0; t < tokens.count; ++t) {
      const float value = T::widen(base[tokens.token[t] * rows.token_stride]);
      for (int i = 0; i < pitch; ++i) tile[t * pitch + i] = i < lanes ? value : 0.0f;
    }
    return;
  }
  if (lanes < pitch) std::memset(tile, 0, sizeof(float) * size_t(tokens.count) * size_t(pitch));
  load_columns<T>(base, rows, tokens, lanes, tile, pitch);
}

// Values [token][lane] of one tile, zeros in the lanes behind; offset: of lane 0 at token 0.
static void load_tile(const Rows& rows, int64_t offset, const Tokens& tokens, int lanes, float* tile,
                      int pitch = kLanes) {
  switch (rows.type) {
    case Type::float32: return load_tile_as<Float32>(rows, offset, tokens, lanes, tile, pitch);
    case Type::bfloat16: return load_tile_as<BFloat16>(rows, offset, tokens, lanes, tile, pitch);
    case Type::float16: return load_tile_as<Float16>(rows, offset, tokens, lanes, tile, pitch);
  }
}

template <class T>
static void store_tile_as(const Rows& rows, int64_t offset, const Tokens& tokens, int lanes,
                          const float* tile) {
  typename T::Stored* base = static_cast<typename T::Stored*>(rows.data) + offset;
  if (rows.channel_stride == 1 && lanes == kLanes) {
    for (int t = 0; t < tokens.count; ++t) {
      typename T::Stored* to = base + tokens.token[t] * rows.token_stride;
      MEDMAMBA_UNROLL for (int i = 0; i < kLanes; i += kWidth) T::narrow_all(load(tile + t * kLanes + i), to + i);
    }
    return;
  }
  if (rows.channel_stride == 1) {
    for (int t = 0; t < tokens.count; ++t) {
      narrow_row<T>(tile + t * kLanes, base + tokens.token[t] * rows.token_stride, lanes);
    }
    return;
  }
  store_columns<T>(base, rows, tokens, lanes, tile);
}

static void store_tile(const Rows& rows, int64_t offset, const Tokens& tokens, int lanes,
                       const float* tile) {
  switch (rows.type) {
    case Type::float32: return store_tile_as<Float32>(rows, offset, tokens, lanes, tile);
    case Type::bfloat16: return store_tile_as<BFloat16>(rows, offset, tokens, lanes, tile);
    case Type::float16: return store_tile_as<Float16>(rows, offset, tokens, lanes, tile);
  }
}

}  // namespace MEDMAMBA_ISA
}  // namespace medmamba
