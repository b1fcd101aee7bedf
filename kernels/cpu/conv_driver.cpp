// Runs whole convolutions: which instruction set, which thread does what. The result never depends on the threads.
#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <vector>

#include "conv.hpp"
#include "driver.hpp"
#include "threads.hpp"

namespace medmamba {
namespace {

// Below this many values a second thread costs more than it saves.
constexpr int64_t kValuesPerThread = 1 << 17;

const ConvKernels& conv_named(const std::string& name) {
  for (const std::string& known : instruction_sets()) {
    if (name.empty() || name == known) {
#if defined(__x86_64__)
      if (known == "v4") return conv_v4();
      if (known == "v3") return conv_v3();
#endif
      return conv_base();
    }
  }
  throw std::invalid_argument("this processor or build has no instruction set '" + name + "'");
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

template <class Work>
void over_items(const Conv& p, size_t items, int threads, const Work& work) {
  const int64_t most = std::min<int64_t>(int64_t(items), p.batch * p.length * p.channels / kValuesPerThread);
  const int used = int(std::max<int64_t>(1, std::min<int64_t>(threads, most)));
  std::atomic<size_t> next{0};
  Lease lease(used);
  const auto share = [&](int) {
    for (size_t i = next++; i < items; i = next++) work(i);
  };
  if (!lease.run(share)) share(0);
}

}  // namespace

void run_conv_forward(const Conv& p, int threads, const std::string& instruction_set) {
  const ConvKernels& kernels = conv_named(instruction_set);
  const std::vector<ConvItem> items = items_of(p);
  over_items(p, items.size(), threads, [&](size_t i) { kernels.forward(p, items[i]); });
}

void run_conv_backward(const Conv& p, int threads, const std::string& instruction_set) {
  const ConvKernels& kernels = conv_named(instruction_set);
  const std::vector<ConvItem> items = items_of(p);
  const size_t share = size_t(kLanes) * size_t(p.taps + 1);
  std::vector<float> shares(items.size() * share);
  over_items(p, items.size(), threads, [&](size_t i) {
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
