// Moments of panels of tokens that stay in cache, and the pass that normalises and activates them.
// Sums run in the same order whatever the width of a register or the number of threads.
#include "norm.hpp"

#include <algorithm>

#include "rows.hpp"

namespace medmamba {
namespace MEDMAMBA_ISA {
namespace {

constexpr int kChains = 4;  // sums side by side, so that none waits for the one before

template <class T>
MEDMAMBA_INLINE Vec load_some(const typename T::Stored* from, int lanes) {
  if (lanes == kWidth) return T::widen_all(from);
  typename T::Stored part[kWidth] = {};
  std::memcpy(part, from, sizeof(typename T::Stored) * size_t(lanes));
  return T::widen_all(part);
}

template <class T>
MEDMAMBA_INLINE void store_some(Vec value, typename T::Stored* to, int lanes) {
  if (lanes == kWidth) return T::narrow_all(value, to);
  typename T::Stored part[kWidth];
  T::narrow_all(value, part);
  std::memcpy(to, part, sizeof(typename T::Stored) * size_t(lanes));
}

MEDMAMBA_INLINE Vec load_floats(const float* from, int lanes) { return load_some<Float32>(from, lanes); }

// The sum of term(token, values) over a column of vectors.
template <class T, class Term>
MEDMAMBA_INLINE Vec column_sum(const typename T::Stored* from, int64_t count, int64_t pitch, int lanes,
                               const Term& term) {
  Vec sums[kChains] = {};
  int64_t t = 0;
  for (; t + kChains <= count; t += kChains) {
    MEDMAMBA_UNROLL
    for (int k = 0; k < kChains; ++k) sums[k] += term(load_some<T>(from + (t + k) * pitch, lanes));
  }
  for (; t < count; ++t) sums[0] += term(load_some<T>(from + t * pitch, lanes));
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class T>
MEDMAMBA_INLINE void column_moments(const typename T::Stored* from, int64_t count, int64_t pitch, int lanes,
                                    float* mean, float* squares) {
  const Vec middle =
      column_sum<T>(from, count, pitch, lanes, [](Vec value) { return value; }) / splat(float(count));
  const Vec spread = column_sum<T>(from, count, pitch, lanes, [middle](Vec value) {
    const Vec distance = value - middle;
    return distance * distance;
  });
  store_some<Float32>(middle, mean, lanes);
  store_some<Float32>(spread, squares, lanes);
}

template <class T>
static void moments_as(const Norm& p, const NormItem& item, float* mean, float* squares) {
  const int64_t first = (item.batch * p.length + item.start) * p.channels, count = item.stop - item.start;
  const typename T::Stored* x = static_cast<const typename T::Stored*>(p.x) + first;
  int64_t c = 0;
  for (; c + kWidth <= p.channels; c += kWidth) {
    column_moments<T>(x + c, count, p.channels, kWidth, mean + c, squares + c);
  }
  if (c < p.channels) column_moments<T>(x + c, count, p.channels, int(p.channels - c), mean + c, squares + c);
}

template <class T>
MEDMAMBA_INLINE void apply_some(const typename T::Stored* from, typename T::Stored* to, Vec scale, Vec offset,
                                Vec slope, int lanes) {
  const Vec y = load_some<T>(from, lanes) * scale + offset;
  store_some<T>(y > 0.0f ? y : y * slope, to, lanes);
}

template <class T>
static void apply_as(const Norm& p, const NormItem& item, const float* scale, const float* offset) {
  const Vec slope = splat(p.slope);
  for (int64_t t = item.start; t < item.stop; ++t) {
    const int64_t at = (item.batch * p.length + t) * p.channels;
    const typename T::Stored* from = static_cast<const typename T::Stored*>(p.x) + at;
    typename T::Stored* to = static_cast<typename T::Stored*>(p.out) + at;
    int64_t c = 0;
    for (; c + kWidth <= p.channels; c += kWidth) {
      apply_some<T>(from + c, to + c, load(scale + c), load(offset + c), slope, kWidth);
    }
    if (c < p.channels) {
      const int lanes = int(p.channels - c);
      apply_some<T>(from + c, to + c, load_floats(scale + c, lanes), load_floats(offset + c, lanes), slope, lanes);
    }
  }
}

static void moments(const Norm& p, const NormItem& item, float* mean, float* squares) {
  switch (p.type) {
    case Type::float32: return moments_as<Float32>(p, item, mean, squares);
    case Type::bfloat16: return moments_as<BFloat16>(p, item, mean, squares);
    case Type::float16: return moments_as<Float16>(p, item, mean, squares);
  }
}

static void apply(const Norm& p, const NormItem& item, const float* scale, const float* offset) {
  switch (p.type) {
    case Type::float32: return apply_as<Float32>(p, item, scale, offset);
    case Type::bfloat16: return apply_as<BFloat16>(p, item, scale, offset);
    case Type::float16: return apply_as<Float16>(p, item, scale, offset);
  }
}

}  // namespace
}  // namespace MEDMAMBA_ISA

const NormKernels& MEDMAMBA_NORM() {
  static const NormKernels kernels = {MEDMAMBA_ISA::moments, MEDMAMBA_ISA::apply};
  return kernels;
}

}  // namespace medmamba
