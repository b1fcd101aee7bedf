// Memory that is about to be written for the first time.
#pragma once

#include "problem.hpp"

namespace medmamba {

// This thread's share of making resident what the call will write: a page that the system hands over on its first
// write costs twice as much as one of many asked for together. Does nothing where the system offers no such thing.
void make_resident(void* data, int64_t bytes, int thread, int threads);

// The same of every row of a tensor, where it has no gaps.
void make_resident(const Problem& problem, const Rows& rows, int thread, int threads);

}  // namespace medmamba
