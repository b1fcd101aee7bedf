// Causal depthwise convolution with SiLU over channels-last tokens, forward and backward, in tiles that stay in L1.
// A chunk of a longer sequence brings the tokens before it (forward) and the gradients behind it (backward).
#include "conv.hpp"

#include <algorithm>

#include "rows.hpp"

namespace medmamba {
namespace MEDMAMBA_ISA {
namespace {

constexpr int kSpan = kTile + kMaxTaps - 1;

// Tokens from `first` on, `count` of them.
MEDMAMBA_INLINE Tokens consecutive(int64_t first, int count) {
  Tokens tokens;
  tokens.count = count;
  for (int t = 0; t < count; ++t) tokens.token[t] = first + t;
  return tokens;
}

// Rows of 16 lanes of a (batch, taps - 1, channels) float tensor; zeros where it is null.
static void load_edge(const float* edge, const Conv& p, int64_t batch, int64_t channel, int lanes, int row,
                      int rows, float* to) {
  for (int i = 0; i < rows; ++i) {
    float* line = to + i * kLanes;
    std::memset(line, 0, sizeof(float) * kLanes);
    if (edge == nullptr) continue;
    const float* from = edge + ((batch * (p.taps - 1) + row + i) * p.channels + channel);
    for (int lane = 0; lane < lanes; ++lane) line[lane] = from[lane];
  }
}

struct Weights {
  float taps[kMaxTaps][kLanes];
  float bias[kLanes];
};

static Weights load_weights(const Conv& p, int64_t channel, int lanes) {
  Weights w{};
  for (int lane = 0; lane < lanes; ++lane) {
    for (int k = 0; k < p.taps; ++k) w.taps[k][lane] = p.weight[(channel + lane) * p.taps + k];
    w.bias[lane] = p.bias == nullptr ? 0.0f : p.bias[channel + lane];
  }
  return w;
}

// Inputs of tokens start - (taps - 1) .. start + count, the first ones from `history` where they lie before 0.
static void load_inputs(const Conv& p, const ConvItem& item, int64_t start, int count, float* tile) {
  const int before = p.taps - 1;
  const int missing = int(std::max<int64_t>(0, before - start));
  if (missing > 0) {
    // history row i is token i - before
    load_edge(p.history, p, item.batch, item.channel, item.lanes, int(start), missing, tile);
  }
  const int64_t offset = item.batch * p.x.batch_stride + item.channel * p.x.channel_stride;
  int64_t at = start - before + missing;
  const int64_t end = start + count;
  float* to = tile + missing * kLanes;
  while (at < end) {
    const int part = int(std::min<int64_t>(kTile, end - at));
    load_tile(p.x, offset, consecutive(at, part), item.lanes, to);
    to += part * kLanes;
    at += part;
  }
}

// What comes before SiLU, for `count` tokens whose inputs begin at tile[0] with taps - 1 earlier ones.
MEDMAMBA_INLINE void window_sums(const Conv& p, const Weights& w, const float* tile, int count, float* out) {
  for (int t = 0; t < count; ++t) {
    for (int v = 0; v < kLanes; v += kWidth) {
      Vec sum = load(w.bias + v);
      for (int k = 0; k < p.taps; ++k) sum += load(w.taps[k] + v) * load(tile + (t + k) * kLanes + v);
      store(out + t * kLanes + v, sum);
    }
  }
}

static void forward(const Conv& p, const ConvItem& item) {
  alignas(64) float inputs[kSpan * kLanes];
  alignas(64) float sums[kTile * kLanes];
  const Exp2Table table = exp2_table();
  const Weights w = load_weights(p, item.channel, item.lanes);
  const int64_t offset = item.batch * p.out.batch_stride + item.channel * p.out.channel_stride;
  for (int64_t start = item.start; start < item.stop; start += kTile) {
    const int count = int(std::min<int64_t>(kTile, item.stop - start));
    load_inputs(p, item, start, count, inputs);
    window_sums(p, w, inputs, count, sums);
    for (int i = 0; i < count * kLanes; i += kWidth) {
      const Vec sum = load(sums + i);
      store(sums + i, sum * sigmoid(sum, table));
    }
    store_tile(p.out, offset, consecutive(start, count), item.lanes, sums);
  }
}

// Gradients of the window sums of tokens start .. start + count.
static void sum_gradients(const Conv& p, const ConvItem& item, const Weights& w, int64_t start, int count,
                          const Exp2Table& table, float* inputs, float* inner) {
  alignas(64) float sums[kTile * kLanes];
  load_inputs(p, item, start, count, inputs);
  window_sums(p, w, inputs, count, sums);
  const int64_t offset = item.batch * p.grad_out.batch_stride + item.channel * p.grad_out.channel_stride;
  load_tile(p.grad_out, offset, consecutive(start, count), item.lanes, inner);
  for (int i = 0; i < count * kLanes; i += kWidth) {
    const Vec sum = load(sums + i);
    const Vec s = sigmoid(sum, table);
    store(inner + i, load(inner + i) * s * (sum * (1.0f - s) + 1.0f));
  }
}

// From the last tile to the first, so that the gradients behind a tile are known when it is reached.
static void backward(const Conv& p, const ConvItem& item, float* grad_weight, float* grad_bias) {
  alignas(64) float inputs[kSpan * kLanes];
  alignas(64) float inner[kSpan * kLanes];  // of the tile and of the taps - 1 tokens behind it
  alignas(64) float grad_x[kTile * kLanes];
  alignas(64) float own_weight[kMaxTaps][kLanes] = {};
  alignas(64) float own_bias[kLanes] = {};
  const Exp2Table table = exp2_table();
  const Weights w = load_weights(p, item.channel, item.lanes);
  const int behind = p.taps - 1;
  const int64_t offset = item.batch * p.grad_x.batch_stride + item.channel * p.grad_x.channel_stride;

  alignas(64) float following[kMaxTaps * kLanes];
  if (item.stop < p.length) {
    const int count = int(std::min<int64_t>(behind, p.length - item.stop));
    sum_gradients(p, item, w, item.stop, count, table, inputs, inner);
    std::memcpy(following, inner, sizeof(float) * size_t(count) * kLanes);
    load_edge(p.following, p, item.batch, item.channel, item.lanes, 0, behind - count, following + count * kLanes);
  } else {
    load_edge(p.following, p, item.batch, item.channel, item.lanes, 0, behind, following);
  }
  const int64_t tiles = (item.stop - item.start + kTile - 1) / kTile;
  for (int64_t tile = tiles - 1; tile >= 0; --tile) {
    const int64_t start = item.start + tile * kTile;
    const int count = int(std::min<int64_t>(kTile, item.stop - start));
    sum_gradients(p, item, w, start, count, table, inputs, inner);
    std::memcpy(inner + count * kLanes, following, sizeof(float) * size_t(behind) * kLanes);
    for (int t = 0; t < count; ++t) {
      for (int v = 0; v < kLanes; v += kWidth) {
        const Vec here = load(inner + t * kLanes + v);
        Vec sum{};
        for (int k = 0; k < p.taps; ++k) {
          sum += load(w.taps[p.taps - 1 - k] + v) * load(inner + (t + k) * kLanes + v);
          store(own_weight[k] + v, load(own_weight[k] + v) + here * load(inputs + (t + k) * kLanes + v));
        }
        store(grad_x + t * kLanes + v, sum);
        store(own_bias + v, load(own_bias + v) + here);
      }
    }
    store_tile(p.grad_x, offset, consecutive(start, count), item.lanes, grad_x);
    std::memmove(following, inner, sizeof(float) * size_t(behind) * kLanes);
  }
  if (item.start == 0 && p.grad_first != nullptr) {
    for (int i = 0; i < behind; ++i) {
      float* to = p.grad_first + ((item.batch * behind + i) * p.channels + item.channel);
      for (int lane = 0; lane < item.lanes; ++lane) to[lane] = following[i * kLanes + lane];
    }
  }
  for (int lane = 0; lane < item.lanes; ++lane) {
    for (int k = 0; k < p.taps; ++k) grad_weight[lane * p.taps + k] = own_weight[k][lane];
    grad_bias[lane] = own_bias[lane];
  }
}

}  // namespace
}  // namespace MEDMAMBA_ISA

const ConvKernels& MEDMAMBA_CONV() {
  static const ConvKernels kernels = {MEDMAMBA_ISA::forward, MEDMAMBA_ISA::backward};
  return kernels;
}

}  // namespace medmamba
