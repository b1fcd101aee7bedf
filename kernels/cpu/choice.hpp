// Which build of a kernel runs, and on how many threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "driver.hpp"
#include "threads.hpp"

namespace medmamba {

// Below this many values a second thread costs more than it saves.
constexpr int64_t kValuesPerThread = 1 << 17;

// The best build this processor has, or the named one; the builds for x86 may be null elsewhere.
template <class Kernels>
const Kernels& build_named(const std::string& name, const Kernels& (*base)(), const Kernels& (*v3)(),
                           const Kernels& (*v4)()) {
  for (const std::string& known : instruction_sets()) {
    if (name.empty() || name == known) {
      if (known == "v4" && v4 != nullptr) return v4();
      if (known == "v3" && v3 != nullptr) return v3();
      return base();
    }
  }
  throw std::invalid_argument("this processor or build has no instruction set '" + name + "'");
}

// Call work(0) .. work(items - 1), shared among threads where there are enough values for them.
template <class Work>
void over_items(size_t items, int64_t values, int threads, const Work& work) {
  const int64_t most = std::min<int64_t>(int64_t(items), values / kValuesPerThread);
  const int used = int(std::max<int64_t>(1, std::min<int64_t>(threads, most)));
  std::atomic<size_t> next{0};
  Lease lease(used);
  const auto share = [&](int) {
    for (size_t i = next++; i < items; i = next++) work(i);
  };
  if (!lease.run(share)) share(0);
}

}  // namespace medmamba
