// Runs whole scans: which instruction set, which thread does what. The result never depends on the threads.
#pragma once

#include <string>
#include <vector>

#include "problem.hpp"

namespace medmamba {

// Instruction sets of this build that this processor has, best first.
std::vector<std::string> instruction_sets();

// Throws std::invalid_argument for an instruction set that is not among them, or an order that is no permutation.
void run_forward(const Problem& problem, int threads, const std::string& instruction_set);
void run_backward(const Problem& problem, int threads, const std::string& instruction_set);

// Floats of the saved states: (batch, tiles, blocks, padded state, lanes).
std::vector<int64_t> states_shape(int64_t batch, int64_t length, int64_t channels, int64_t groups,
                                  int64_t state, int64_t segment);

}  // namespace medmamba
