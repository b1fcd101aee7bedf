// Sums over channels, for dB and dC: over the lanes of a block, under way from block to block, and into the rows.
#pragma once

#include "tiles.hpp"

namespace medmamba {
namespace MEDMAMBA_ISA {
namespace {

constexpr int S = 4;  // states of a group: their recurrences and dA fill the registers
static_assert(S == kStatePadding, "groups must cover the padded states");

// Where sums over channels go, [token][kSumFloats], and to what they are added: first to other, where it is not null,
// then to what is there.
struct Target {
  float* to;
  const float* other;
  bool accumulate;
};

// Sums over the lanes of four states are carried as one vector until all channels are added: the last steps are
// shared.
#if defined(__AVX512F__)
constexpr int kSumFloats = 16;  // state n in the lanes 4n to 4n + 3

MEDMAMBA_INLINE void begin_sums(const Vec* v, const Target& target, int t) {
  const __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(__m512(v[0]), __m512(v[1]), 0x44),
                                 _mm512_shuffle_f32x4(__m512(v[0]), __m512(v[1]), 0xee));
  const __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(__m512(v[2]), __m512(v[3]), 0x44),
                                 _mm512_shuffle_f32x4(__m512(v[2]), __m512(v[3]), 0xee));
  Vec c = Vec(_mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)));
  float* to = target.to + t * kSumFloats;
  if (target.other != nullptr) c = load(target.other + t * kSumFloats) + c;
  store(to, target.accumulate ? load(to) + c : c);
}

// Four tokens at once: [token][pitch], four states each.
MEDMAMBA_INLINE void end_sums(const float* from, float* to, int64_t pitch) {
  const __m512 c0 = __m512(load(from)), c1 = __m512(load(from + 16));
  const __m512 c2 = __m512(load(from + 32)), c3 = __m512(load(from + 48));
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(c0, c1), _mm512_unpackhi_ps(c0, c1));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(c2, c3), _mm512_unpackhi_ps(c2, c3));
  const __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  const __m512i by_token = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512 rows = _mm512_permutexvar_ps(by_token, sums);
  _mm_storeu_ps(to, _mm512_castps512_ps128(rows));
  _mm_storeu_ps(to + pitch, _mm512_extractf32x4_ps(rows, 1));
  _mm_storeu_ps(to + 2 * pitch, _mm512_extractf32x4_ps(rows, 2));
  _mm_storeu_ps(to + 3 * pitch, _mm512_extractf32x4_ps(rows, 3));
}
#else
constexpr int kSumFloats = 4;

MEDMAMBA_INLINE void begin_sums(const Vec* v, const Target& target, int t) {
  float* to = target.to + t * kSumFloats;
  Four sums[4];
  for (int n = 0; n < 4; ++n) {
    Four parts[kWidth / 4];
    std::memcpy(parts, &v[n], sizeof(Vec));
    sums[n] = parts[0];
    for (int i = 1; i < kWidth / 4; ++i) sums[n] += parts[i];
  }
  transpose(sums);
  Four total = (sums[0] + sums[1]) + (sums[2] + sums[3]), before;
  std::memcpy(&before, to, sizeof(Four));
  if (target.accumulate) total += before;
  std::memcpy(to, &total, sizeof(Four));
}

MEDMAMBA_INLINE void end_sums(const float* from, float* to, int64_t pitch) {
  for (int t = 0; t < 4; ++t) std::memcpy(to + t * pitch, from + 4 * t, sizeof(Four));
}
#endif

// A share: [group of states][token][kSumFloats].
constexpr int kGroupShare = kTile * kSumFloats;
int64_t share_floats(const Problem& p) { return p.padded_state() / S * kGroupShare; }

void add_share(const float* from, int64_t floats, float* to) {
  for (int64_t i = 0; i < floats; i += kWidth) store(to + i, load(to + i) + load(from + i));
}

template <class T>
void store_projection_as(const Rows& rows, int64_t offset, int64_t token, const float* from, int count) {
  typename T::Stored* row = static_cast<typename T::Stored*>(rows.data) + offset + token * rows.token_stride;
  if (rows.channel_stride == 1) return narrow_row<T>(from, row, count);
  for (int n = 0; n < count; ++n) row[n * rows.channel_stride] = T::narrow(from[n]);
}

void store_projection(const Problem& p, const Rows& rows, int64_t batch, int64_t group, int64_t tile,
                      const float* share) {
  constexpr int kStates = 16;  // at once
  const Tokens tokens = tokens_of(p, tile);
  const int64_t offset = batch * rows.batch_stride + group * rows.group_stride;
  alignas(64) float sums[kTile * kStates];
  for (int64_t first = 0; first < p.state; first += kStates) {
    const int count = int(p.state - first < kStates ? p.state - first : kStates);
    for (int n = 0; n < count; n += S) {
      const float* from = share + (first + n) / S * kGroupShare;
      for (int t = 0; t < tokens.count; t += 4) end_sums(from + t * kSumFloats, sums + t * kStates + n, kStates);
    }
    const int64_t at = offset + first * rows.channel_stride;
    for (int t = 0; t < tokens.count; ++t) {
      const float* from = sums + t * kStates;
      switch (rows.type) {
        case Type::float32: store_projection_as<Float32>(rows, at, tokens.token[t], from, count); break;
        case Type::bfloat16: store_projection_as<BFloat16>(rows, at, tokens.token[t], from, count); break;
        case Type::float16: store_projection_as<Float16>(rows, at, tokens.token[t], from, count); break;
      }
    }
  }
}

}  // namespace
}  // namespace MEDMAMBA_ISA
}  // namespace medmamba
