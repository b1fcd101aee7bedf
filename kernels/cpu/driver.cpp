// Sums are taken in an order that follows from the shape alone, so that every result is bitwise the same for any
// number of threads: over blocks of channels first to last, over states one half after the other.
#include "driver.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#include "pages.hpp"
#include "threads.hpp"

namespace medmamba {
namespace {

// Below this many elements (token x channel x state) a second thread costs more than it saves.
constexpr int64_t kElementsPerThread = 1 << 18;
constexpr int kShareBuffers = 2;  // a panel's shares are summed while the next is under way

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

void check_segment(int64_t segment) {
  if (segment > kTile) {
    throw std::invalid_argument("segment is " + std::to_string(segment) + "; a tile has " +
                                std::to_string(kTile) + " tokens");
  }
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
        items.push_back({b, g * p.blocks_per_group() + i, int(count), -1, nullptr});
      }
    }
  }
  return items;
}

// Where there are two threads for each block, one takes each half of its states: item 2i and 2i + 1.
std::vector<Item> halves_of(const std::vector<Item>& items, std::vector<Exchange>& exchanges) {
  std::vector<Item> halves;
  exchanges = std::vector<Exchange>(items.size());
  for (size_t i = 0; i < items.size(); ++i) {
    for (int half : {0, 1}) {
      halves.push_back(items[i]);
      halves.back().half = half;
      halves.back().exchange = &exchanges[i];
    }
  }
  return halves;
}

bool can_halve(const Problem& p, int64_t items, int threads) {
  return 2 * items <= threads && p.padded_state() > kStatePadding;
}

int64_t all_blocks(const Problem& p) { return p.batch * p.blocks(); }

int useful_threads(const Problem& p, int threads) {
  const int64_t elements = p.batch * p.length * p.channels * p.state;
  const int64_t most = std::min<int64_t>(2 * all_blocks(p), elements / kElementsPerThread);
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

int64_t states_bytes(const Problem& p) { return p.batch * p.tiles() * p.blocks() * p.state_floats() * 4; }

bool is_empty(const Problem& p) { return p.batch == 0 || p.channels == 0; }

// So many blocks at once, and what each of them then takes.
struct Choice {
  int64_t blocks, cost = 1;
};

constexpr Choice kForwardChoices[] = {{kMaxBlocks}, {2}, {1}};
// An item sums dB and dC over its blocks while they are in the first cache; between items the sums go through the
// second (measured on Sapphire Rapids).
constexpr Choice kBackwardChoices[] = {{kMaxBlocks, 10}, {2, 11}, {1, 12}};

// Blocks per item: as balanced as can be, then as large as can be. Does not change the result.
template <size_t N>
int64_t blocks_per_item(const Problem& p, int threads, const Choice (&choices)[N]) {
  int64_t best = 1, best_cost = INT64_MAX;
  for (const Choice& choice : choices) {
    const int64_t items = p.batch * p.groups * ((p.blocks_per_group() + choice.blocks - 1) / choice.blocks);
    const int64_t in_a_row =
        std::min((items + threads - 1) / threads * std::min(choice.blocks, p.blocks_per_group()), all_blocks(p));
    if (in_a_row * choice.cost < best_cost) {
      best = choice.blocks;
      best_cost = in_a_row * choice.cost;
    }
  }
  return best;
}

// What the backward of one item owns besides the scratch of its thread.
struct ItemMemory {
  ItemMemory(const Problem& p, const Kernels& kernels, const Item& item) {
    const int64_t states = p.state_floats();
    const int64_t share = kShareBuffers * std::min<int64_t>(kPanelTiles, p.tiles()) * kernels.share_floats(p);
    const int64_t floats = item.blocks * (3 * states + 2 * kLanes);
    memory = std::make_unique<Aligned>(floats + 2 * share);
    std::memset(memory->data, 0, size_t(floats) * 4);
    float* next = memory->data;
    for (int i = 0; i < item.blocks; ++i) {
      BlockCarry& block = carry.blocks[i];
      for (float** part : {&block.adjoint, &block.rates, &block.grad_A}) *part = next, next += states;
      for (float** part : {&block.grad_skip, &block.grad_bias}) *part = next, next += kLanes;
    }
    for (float** part : {&carry.grad_B, &carry.grad_C}) *part = next, next += share;
    kernels.begin_backward(p, item, carry);
  }
  std::unique_ptr<Aligned> memory;
  BackwardCarry carry;
};

// One of the two sums over channels of a tile, and where it goes.
struct Projection {
  const Rows& rows;
  float* BackwardCarry::*share;
};

// Adds the shares of one group's items, kMaxBlocks blocks at a time, and stores the rows of one tile; `at` counts floats.
void store_shares(const Problem& p, const Kernels& kernels, const Projection& projection,
                  const std::vector<Item>& items, std::vector<ItemMemory>& memory, size_t first,
                  size_t last, int64_t tile, int64_t at) {
  if (projection.rows.data == nullptr) return;
  const auto share = [&](size_t i) { return memory[i].carry.*projection.share + at; };
  const int64_t floats = kernels.share_floats(p);
  const int64_t middle = floats / p.padded_state() * p.half_state();
  const auto add = [&](size_t to, size_t from) { kernels.add_share(share(from), floats, share(to)); };
  const size_t halves = items[first].half >= 0 ? 2 : 1;
  for (size_t i = first; halves == 2 && i < last; i += 2) std::copy_n(share(i + 1) + middle, floats - middle, share(i) + middle);
  const int blocks = items[first].blocks > 2 ? kMaxBlocks : items[first].blocks;
  const size_t together = halves * size_t(kMaxBlocks / blocks);
  for (size_t i = first; i < last; i += together) {
    const size_t stop = std::min(i + together, last);
    for (size_t step = halves; step < together; step *= 2) {
      for (size_t k = i; k + step < stop; k += 2 * step) add(k, k + step);
    }
    if (i > first) add(first, i);
  }
  const int64_t group = items[first].block / p.blocks_per_group();
  kernels.store_projection(p, projection.rows, items[first].batch, group, tile, share(first));
}

// Parameter gradients: items in order, so batch elements in order.
void add_parameters(const Problem& p, const Kernels& kernels, const std::vector<Item>& items,
                    const std::vector<ItemMemory>& memory) {
  for (size_t k = 0; k < items.size(); ++k) {
    const Item& item = items[k];
    for (int i = 0; i < item.blocks; ++i) {
      const BlockCarry& carry = memory[k].carry.blocks[i];
      const int64_t block = item.block + i;
      if (p.grad_A) kernels.add_state(p, item, block, carry.grad_A, p.grad_A);
      if (p.grad_skip) kernels.add_channels(p, block, carry.grad_skip, p.grad_skip);
      if (p.grad_delta_bias) kernels.add_channels(p, block, carry.grad_bias, p.grad_delta_bias);
      if (p.grad_h0) {
        float* start = p.grad_h0 + item.batch * p.channels * p.state;
        kernels.add_state(p, item, block, carry.adjoint, start);
      }
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
  check_segment(segment);
  Problem p{};
  p.segment = segment;
  p.batch = batch, p.length = length, p.channels = channels, p.groups = groups, p.state = state;
  return {batch, p.tiles(), p.blocks(), p.padded_state(), kLanes};
}

namespace {

// Runs attempt(lease) until it says that it was done; a second time at most, with one thread.
template <class Attempt>
void with_threads(int threads, const Attempt& attempt) {
  Lease lease(threads);
  while (!attempt(lease)) {
  }
}

}  // namespace

void run_forward(const Problem& p, int threads, const std::string& instruction_set) {
  const Kernels& kernels = kernels_named(instruction_set);
  if (is_empty(p)) return;
  check_segment(p.segment);
  check_order(p);
  const int64_t scratch = padded(kernels.forward_scratch(p));
  with_threads(useful_threads(p, threads), [&](Lease& lease) {
    std::vector<Exchange> exchanges;
    std::vector<Item> items;
    if (can_halve(p, all_blocks(p), lease.threads())) {
      items = halves_of(items_of(p, 1), exchanges);
    } else {
      items = items_of(p, blocks_per_item(p, lease.threads(), kForwardChoices));
    }
    std::atomic<size_t> next{0};
    Aligned memory(scratch * lease.threads());
    return lease.run([&](int thread) {
      make_resident(p, p.out, thread, lease.threads());
      if (p.states) make_resident(p.states, states_bytes(p), thread, lease.threads());
      // both halves of a block are taken before any other block: nobody waits for what nobody does
      for (size_t i = next++; i < items.size(); i = next++) {
        kernels.forward(p, items[i], memory.data + thread * scratch);
      }
    });
  });
}

namespace {

// Tiles last to first, a panel at a time. Each thread keeps its items; who finishes a panel sums its shares.
class Backward {
 public:
  Backward(const Problem& p, const Kernels& kernels, int threads)
      : p_(p), kernels_(kernels), threads_(threads), items_(items_of(p, blocks_per_item(p, threads, kBackwardChoices))) {
    if (can_halve(p, all_blocks(p), threads)) items_ = halves_of(items_of(p, 1), exchanges_);
    for (const Item& item : items_) memory_.emplace_back(p, kernels, item);
    for (size_t i = 0; i < items_.size(); ++i) {
      if (items_[i].block % p.blocks_per_group() == 0 && items_[i].half < 1) starts_.push_back(i);
    }
    starts_.push_back(items_.size());
    panels_ = (p.tiles() + kPanelTiles - 1) / kPanelTiles;
    scratch_ = padded(kernels.backward_scratch(p));
    scratches_ = std::make_unique<Aligned>(scratch_ * threads);
    remaining_ = std::vector<std::atomic<int64_t>>(size_t(panels_));
    for (auto& remaining : remaining_) remaining = int64_t(items_.size());
    summed_.assign(size_t(panels_ + kShareBuffers), 0);
    std::fill(summed_.begin() + panels_, summed_.end(), 1);
  }

  void work(int thread) {
    for (const Rows* rows : {&p_.grad_u, &p_.grad_delta, &p_.grad_gate}) {
      make_resident(p_, *rows, thread, threads_);
    }
    const int64_t count = int64_t(items_.size());
    const int64_t first = count * thread / threads_, last = count * (thread + 1) / threads_;
    for (int64_t panel = panels_ - 1; panel >= 0; --panel) {
      await(&summed_[size_t(panel + kShareBuffers)], 1);
      for (int64_t tile = end_of(panel) - 1; tile >= panel * kPanelTiles; --tile) {
        for (int64_t i = first; i < last; ++i) {
          const Item& item = items_[size_t(i)];
          kernels_.backward_tile(p_, item, tile, share_of(panel, tile), i > first && same_group(item, items_[size_t(i - 1)]),
                                 memory_[size_t(i)].carry, scratches_->data + thread * scratch_);
        }
      }
      if (last > first && remaining_[size_t(panel)].fetch_sub(last - first) == last - first) sum(panel);
    }
  }

  void finish() const { add_parameters(p_, kernels_, items_, memory_); }

 private:
  bool same_group(const Item& a, const Item& b) const {
    return a.batch == b.batch && a.block / p_.blocks_per_group() == b.block / p_.blocks_per_group();
  }

  int64_t end_of(int64_t panel) const { return std::min((panel + 1) * kPanelTiles, p_.tiles()); }

  int64_t share_of(int64_t panel, int64_t tile) const {
    const int64_t tiles = std::min<int64_t>(kPanelTiles, p_.tiles());
    return (panel % kShareBuffers * tiles + tile - panel * kPanelTiles) * kernels_.share_floats(p_);
  }

  void sum(int64_t panel) {
    for (int64_t tile = panel * kPanelTiles; tile < end_of(panel); ++tile) {
      for (size_t group = 0; group + 1 < starts_.size(); ++group) {
        const size_t from = starts_[group], to = starts_[group + 1];
        const int64_t at = share_of(panel, tile);
        const Projection projections[] = {{p_.grad_B, &BackwardCarry::grad_B}, {p_.grad_C, &BackwardCarry::grad_C}};
        for (const Projection& projection : projections) {
          store_shares(p_, kernels_, projection, items_, memory_, from, to, tile, at);
        }
      }
    }
    publish(&summed_[size_t(panel)], 1);
  }

  const Problem& p_;
  const Kernels& kernels_;
  const int threads_;
  std::vector<Exchange> exchanges_;
  std::vector<Item> items_;
  std::vector<ItemMemory> memory_;
  std::vector<size_t> starts_;  // first item of every (batch, group)
  int64_t panels_, scratch_;
  std::unique_ptr<Aligned> scratches_;
  std::vector<std::atomic<int64_t>> remaining_;  // items to do, by panel
  std::vector<int64_t> summed_;                  // 1 once the shares of a panel are stored
};

}  // namespace

void run_backward(const Problem& p, int threads, const std::string& instruction_set) {
  const Kernels& kernels = kernels_named(instruction_set);
  zero_parameters(p);
  if (is_empty(p)) return;
  check_segment(p.segment);
  check_order(p);
  with_threads(useful_threads(p, threads), [&](Lease& lease) {
    Backward backward(p, kernels, lease.threads());
    const bool done = lease.run([&](int thread) { backward.work(thread); });
    if (done) backward.finish();
    return done;
  });
}

}  // namespace medmamba
