// The forward of one item, tile by tile.
#pragma once

#include "tiles.hpp"

namespace medmamba {
namespace MEDMAMBA_ISA {
namespace {

struct ForwardTile {
  float *dt, *u, *x;     // [token][lane]
  float* y[2];           // sums over each half of the states
  const float *B, *C;    // [token][padded state]
  float* decay;          // [token of a segment][state], where there are segments
  const Prefetch* ahead; // null once its rows have been asked for
  int padded_state;
  int segment;
};

// One segment of the local-bidirectional mode: the recurrence backwards from zero, each token's own input left out.
template <int kStates>
MEDMAMBA_INLINE void add_local_states(const ForwardTile& tile, float* sums, int from, int to) {
  Vec e[kStates] = {};  // state of the token behind, its own input included
  for (int t = to - 1; t >= from; --t) {
    const Vec x = load(tile.x + t * kLanes);
    const float* B = tile.B + t * tile.padded_state;
    const float* C = tile.C + t * tile.padded_state;
    const float* decay = tile.decay + (t - from) * kStates * kWidth;
    Vec y = load(sums + t * kLanes);
    MEDMAMBA_UNROLL for (int n = 0; n < kStates; ++n) {
      const Vec local = load(decay + n * kWidth) * e[n];
      y += local * C[n];
      e[n] = local + x * B[n];
    }
    store(sums + t * kLanes, y);
  }
}

// kHalves times kStates states of one vector of channels over the tokens [from, to), adding to the sums; both
// halves at once write the sum of both.
template <int kStates, int kHalves, bool kOrdinary, bool kLocal, bool kExclusive>
void scan_states(const ForwardTile& tile, float* sums, int from, int to, const float* rates, float* state) {
  const Exp2Table table = exp2_table();
  Vec h[kHalves * kStates];
  MEDMAMBA_UNROLL for (int n = 0; n < kHalves * kStates; ++n) h[n] = load(state + n * kLanes);
  int segment_start = from;
  for (int t = from; t < to; ++t) {
    const Vec dt = load(tile.dt + t * kLanes), x = load(tile.x + t * kLanes);
    const float* B = tile.B + t * tile.padded_state;
    const float* C = tile.C + t * tile.padded_state;
    Vec y[kHalves] = {};
    MEDMAMBA_UNROLL for (int n = 0; n < kHalves * kStates; ++n) {
      const Vec decay = decay_of<kOrdinary>(dt, load(rates + n * kLanes), table);
      if (kLocal) store(tile.decay + ((t - segment_start) * kStates + n) * kWidth, decay);
      const Vec before = decay * h[n];
      h[n] = kExclusive ? before + x * B[n] : decay * h[n] + x * B[n];
      y[n / kStates] += (kExclusive ? before : h[n]) * C[n];
    }
    if (kHalves == 2) {
      store(sums + t * kLanes, y[0] + y[kHalves - 1]);
    } else {
      store(sums + t * kLanes, load(sums + t * kLanes) + y[0]);
    }
    if (tile.ahead != nullptr) Prefetch::ask(*tile.ahead, t);
    if (kLocal && (t + 1 == to || t + 1 - segment_start == tile.segment)) {
      add_local_states<kStates>(tile, sums, segment_start, t + 1);
      segment_start = t + 1;
    }
  }
  MEDMAMBA_UNROLL for (int n = 0; n < kHalves * kStates; ++n) store(state + n * kLanes, h[n]);
}

template <int kStates, int kHalves, bool kOrdinary>
void scan(const ForwardTile& tile, float* sums, int from, int to, const float* rates, float* state,
          bool exclusive) {
  if (kHalves == 1 && tile.segment > 0) {
    scan_states<kStates, 1, kOrdinary, true, false>(tile, sums, from, to, rates, state);
  } else if (exclusive) {
    scan_states<kStates, kHalves, kOrdinary, false, true>(tile, sums, from, to, rates, state);
  } else {
    scan_states<kStates, kHalves, kOrdinary, false, false>(tile, sums, from, to, rates, state);
  }
}

// Whether both halves are computed together, which leaves their sum in the rows of the first.
bool is_joint(const Problem& p, int first, int last) {
  return kWidth == 16 && first == 0 && last == 16 && p.segment == 0;
}

// The states [first, last) over the tokens [from, to). Whatever is computed together, each half has its own sum.
template <bool kOrdinary>
void scan_range(const Problem& p, ForwardTile tile, int first, int last, int from, int to,
                const float* rates, float* state) {
  constexpr int kMost = kWidth == 16 ? 8 : 4;
  const ForwardTile whole = tile;
  const int half = int(p.half_state());
  for (int v = 0; v < kVectors; ++v) {
    tile.dt = whole.dt + v * kWidth;
    tile.x = whole.x + v * kWidth;
    for (int n = first; n < last;) {
      float* sums = whole.y[n >= half] + v * kWidth;
      tile.B = whole.B + n;
      tile.C = whole.C + n;
      const int at = n * kLanes + v * kWidth;
      const int stop = n < half ? (half < last ? half : last) : last;
      if (is_joint(p, n, last)) {
        scan<kMost, 2, kOrdinary>(tile, sums, from, to, rates + at, state + at, p.exclusive);
        n += 2 * kMost;
      } else if (n + kMost <= stop) {
        scan<kMost, 1, kOrdinary>(tile, sums, from, to, rates + at, state + at, p.exclusive);
        n += kMost;
      } else {
        scan<kStatePadding, 1, kOrdinary>(tile, sums, from, to, rates + at, state + at, p.exclusive);
        n += kStatePadding;
      }
      tile.ahead = nullptr;
    }
  }
}

// Inputs of one block; the sums start at zero. Returns the largest step.
float open_tile(const Problem& p, const Item& item, const Block& block, const Tokens& tokens,
                const ForwardTile& tile, bool joint) {
  load_tile(p.delta, row_offset(p.delta, item.batch, block), tokens, block.lanes, tile.dt);
  load_tile(p.u, row_offset(p.u, item.batch, block), tokens, block.lanes, tile.u);
  if (!joint) {
    for (float* sums : tile.y) std::memset(sums, 0, sizeof(float) * kTileFloats);
  }
  return step_sizes(p, block, tokens.count, tile.dt, tile.u, tile.x, nullptr);
}

void close_tile(const Problem& p, const Item& item, const Block& block, const Tokens& tokens,
                const ForwardTile& tile, const float* other_half) {
  float skip[kLanes];
  channel_row(p.skip, block, skip);
  const bool gated = p.gate.data != nullptr, added = p.partial.data != nullptr;
  float *gate = tile.x, *partial = tile.dt, *y = tile.y[0];  // rows no longer needed
  if (gated) load_tile(p.gate, row_offset(p.gate, item.batch, block), tokens, block.lanes, gate);
  if (added) load_tile(p.partial, row_offset(p.partial, item.batch, block), tokens, block.lanes, partial);
  const Exp2Table table = exp2_table();
  for (int at = 0; at < tokens.count * kLanes; at += kWidth) {
    Vec sum = load(y + at);
    if (other_half != nullptr) sum += load(other_half + at);
    if (p.skip) sum += load(skip + at % kLanes) * load(tile.u + at);
    if (added) sum += load(partial + at);
    if (gated) {
      const Vec z = load(gate + at);
      sum *= z * sigmoid(z, table);
    }
    store(y + at, sum);
  }
  store_tile(p.out, row_offset(p.out, item.batch, block), tokens, block.lanes, y);
}

constexpr int kForwardRows = 5;

int64_t forward_scratch(const Problem& p) {
  return kForwardRows * kTileFloats + 2 * kTile * p.padded_state() + kMaxBlocks * 2 * p.state_floats() +
         p.segment * kLanes * kLanes;
}

// What the forward of an item carries from tile to tile.
struct Forward {
  ForwardTile tile;
  float *B, *C, *states, *rates;
  float fastest[kMaxBlocks];
  int first_state, last_state;
};

Forward begin_forward(const Problem& p, const Item& item, float* scratch) {
  Forward f;
  float** const rows[kForwardRows] = {&f.tile.dt, &f.tile.u, &f.tile.x, &f.tile.y[0], &f.tile.y[1]};
  for (float** row : rows) *row = scratch, scratch += kTileFloats;
  f.tile.B = f.B = scratch;
  f.tile.C = f.C = f.B + kTile * p.padded_state();
  f.states = f.C + kTile * p.padded_state();
  f.rates = f.states + kMaxBlocks * p.state_floats();
  f.tile.decay = f.rates + kMaxBlocks * p.state_floats();
  f.tile.padded_state = int(p.padded_state());
  f.tile.segment = int(p.segment);
  f.first_state = item.half == 1 ? int(p.half_state()) : 0;
  f.last_state = item.half == 0 ? int(p.half_state()) : int(p.padded_state());
  for (int i = 0; i < item.blocks; ++i) {
    const Block block = block_at(p, item.block + i);
    const float* h0 = p.h0 ? p.h0 + item.batch * p.channels * p.state : nullptr;
    gather_state(h0, block, p, 1.0f, f.states + i * p.state_floats());
    gather_state(p.A, block, p, kLog2E, f.rates + i * p.state_floats());
    f.fastest[i] = largest_rate(p, f.rates + i * p.state_floats());
  }
  return f;
}

// One block of one tile.
void forward_block(const Problem& p, const Item& item, Forward& f, int i, int64_t number,
                   const Tokens& tokens, const Tokens& next) {
  const Block block = block_at(p, item.block + i);
  const int64_t first = first_position(p, number), floats = p.state_floats();
  const int64_t own = f.first_state * kLanes, owned = (f.last_state - f.first_state) * kLanes;
  float* state = f.states + i * floats;
  const float* rate = f.rates + i * floats;
  if (p.resets_before(first)) std::memset(state, 0, sizeof(float) * size_t(floats));
  if (p.states != nullptr) {
    const int64_t at = (item.batch * p.tiles() + number) * p.blocks() + item.block + i;
    std::memcpy(p.states + at * floats + own, state + own, sizeof(float) * size_t(owned));
  }
  const bool joint = is_joint(p, f.first_state, f.last_state);
  const bool ordinary = is_ordinary(open_tile(p, item, block, tokens, f.tile, joint), f.fastest[i]);
  Prefetch ahead(next, tokens);
  for (const Rows* rows : {&p.u, &p.delta, &p.gate}) {
    ahead.read(*rows, row_offset(*rows, item.batch, block));
  }
  ahead.write(p.out, row_offset(p.out, item.batch, block));
  ForwardTile tile = f.tile;
  tile.ahead = &ahead;
  for (int t = 0; t < tokens.count;) {
    const int to = next_reset(p, first, t, tokens.count);
    if (ordinary) {
      scan_range<true>(p, tile, f.first_state, f.last_state, t, to, rate, state);
    } else {
      scan_range<false>(p, tile, f.first_state, f.last_state, t, to, rate, state);
    }
    if (to < tokens.count) std::memset(state, 0, sizeof(float) * size_t(floats));
    t = to;
  }
  if (item.half == 1) {
    await(&item.exchange->consumed, number + 1 - kRing);
    std::memcpy(item.exchange->rows[number % kRing][0], tile.y[1], sizeof(float) * kTileFloats);
    publish(&item.exchange->produced, number + 1);
  } else if (item.half == 0) {
    await(&item.exchange->produced, number + 1);
    close_tile(p, item, block, tokens, tile, item.exchange->rows[number % kRing][0]);
    publish(&item.exchange->consumed, number + 1);
  } else {
    close_tile(p, item, block, tokens, tile, joint ? nullptr : tile.y[1]);
  }
}

void forward(const Problem& p, const Item& item, float* scratch) {
  Forward f = begin_forward(p, item, scratch);
  const int64_t group = block_at(p, item.block).group;
  Tokens next = tokens_of(p, 0);
  for (int64_t number = 0; number < p.tiles(); ++number) {
    const Tokens tokens = next;
    next = tokens_of(p, number + 1);
    load_projection(p.B, item.batch, group, p, tokens, f.B);
    load_projection(p.C, item.batch, group, p, tokens, f.C);
    for (int i = 0; i < item.blocks; ++i) forward_block(p, item, f, i, number, tokens, next);
  }
  for (int i = 0; i < item.blocks; ++i) {
    const Block block = block_at(p, item.block + i);
    float* last = p.h_last + item.batch * p.channels * p.state;
    scatter_state(f.states + i * p.state_floats(), block, p, f.first_state, f.last_state, last);
  }
}

}  // namespace
}  // namespace MEDMAMBA_ISA
}  // namespace medmamba
