// Instance norm with leaky ReLU over channels-last maps as raw pointers and sizes; for inference.
#pragma once

#include <string>

#include "problem.hpp"

namespace medmamba {

// x and out are dense (batch, length, channels) of one type, and may be the same.
struct Norm {
  int64_t batch, length, channels;
  Type type;
  const void* x;
  void* out;
  const float* weight;  // (channels) or null, which means ones
  const float* bias;    // (channels) or null, which means zeros
  float eps;            // added to the variance
  float slope;          // of negative outputs, 1 for no activation
};

// Tokens start .. stop of one sample, all channels.
struct NormItem {
  int64_t batch, start, stop;
};

struct NormKernels {
  // Per channel the mean of the item's values, and the sum of their squared distances from it.
  void (*moments)(const Norm&, const NormItem&, float* mean, float* squares);
  // out = leaky(x * scale + offset), both per channel.
  void (*apply)(const Norm&, const NormItem&, const float* scale, const float* offset);
};

const NormKernels& norm_base();
#if defined(__x86_64__)
const NormKernels& norm_v3();
const NormKernels& norm_v4();
#endif

// Throw std::invalid_argument for an unknown instruction set.
void run_norm(const Norm& norm, int threads, const std::string& instruction_set);

}  // namespace medmamba
