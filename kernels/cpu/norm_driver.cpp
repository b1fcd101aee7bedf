// Runs whole instance norms. The result never depends on the threads: panels are cut by the shape alone.
#include <algorithm>
#include <cmath>
#include <vector>

#include "choice.hpp"
#include "norm.hpp"

namespace medmamba {
namespace {

constexpr int64_t kPanelValues = 1 << 14;  // 32 or 64 KiB: both passes over a panel find it in cache
constexpr int64_t kLeastTokens = 32, kMostTokens = 512;

const NormKernels& norm_named(const std::string& name) {
#if defined(__x86_64__)
  return build_named<NormKernels>(name, norm_base, norm_v3, norm_v4);
#else
  return build_named<NormKernels>(name, norm_base, nullptr, nullptr);
#endif
}

std::vector<NormItem> panels_of(const Norm& p) {
  const int64_t wanted = kPanelValues / std::max<int64_t>(1, p.channels);
  const int64_t tokens = std::min(kMostTokens, std::max(kLeastTokens, wanted));
  std::vector<NormItem> panels;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t start = 0; start < p.length; start += tokens) {
      panels.push_back({b, start, std::min(start + tokens, p.length)});
    }
  }
  return panels;
}

// Moments of a sample's panels (first .. last) as scale and offset of one channel; Chan et al. 1983.
void fold(const Norm& p, const std::vector<NormItem>& panels, size_t first, size_t last, const float* means,
          const float* squares, int64_t channel, float* scale, float* offset) {
  double sum = 0.0;
  for (size_t i = first; i < last; ++i) {
    sum += double(panels[i].stop - panels[i].start) * means[int64_t(i) * p.channels + channel];
  }
  const double mean = sum / double(p.length);
  double total = 0.0;
  for (size_t i = first; i < last; ++i) {
    const double distance = means[int64_t(i) * p.channels + channel] - mean;
    total += squares[int64_t(i) * p.channels + channel];
    total += double(panels[i].stop - panels[i].start) * distance * distance;
  }
  const double weight = p.weight == nullptr ? 1.0 : p.weight[channel];
  const double bias = p.bias == nullptr ? 0.0 : p.bias[channel];
  const double factor = weight / std::sqrt(total / double(p.length) + p.eps);
  *scale = float(factor);
  *offset = float(bias - mean * factor);
}

}  // namespace

void run_norm(const Norm& p, int threads, const std::string& instruction_set) {
  const NormKernels& kernels = norm_named(instruction_set);
  const std::vector<NormItem> panels = panels_of(p);
  if (panels.empty() || p.channels == 0) return;
  const int64_t values = p.batch * p.length * p.channels;
  std::vector<float> means(panels.size() * size_t(p.channels)), squares(means.size());
  over_items(panels.size(), values, threads, [&](size_t i) {
    const size_t at = i * size_t(p.channels);
    kernels.moments(p, panels[i], means.data() + at, squares.data() + at);
  });
  const size_t per_sample = panels.size() / size_t(p.batch);
  std::vector<float> scales(size_t(p.batch * p.channels)), offsets(scales.size());
  for (int64_t b = 0; b < p.batch; ++b) {
    const size_t first = size_t(b) * per_sample;
    for (int64_t c = 0; c < p.channels; ++c) {
      const size_t at = size_t(b * p.channels + c);
      fold(p, panels, first, first + per_sample, means.data(), squares.data(), c, &scales[at], &offsets[at]);
    }
  }
  over_items(panels.size(), values, threads, [&](size_t i) {
    const size_t at = size_t(panels[i].batch * p.channels);
    kernels.apply(p, panels[i], scales.data() + at, offsets.data() + at);
  });
}

}  // namespace medmamba
