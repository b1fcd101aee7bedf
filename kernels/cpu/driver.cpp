// Work is cut by shape alone, and shares are added in a fixed order, so that every result is bitwise the same
// for any number of threads. Threads live for one call: nothing survives a fork, nothing is pinned.
#include "driver.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#include "threads.hpp"

namespace medmamba {
namespace {

// Below this many elements (token x channel x state) a second thread costs more than it saves.
constexpr int64_t kElementsPerThread = 1 << 20;
constexpr int64_t kPanel = int64_t(kPanelTiles) * kTile;

const Kernels& kernels_named(const std::string& name) {
  for (const std::string& known : instruction_sets()) {
    if (name.empty() || name == known) {
#if defined(__x86_64__)
      if (known == "v4") return kernels_v4();
      if (known == "v3") return kernels_v3();
#endif
      return kernels_base();
    }
  }
  throw std::invalid_argument("this processor or build has no instruction set '" + name + "'");
}

void check_order(const Problem& p) {
  if (p.order == nullptr) return;
  std::vector<bool> seen(static_cast<size_t>(p.length));
  for (int64_t t = 0; t < p.length; ++t) {
    const int64_t token = p.order[t];
    if (token < 0 || token >= p.length || seen[static_cast<size_t>(token)]) {
      throw std::invalid_argument("order is not a permutation of the tokens: position " +
                                  std::to_string(t) + " holds " + std::to_string(token));
    }
    seen[static_cast<size_t>(token)] = true;
  }
}

// The items of a problem, `most` blocks each.
std::vector<Item> items_of(const Problem& p, int64_t most) {
  std::vector<Item> items;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t g = 0; g < p.groups; ++g) {
      for (int64_t i = 0; i < p.blocks_per_group(); i += most) {
        const int64_t count = std::min(most, p.blocks_per_group() - i);
        items.push_back({b, g * p.blocks_per_group() + i, int(count)});
      }
    }
  }
  return items;
}

int useful_threads(const Problem& p, int threads, size_t items) {
  const int64_t elements = p.batch * p.length * p.channels * p.state;
  const int64_t most = std::min<int64_t>(int64_t(items), elements / kElementsPerThread);
  return int(std::max<int64_t>(1, std::min<int64_t>(threads, most)));
}

struct Aligned {
  explicit Aligned(int64_t floats)
      : data(static_cast<float*>(::operator new(size_t(floats) * 4, std::align_val_t(64)))) {}
  ~Aligned() { ::operator delete(data, std::align_val_t(64)); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  float* data;
};

int64_t padded(int64_t floats) { return (floats + 15) / 16 * 16; }

bool is_empty(const Problem& p) { return p.batch == 0 || p.channels == 0; }

// Blocks per item of a forward: as balanced as can be, then as large as can be. Does not change the result.
int64_t forward_blocks(const Problem& p, int threads) {
  int64_t best = 1, best_cost = INT64_MAX;
  for (int64_t most : {4, 2, 1}) {
    const int64_t items = p.batch * p.groups * ((p.blocks_per_group() + most - 1) / most);
    const int64_t cost = (items + threads - 1) / threads * std::min(most, p.blocks_per_group());
    if (cost < best_cost) {
      best = most;
      best_cost = cost;
    }
  }
  return best;
}

// What the backward of one item owns besides the scratch of its thread.
struct ItemMemory {
  ItemMemory(const Problem& p, const Kernels& kernels, const Item& item) {
    const int64_t states = p.state_floats();
    const int64_t share = std::min(kPanel, p.tiles() * kTile) * p.padded_state();
    const int64_t floats = 3 * states + 2 * kLanes + 2 * share;
    memory = std::make_unique<Aligned>(floats);
    std::memset(memory->data, 0, size_t(floats) * 4);
    float* next = memory->data;
    for (float** part : {&carry.adjoint, &carry.rates, &carry.grad_A}) *part = next, next += states;
    for (float** part : {&carry.grad_skip, &carry.grad_bias}) *part = next, next += kLanes;
    for (float** part : {&carry.grad_B, &carry.grad_C}) *part = next, next += share;
    kernels.begin_backward(p, item, carry);
  }
  std::unique_ptr<Aligned> memory;
  BackwardCarry carry;
};

// Adds the shares of one group's items, first to last, and stores the rows of one tile.
void store_shares(const Problem& p, const Kernels& kernels, const Rows& rows, bool is_B,
                  const std::vector<Item>& items, std::vector<ItemMemory>& memory, size_t first,
                  size_t last, int64_t tile, int64_t row) {
  if (rows.data == nullptr) return;
  const auto share = [&](size_t i) {
    return (is_B ? memory[i].carry.grad_B : memory[i].carry.grad_C) + row * p.padded_state();
  };
  float* total = share(first);
  for (size_t i = first + 1; i < last; ++i) {
    const float* other = share(i);
    for (int64_t at = 0; at < kTile * p.padded_state(); ++at) total[at] += other[at];
  }
  const int64_t group = items[first].block / p.blocks_per_group();
  kernels.store_projection(p, rows, items[first].batch, group, tile, total);
}

// Parameter gradients: items in order, so batch elements in order.
void add_parameters(const Problem& p, const Kernels& kernels, const std::vector<Item>& items,
                    const std::vector<ItemMemory>& memory) {
  for (size_t i = 0; i < items.size(); ++i) {
    const BackwardCarry& carry = memory[i].carry;
    const int64_t block = items[i].block;
    if (p.grad_A) kernels.add_state(p, block, carry.grad_A, p.grad_A);
    if (p.grad_skip) kernels.add_channels(p, block, carry.grad_skip, p.grad_skip);
    if (p.grad_delta_bias) kernels.add_channels(p, block, carry.grad_bias, p.grad_delta_bias);
    if (p.grad_h0) {
      float* start = p.grad_h0 + items[i].batch * p.channels * p.state;
      kernels.add_state(p, block, carry.adjoint, start);
    }
  }
}

void zero_parameters(const Problem& p) {
  const size_t states = size_t(p.channels * p.state);
  if (p.grad_A) std::fill_n(p.grad_A, states, 0.0f);
  if (p.grad_h0) std::fill_n(p.grad_h0, states * size_t(p.batch), 0.0f);
  if (p.grad_skip) std::fill_n(p.grad_skip, size_t(p.channels), 0.0f);
  if (p.grad_delta_bias) std::fill_n(p.grad_delta_bias, size_t(p.channels), 0.0f);
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (v4) names.push_back("v4");
  if (v3) names.push_back("v3");
#endif
  names.push_back("base");
  return names;
}

std::vector<int64_t> states_shape(int64_t batch, int64_t length, int64_t channels, int64_t groups,
                                  int64_t state, int64_t segment) {
  Problem p{};
  p.segment = segment;
  p.batch = batch, p.length = length, p.channels = channels, p.groups = groups, p.state = state;
  return {batch, p.tiles(), p.blocks(), p.padded_state(), kLanes};
}

void run_forward(const Problem& p, int threads, const std::string& instruction_set) {
  const Kernels& kernels = kernels_named(instruction_set);
  if (is_empty(p)) return;
  check_order(p);
  const std::vector<Item> items = items_of(p, forward_blocks(p, threads));
  threads = useful_threads(p, threads, items.size());
  std::atomic<size_t> next{0};
  const int64_t scratch = padded(kernels.forward_scratch(p));
  Aligned memory(scratch * threads);
  on_threads(threads, [&](int thread, Barrier&) {
    for (size_t i = next++; i < items.size(); i = next++) {
      kernels.forward(p, items[i], memory.data + thread * scratch);
    }
  });
}

void run_backward(const Problem& p, int threads, const std::string& instruction_set) {
  const Kernels& kernels = kernels_named(instruction_set);
  zero_parameters(p);
  if (is_empty(p)) return;
  check_order(p);
  const std::vector<Item> items = items_of(p, 1);
  threads = useful_threads(p, threads, items.size());
  std::vector<ItemMemory> memory;
  memory.reserve(items.size());
  for (const Item& item : items) memory.emplace_back(p, kernels, item);
  std::vector<size_t> starts;  // first item of every (batch, group)
  for (size_t i = 0; i < items.size(); ++i) {
    if (items[i].block % p.blocks_per_group() == 0) starts.push_back(i);
  }
  starts.push_back(items.size());
  const int64_t panels = (p.tiles() + kPanelTiles - 1) / kPanelTiles;
  const int64_t scratch = padded(kernels.backward_scratch(p));
  Aligned scratches(scratch * threads);
  std::vector<std::atomic<int64_t>> next_item(static_cast<size_t>(panels));
  std::vector<std::atomic<int64_t>> next_tile(static_cast<size_t>(panels));
  on_threads(threads, [&](int thread, Barrier& barrier) {
    for (int64_t panel = panels - 1; panel >= 0; --panel) {
      const int64_t first = panel * kPanelTiles;
      const int64_t last = std::min(first + kPanelTiles, p.tiles());
      const int64_t count = int64_t(items.size());
      for (int64_t i = next_item[panel]++; i < count; i = next_item[panel]++) {
        for (int64_t tile = last - 1; tile >= first; --tile) {
          kernels.backward_tile(p, items[i], tile, int((tile - first) * kTile), memory[i].carry,
                                scratches.data + thread * scratch);
        }
      }
      barrier.wait();
      const int64_t groups = int64_t(starts.size()) - 1;
      const int64_t jobs = groups * (last - first);
      for (int64_t job = next_tile[panel]++; job < jobs; job = next_tile[panel]++) {
        const int64_t tile = first + job / groups;
        const size_t from = starts[job % groups], to = starts[job % groups + 1];
        const int64_t row = (tile - first) * kTile;
        store_shares(p, kernels, p.grad_B, true, items, memory, from, to, tile, row);
        store_shares(p, kernels, p.grad_C, false, items, memory, from, to, tile, row);
      }
      barrier.wait();
    }
  });
  add_parameters(p, kernels, items, memory);
}

}  // namespace medmamba
