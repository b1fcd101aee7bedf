// Runs whole convolutions: which instruction set, which thread does what. The result never depends on the threads.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "choice.hpp"
#include "conv.hpp"

namespace medmamba {
namespace {

const ConvKernels& conv_named(const std::string& name) {
#if defined(__x86_64__)
  return build_named<ConvKernels>(name, conv_base, conv_v3, conv_v4);
#else
  return build_named<ConvKernels>(name, conv_base, nullptr, nullptr);
#endif
}

// Panel after panel; the channel blocks of a panel are neighbours, so that its rows stay in cache.
std::vector<ConvItem> items_of(const Conv& p) {
  if (p.taps < 1 || p.taps > kMaxTaps) {
    throw std::invalid_argument("a convolution of " + std::to_string(p.taps) + " taps; 1 to " +
                                std::to_string(kMaxTaps) + " are supported");
  }
  std::vector<ConvItem> items;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t start = 0; start < p.length; start += kConvPanel) {
      const int64_t stop = std::min(start + kConvPanel, p.length);
      for (int64_t channel = 0; channel < p.channels; channel += kLanes) {
        const int lanes = int(std::min<int64_t>(kLanes, p.channels - channel));
        items.push_back({b, channel, lanes, start, stop});
      }
    }
  }
  return items;
}

int64_t values_of(const Conv& p) { return p.batch * p.length * p.channels; }

}  // namespace

void run_conv_forward(const Conv& p, int threads, const std::string& instruction_set) {
  const ConvKernels& kernels = conv_named(instruction_set);
  const std::vector<ConvItem> items = items_of(p);
  over_items(items.size(), values_of(p), threads, [&](size_t i) { kernels.forward(p, items[i]); });
}

void run_conv_backward(const Conv& p, int threads, const std::string& instruction_set) {
  const ConvKernels& kernels = conv_named(instruction_set);
  const std::vector<ConvItem> items = items_of(p);
  const size_t share = size_t(kLanes) * size_t(p.taps + 1);
  std::vector<float> shares(items.size() * share);
  over_items(items.size(), values_of(p), threads, [&](size_t i) {
    float* own = shares.data() + i * share;
    kernels.backward(p, items[i], own, own + kLanes * p.taps);
  });
  std::fill(p.grad_weight, p.grad_weight + p.channels * p.taps, 0.0f);
  std::fill(p.grad_bias, p.grad_bias + p.channels, 0.0f);
  for (size_t i = 0; i < items.size(); ++i) {
    const ConvItem& item = items[i];
    const float* own = shares.data() + i * share;
    for (int k = 0; k < item.lanes * p.taps; ++k) p.grad_weight[item.channel * p.taps + k] += own[k];
    for (int lane = 0; lane < item.lanes; ++lane) p.grad_bias[item.channel + lane] += own[kLanes * p.taps + lane];
  }
  if (p.length == 0 && p.grad_first != nullptr) {
    const int64_t count = p.batch * (p.taps - 1) * p.channels;
    for (int64_t i = 0; i < count; ++i) p.grad_first[i] = p.following == nullptr ? 0.0f : p.following[i];
  }
}

}  // namespace medmamba
