// A causal depthwise convolution with SiLU as raw pointers and sizes. Positions are tokens; all offsets are 64-bit.
#pragma once

#include <string>

#include "problem.hpp"

namespace medmamba {

constexpr int kMaxTaps = 8;
constexpr int64_t kConvPanel = 1024;  // tokens of one item: fixes the order of sums, whatever the threads

// Edges are (batch, taps - 1, channels) floats and may be null, which means zeros.
struct Conv {
  int64_t batch, length, channels;
  int taps;
  Rows x;
  const float* weight;   // (channels, taps), the last tap meets the token itself
  const float* bias;     // (channels) or null
  const float* history;  // inputs of the tokens before the first
  Rows out;              // forward

  Rows grad_out, grad_x;    // backward
  const float* following;   // gradients of the sums of the tokens behind the last
  float* grad_first;        // the same of the first tokens, for whoever has the tokens before; or null
  float* grad_weight;       // (channels, taps)
  float* grad_bias;         // (channels)
};

// Up to kLanes channels of the tokens start .. stop of one sequence.
struct ConvItem {
  int64_t batch, channel;
  int lanes;
  int64_t start, stop;
};

struct ConvKernels {
  void (*forward)(const Conv&, const ConvItem&);
  // grad_weight (lanes, taps) and grad_bias (lanes) are the item's own share.
  void (*backward)(const Conv&, const ConvItem&, float* grad_weight, float* grad_bias);
};

const ConvKernels& conv_base();
#if defined(__x86_64__)
const ConvKernels& conv_v3();
const ConvKernels& conv_v4();
#endif

// Throw std::invalid_argument for an unknown instruction set or a number of taps outside 1 .. kMaxTaps.
void run_conv_forward(const Conv& conv, int threads, const std::string& instruction_set);
void run_conv_backward(const Conv& conv, int threads, const std::string& instruction_set);

}  // namespace medmamba
