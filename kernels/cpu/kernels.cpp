// Forward and backward of the scan for the instruction set this file is compiled for (three times on x86-64).
// One block of 16 channels fills the lanes, so every sum over states stays inside a lane. Allocates nothing.
#include <initializer_list>

#include "rows.hpp"

namespace medmamba {
namespace MEDMAMBA_ISA {
namespace {

constexpr int kTileFloats = kTile * kLanes;
constexpr int kVectors = kLanes / kWidth;  // registers of one block

// Where a block lies: its first channel, how many of its lanes are used, and its group.
struct Block {
  int64_t channel;
  int lanes;
  int64_t group;
};

Block block_at(const Problem& p, int64_t number) {
  const int64_t group = number / p.blocks_per_group();
  const int64_t inside = number % p.blocks_per_group() * kLanes;
  const int64_t left = p.channels_per_group() - inside;
  return {group * p.channels_per_group() + inside, int(left < kLanes ? left : kLanes), group};
}

int64_t first_position(const Problem& p, int64_t tile) { return tile * p.tile(); }

Tokens tokens_of(const Problem& p, int64_t tile) {
  Tokens tokens;
  const int64_t first = first_position(p, tile);
  const int64_t left = p.length - first;
  tokens.count = left < 0 ? 0 : int(left < p.tile() ? left : p.tile());
  for (int t = 0; t < tokens.count; ++t) {
    const int64_t position = p.reverse ? p.length - 1 - (first + t) : first + t;
    tokens.token[t] = p.order ? int64_t(p.order[position]) : position;
  }
  return tokens;
}

// First position after t at which the state is zeroed, at most count.
int next_reset(const Problem& p, int64_t first, int t, int count) {
  if (p.reset_every <= 0) return count;
  const int64_t position = (first + t) / p.reset_every * p.reset_every + p.reset_every - first;
  return position < count ? int(position) : count;
}

// (channels, state) parameters or state into [state][lane], zeros in the padding.
void gather_state(const float* from, const Block& block, const Problem& p, float factor, float* to) {
  std::memset(to, 0, sizeof(float) * size_t(p.state_floats()));
  if (from == nullptr) return;
  for (int64_t n = 0; n < p.state; ++n) {
    for (int lane = 0; lane < block.lanes; ++lane) {
      to[n * kLanes + lane] = factor * from[(block.channel + lane) * p.state + n];
    }
  }
}

void scatter_state(const float* from, const Block& block, const Problem& p, float* to) {
  for (int64_t n = 0; n < p.state; ++n) {
    for (int lane = 0; lane < block.lanes; ++lane) {
      to[(block.channel + lane) * p.state + n] = from[n * kLanes + lane];
    }
  }
}

void load_projection(const Rows& rows, int64_t batch, int64_t group, const Problem& p,
                     const Tokens& tokens, float* tile) {
  const int64_t offset = batch * rows.batch_stride + group * rows.group_stride;
  load_tile(rows, offset, tokens, int(p.state), tile, int(p.padded_state()));
}

int64_t row_offset(const Rows& rows, int64_t batch, const Block& block) {
  return batch * rows.batch_stride + block.channel * rows.channel_stride;
}

void channel_row(const float* from, const Block& block, float* row) {
  for (int lane = 0; lane < kLanes; ++lane) {
    row[lane] = from != nullptr && lane < block.lanes ? from[block.channel + lane] : 0.0f;
  }
}

// delta -> step sizes in place; returns the largest magnitude. A NaN does not count: exp2 hands it on.
float step_sizes(const Problem& p, const Block& block, int count, float* dt) {
  float bias[kLanes];
  channel_row(p.delta_bias, block, bias);
  const Exp2Table table = exp2_table();
  Vec largest = Vec{};
  for (int v = 0; v < kVectors; ++v) {
    const Vec add = load(bias + v * kWidth);
    for (int t = 0; t < count; ++t) {
      float* row = dt + t * kLanes + v * kWidth;
      Vec value = load(row) + add;
      if (p.softplus) value = softplus(value, table);
      store(row, value);
      const Vec magnitude = as_float(as_int(value) & 0x7fffffff);
      largest = magnitude > largest ? magnitude : largest;
    }
  }
  float result = 0.0f;
  for (int i = 0; i < kWidth; ++i) result = largest[i] > result ? largest[i] : result;
  return result;
}

float largest_rate(const Problem& p, const float* rates) {
  float result = 0.0f;
  for (int64_t i = 0; i < p.state_floats(); ++i) {
    const float magnitude = rates[i] < 0 ? -rates[i] : rates[i];
    result = magnitude > result ? magnitude : result;
  }
  return result;
}

// Whether exp2_product may be used as it is.
bool is_ordinary(float largest_step, float largest_rate) {
  return largest_step * largest_rate < -kLowestExponent;
}

template <bool kOrdinary>
MEDMAMBA_INLINE Vec decay_of(Vec dt, Vec rate, const Exp2Table& table) {
  return kOrdinary ? exp2_product(dt, rate, table) : exp2_product_safe(dt, rate, table);
}

// ---------------------------------------------------------------------------------------------- forward

struct ForwardTile {
  float *dt, *x, *y;     // [token][lane]
  const float *B, *C;    // [token][padded state]
  float* decay;          // [token of a segment][state], where there are segments
  int padded_state;
  int segment;
};

// One segment of the local-bidirectional mode: the recurrence backwards from zero, each token's own input left out.
template <int kStates>
MEDMAMBA_INLINE void add_local_states(const ForwardTile& tile, int from, int to) {
  Vec e[kStates] = {};  // state of the token behind, its own input included
  for (int t = to - 1; t >= from; --t) {
    const Vec x = load(tile.x + t * kLanes);
    const float* B = tile.B + t * tile.padded_state;
    const float* C = tile.C + t * tile.padded_state;
    const float* decay = tile.decay + (t - from) * kStates * kWidth;
    Vec y[2] = {load(tile.y + t * kLanes), Vec{}};
    MEDMAMBA_UNROLL for (int n = 0; n < kStates; ++n) {
      const Vec local = load(decay + n * kWidth) * e[n];
      y[n % 2] += local * C[n];
      e[n] = local + x * B[n];
    }
    store(tile.y + t * kLanes, y[0] + y[1]);
  }
}

// kStates states of one vector of channels over the tokens [from, to), adding to y.
template <int kStates, bool kOrdinary, bool kLocal>
void scan_states(const ForwardTile& tile, int from, int to, const float* rates, float* state) {
  const Exp2Table table = exp2_table();
  Vec h[kStates], A[kStates];
  MEDMAMBA_UNROLL for (int n = 0; n < kStates; ++n) {
    h[n] = load(state + n * kLanes);
    A[n] = load(rates + n * kLanes);
  }
  int segment_start = from;
  for (int t = from; t < to; ++t) {
    const Vec dt = load(tile.dt + t * kLanes), x = load(tile.x + t * kLanes);
    const float* B = tile.B + t * tile.padded_state;
    const float* C = tile.C + t * tile.padded_state;
    Vec y[2] = {load(tile.y + t * kLanes), Vec{}};
    MEDMAMBA_UNROLL for (int n = 0; n < kStates; ++n) {
      const Vec decay = decay_of<kOrdinary>(dt, A[n], table);
      if (kLocal) store(tile.decay + ((t - segment_start) * kStates + n) * kWidth, decay);
      h[n] = decay * h[n] + x * B[n];
      y[n % 2] += h[n] * C[n];
    }
    store(tile.y + t * kLanes, y[0] + y[1]);
    if (kLocal && (t + 1 == to || t + 1 - segment_start == tile.segment)) {
      add_local_states<kStates>(tile, segment_start, t + 1);
      segment_start = t + 1;
    }
  }
  MEDMAMBA_UNROLL for (int n = 0; n < kStates; ++n) store(state + n * kLanes, h[n]);
}

template <int kStates, bool kOrdinary>
void scan(const ForwardTile& tile, int from, int to, const float* rates, float* state) {
  if (tile.segment > 0) {
    scan_states<kStates, kOrdinary, true>(tile, from, to, rates, state);
  } else {
    scan_states<kStates, kOrdinary, false>(tile, from, to, rates, state);
  }
}

template <bool kOrdinary>
void scan_range(const ForwardTile& tile, int from, int to, const float* rates, float* state) {
  constexpr int kMost = kWidth == 16 ? 16 : 4;
  for (int v = 0; v < kVectors; ++v) {
    ForwardTile part = tile;
    part.dt += v * kWidth;
    part.x += v * kWidth;
    part.y += v * kWidth;
    int n = 0;
    for (; n + kMost <= tile.padded_state; n += kMost) {
      part.B = tile.B + n;
      part.C = tile.C + n;
      const int at = n * kLanes + v * kWidth;
      scan<kMost, kOrdinary>(part, from, to, rates + at, state + at);
    }
    for (; n < tile.padded_state; n += kStatePadding) {
      part.B = tile.B + n;
      part.C = tile.C + n;
      const int at = n * kLanes + v * kWidth;
      scan<kStatePadding, kOrdinary>(part, from, to, rates + at, state + at);
    }
  }
}

// Step sizes, inputs and the skip term of one block; returns whether the ordinary exp2 will do.
void open_tile(const Problem& p, const Item& item, const Block& block, const Tokens& tokens,
               const ForwardTile& tile) {
  load_tile(p.u, row_offset(p.u, item.batch, block), tokens, block.lanes, tile.x);
  float skip[kLanes];
  channel_row(p.skip, block, skip);
  for (int v = 0; v < kLanes; v += kWidth) {
    const Vec factor = load(skip + v);
    for (int t = 0; t < tokens.count; ++t) {
      const int at = t * kLanes + v;
      const Vec u = load(tile.x + at);
      store(tile.y + at, p.skip ? factor * u : Vec{});
      store(tile.x + at, load(tile.dt + at) * u);
    }
  }
}

void close_tile(const Problem& p, const Item& item, const Block& block, const Tokens& tokens,
                const ForwardTile& tile) {
  if (p.gate.data != nullptr) {
    float* gate = tile.x;  // no longer needed
    load_tile(p.gate, row_offset(p.gate, item.batch, block), tokens, block.lanes, gate);
    const Exp2Table table = exp2_table();
    for (int at = 0; at < tokens.count * kLanes; at += kWidth) {
      const Vec z = load(gate + at);
      store(tile.y + at, load(tile.y + at) * z * sigmoid(z, table));
    }
  }
  store_tile(p.out, row_offset(p.out, item.batch, block), tokens, block.lanes, tile.y);
}

int64_t forward_scratch(const Problem& p) {
  return 3 * kTileFloats + 2 * kTile * p.padded_state() + kMaxBlocks * 2 * p.state_floats() +
         p.segment * kLanes * kLanes;
}

void forward(const Problem& p, const Item& item, float* scratch) {
  ForwardTile tile;
  tile.dt = scratch;
  tile.x = tile.dt + kTileFloats;
  tile.y = tile.x + kTileFloats;
  float* B = tile.y + kTileFloats;
  float* C = B + kTile * p.padded_state();
  float* states = C + kTile * p.padded_state();
  float* rates = states + kMaxBlocks * p.state_floats();
  tile.B = B;
  tile.C = C;
  tile.decay = rates + kMaxBlocks * p.state_floats();
  tile.padded_state = int(p.padded_state());
  tile.segment = int(p.segment);
  float fastest[kMaxBlocks];
  const int64_t group = block_at(p, item.block).group;
  for (int i = 0; i < item.blocks; ++i) {
    const Block block = block_at(p, item.block + i);
    const float* h0 = p.h0 ? p.h0 + item.batch * p.channels * p.state : nullptr;
    gather_state(h0, block, p, 1.0f, states + i * p.state_floats());
    gather_state(p.A, block, p, kLog2E, rates + i * p.state_floats());
    fastest[i] = largest_rate(p, rates + i * p.state_floats());
  }
  Tokens next = tokens_of(p, 0);
  for (int64_t number = 0; number < p.tiles(); ++number) {
    const Tokens tokens = next;
    next = tokens_of(p, number + 1);
    const int64_t first = first_position(p, number);
    load_projection(p.B, item.batch, group, p, tokens, B);
    load_projection(p.C, item.batch, group, p, tokens, C);
    for (int i = 0; i < item.blocks; ++i) {
      const Block block = block_at(p, item.block + i);
      float* state = states + i * p.state_floats();
      if (p.reset_every > 0 && first > 0 && first % p.reset_every == 0) {
        std::memset(state, 0, sizeof(float) * size_t(p.state_floats()));
      }
      if (p.states != nullptr) {
        const int64_t at = (item.batch * p.tiles() + number) * p.blocks() + item.block + i;
        std::memcpy(p.states + at * p.state_floats(), state, sizeof(float) * size_t(p.state_floats()));
      }
      load_tile(p.delta, row_offset(p.delta, item.batch, block), tokens, block.lanes, tile.dt);
      const bool ordinary = is_ordinary(step_sizes(p, block, tokens.count, tile.dt), fastest[i]);
      open_tile(p, item, block, tokens, tile);
      for (const Rows* rows : {&p.u, &p.delta, &p.gate}) {
        prefetch_tile<false>(*rows, row_offset(*rows, item.batch, block), next);
      }
      prefetch_tile<true>(p.out, row_offset(p.out, item.batch, block), tokens);
      for (int t = 0; t < tokens.count;) {
        const int to = next_reset(p, first, t, tokens.count);
        const float* rate = rates + i * p.state_floats();
        if (ordinary) {
          scan_range<true>(tile, t, to, rate, state);
        } else {
          scan_range<false>(tile, t, to, rate, state);
        }
        if (to < tokens.count) std::memset(state, 0, sizeof(float) * size_t(p.state_floats()));
        t = to;
      }
      close_tile(p, item, block, tokens, tile);
    }
  }
  for (int i = 0; i < item.blocks; ++i) {
    const Block block = block_at(p, item.block + i);
    float* last = p.h_last + item.batch * p.channels * p.state;
    scatter_state(states + i * p.state_floats(), block, p, last);
  }
}

// --------------------------------------------------------------------------------------------- backward

// One block: rows [token][lane], projections [token][padded state].
struct BackwardTile {
  float *dt, *u, *x;          // step size, input, dt u
  float *slope;               // of softplus
  float *dy;                  // gradient of y before the gate
  float *by_input, *by_rate;  // sum_n B g and sum_n A q
  float *y;                   // y without the skip term, where the gate needs it
  float *gate_slope;          // dout d silu(z)
  float *decay, *carried;     // [token][state of a group]: exp(dt A), and exp(dt A) h_{t-1}
  float *local;               // the same for the local state of a segment
  float *B, *C;
  float *sums_B, *sums_C;     // lane sums under way, [state group][token][kSumFloats]
  int padded_state;
  int segment;
  bool gated;
};

constexpr int S = 4;  // states of a group: their recurrences and dA fill the registers
static_assert(S == kStatePadding, "groups must cover the padded states");

// Four sums over lanes are carried as one vector until a tile is done: the last steps are then shared.
#if defined(__AVX512F__)
constexpr int kSumFloats = 16;  // state n in the lanes 4n to 4n + 3

MEDMAMBA_INLINE void begin_sums(const Vec* v, float* to, bool accumulate) {
  const __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(__m512(v[0]), __m512(v[1]), 0x44),
                                 _mm512_shuffle_f32x4(__m512(v[0]), __m512(v[1]), 0xee));
  const __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(__m512(v[2]), __m512(v[3]), 0x44),
                                 _mm512_shuffle_f32x4(__m512(v[2]), __m512(v[3]), 0xee));
  const Vec c = Vec(_mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)));
  store(to, accumulate ? load(to) + c : c);
}

MEDMAMBA_INLINE void end_sums(const float* from, float* to) {
  const __m512 c = _mm512_loadu_ps(from);
  const __m512 d = _mm512_add_ps(c, _mm512_permute_ps(c, 0xb1));
  const __m512 e = _mm512_add_ps(d, _mm512_permute_ps(d, 0x4e));
  _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, e)));
}
#else
constexpr int kSumFloats = 4;

MEDMAMBA_INLINE void begin_sums(const Vec* v, float* to, bool accumulate) {
  for (int n = 0; n < 4; ++n) {
    float sum = 0.0f;
    for (int lane = 0; lane < kWidth; ++lane) sum += v[n][lane];
    to[n] = accumulate ? to[n] + sum : sum;
  }
}

MEDMAMBA_INLINE void end_sums(const float* from, float* to) { std::memcpy(to, from, 4 * sizeof(float)); }
#endif

// Four states of one vector of channels: where they lie, all [state][lane].
struct StateGroup {
  const float* rates;
  const float* state;  // that enters the tile
  float* adjoint;
  float* grad_A;
  int lane;   // first lane of the vector
  int state0; // first state
};

MEDMAMBA_INLINE float* sums_at(float* sums, const StateGroup& g, int t) {
  return sums + (g.state0 / S * kTile + t) * kSumFloats;
}

template <bool kOrdinary>
void recompute_states(const BackwardTile& tile, const StateGroup& g, int from, int to, Vec* h) {
  const Exp2Table table = exp2_table();
  Vec A[S];
  MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) A[n] = load(g.rates + n * kLanes);
  for (int t = from; t < to; ++t) {
    const float* B = tile.B + t * tile.padded_state + g.state0;
    const float* C = tile.C + t * tile.padded_state + g.state0;
    const int row = t * kLanes + g.lane;
    const Vec dt = load(tile.dt + row), x = load(tile.x + row), dy = load(tile.dy + row);
    Vec y = Vec{}, grad_C[S];
    MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) {
      const Vec decay = decay_of<kOrdinary>(dt, A[n], table);
      const Vec before = decay * h[n];
      store(tile.decay + (t * S + n) * kWidth, decay);
      store(tile.carried + (t * S + n) * kWidth, before);
      h[n] = before + x * B[n];
      grad_C[n] = dy * h[n];
      y += C[n] * h[n];
    }
    if (tile.gated) store(tile.y + row, load(tile.y + row) + y);
    begin_sums(grad_C, sums_at(tile.sums_C, g, t), g.lane > 0);
  }
}

// The local states of the segments, last to first, and what they add to y and dC.
void recompute_local(const BackwardTile& tile, const StateGroup& g, int count) {
  Vec e[S] = {};
  for (int t = count - 1; t >= 0; --t) {
    const float* B = tile.B + t * tile.padded_state + g.state0;
    const float* C = tile.C + t * tile.padded_state + g.state0;
    const int row = t * kLanes + g.lane;
    const bool ends = (t + 1) % tile.segment == 0;
    const Vec x = load(tile.x + row), dy = load(tile.dy + row);
    Vec y = Vec{}, grad_C[S];
    MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) {
      const Vec local = ends ? Vec{} : load(tile.decay + (t * S + n) * kWidth) * e[n];
      store(tile.local + (t * S + n) * kWidth, local);
      e[n] = local + x * B[n];
      grad_C[n] = dy * local;
      y += C[n] * local;
    }
    if (tile.gated) store(tile.y + row, load(tile.y + row) + y);
    begin_sums(grad_C, sums_at(tile.sums_C, g, t), true);
  }
}

// What an adjoint adds to the sums over states of one token.
MEDMAMBA_INLINE void add_token(const BackwardTile& tile, const StateGroup& g, int row, const float* B,
                               const Vec* input, const Vec* q) {
  Vec by_input = load(tile.by_input + row), by_rate = load(tile.by_rate + row);
  MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) {
    by_input += B[n] * input[n];
    by_rate += load(g.rates + n * kLanes) * q[n];
  }
  store(tile.by_input + row, by_input);
  store(tile.by_rate + row, by_rate);
}

// Adjoint of the local states, first to last: C dy plus what the token before hands on.
void walk_local(const BackwardTile& tile, const StateGroup& g, int count) {
  Vec handed[S] = {}, dA[S] = {};
  for (int t = 0; t < count; ++t) {
    const float* B = tile.B + t * tile.padded_state + g.state0;
    const float* C = tile.C + t * tile.padded_state + g.state0;
    const int row = t * kLanes + g.lane;
    const bool starts = t % tile.segment == 0;
    const Vec dt = load(tile.dt + row), x = load(tile.x + row), dy = load(tile.dy + row);
    Vec input[S], q[S], grad_B[S];
    MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) {
      input[n] = starts ? Vec{} : handed[n];
      const Vec adjoint = C[n] * dy + input[n];
      q[n] = adjoint * load(tile.local + (t * S + n) * kWidth);
      handed[n] = adjoint * load(tile.decay + (t * S + n) * kWidth);
      dA[n] += dt * q[n];
      grad_B[n] = x * input[n];
    }
    add_token(tile, g, row, B, input, q);
    begin_sums(grad_B, sums_at(tile.sums_B, g, t), g.lane > 0);
  }
  MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) {
    store(g.grad_A + n * kLanes, load(g.grad_A + n * kLanes) + dA[n]);
  }
}

void walk_back(const BackwardTile& tile, const StateGroup& g, int from, int to) {
  Vec r[S], dA[S];
  MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) {
    r[n] = load(g.adjoint + n * kLanes);
    dA[n] = load(g.grad_A + n * kLanes);
  }
  for (int t = to - 1; t >= from; --t) {
    const float* B = tile.B + t * tile.padded_state + g.state0;
    const float* C = tile.C + t * tile.padded_state + g.state0;
    const int row = t * kLanes + g.lane;
    const Vec dt = load(tile.dt + row), x = load(tile.x + row), dy = load(tile.dy + row);
    Vec adjoint[S], q[S], grad_B[S];
    MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) {
      adjoint[n] = C[n] * dy + r[n];
      q[n] = adjoint[n] * load(tile.carried + (t * S + n) * kWidth);
      r[n] = adjoint[n] * load(tile.decay + (t * S + n) * kWidth);
      dA[n] += dt * q[n];
      grad_B[n] = x * adjoint[n];
    }
    add_token(tile, g, row, B, adjoint, q);
    begin_sums(grad_B, sums_at(tile.sums_B, g, t), g.lane > 0 || tile.segment > 0);
  }
  MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) {
    store(g.adjoint + n * kLanes, r[n]);
    store(g.grad_A + n * kLanes, dA[n]);
  }
}

// Both walks of one group of states over the tile that begins at position `first`.
void backward_states(const Problem& p, const BackwardTile& tile, const StateGroup& g, int64_t first,
                     int count, bool ordinary) {
  Vec h[S];
  MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) h[n] = load(g.state + n * kLanes);
  for (int t = 0; t < count;) {
    const int to = next_reset(p, first, t, count);
    if (ordinary) {
      recompute_states<true>(tile, g, t, to, h);
    } else {
      recompute_states<false>(tile, g, t, to, h);
    }
    MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) h[n] = Vec{};
    t = to;
  }
  if (tile.segment > 0) {
    recompute_local(tile, g, count);
    walk_local(tile, g, count);
  }
  for (int to = count; to > 0;) {
    int from = 0;  // the last reset before `to`
    if (p.reset_every > 0) {
      const int64_t reset = (first + to - 1) / p.reset_every * p.reset_every - first;
      from = reset > 0 ? int(reset) : 0;
    }
    walk_back(tile, g, from, to);
    const int64_t position = first + from;
    if (p.reset_every > 0 && position > 0 && position % p.reset_every == 0) {
      MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) store(g.adjoint + n * kLanes, Vec{});
    }
    to = from;
  }
}

void load_gradient(const Problem& p, const Item& item, const Block& block, const Tokens& tokens,
                   float* to) {
  if (p.grad_out.data == nullptr) {
    std::memset(to, 0, sizeof(float) * kTileFloats);
    return;
  }
  load_tile(p.grad_out, row_offset(p.grad_out, item.batch, block), tokens, block.lanes, to);
}

// Everything that does not depend on the states. Returns the largest step size.
float open_backward(const Problem& p, const Item& item, const Block& block, const Tokens& tokens,
                    const BackwardTile& tile) {
  const Exp2Table table = exp2_table();
  const int floats = tokens.count * kLanes;
  load_tile(p.delta, row_offset(p.delta, item.batch, block), tokens, block.lanes, tile.dt);
  if (p.softplus) {
    float bias[kLanes];
    channel_row(p.delta_bias, block, bias);
    for (int i = 0; i < floats; i += kWidth) {
      store(tile.slope + i, sigmoid(load(tile.dt + i) + load(bias + i % kLanes), table));
    }
  }
  const float largest = step_sizes(p, block, tokens.count, tile.dt);
  load_tile(p.u, row_offset(p.u, item.batch, block), tokens, block.lanes, tile.u);
  load_gradient(p, item, block, tokens, tile.dy);
  if (p.gate.data != nullptr) {
    load_tile(p.gate, row_offset(p.gate, item.batch, block), tokens, block.lanes, tile.gate_slope);
  }
  for (int i = 0; i < floats; i += kWidth) {
    store(tile.x + i, load(tile.u + i) * load(tile.dt + i));
    store(tile.by_input + i, Vec{});
    store(tile.by_rate + i, Vec{});
    if (p.gate.data != nullptr) {
      const Vec z = load(tile.gate_slope + i), grad = load(tile.dy + i), s = sigmoid(z, table);
      store(tile.gate_slope + i, grad * s * (1.0f + z * (1.0f - s)));
      store(tile.dy + i, grad * z * s);
      store(tile.y + i, Vec{});
    }
  }
  return largest;
}

// Gradients of the rows and of the per-channel parameters, from the sums over the states.
void close_backward(const Problem& p, const Item& item, const Block& block, const Tokens& tokens,
                    const BackwardTile& tile, const BackwardCarry& carry) {
  float skip[kLanes];
  channel_row(p.skip, block, skip);
  for (int v = 0; v < kLanes; v += kWidth) {
    const Vec factor = load(skip + v);
    Vec grad_skip = load(carry.grad_skip + v), grad_bias = load(carry.grad_bias + v);
    for (int t = 0; t < tokens.count; ++t) {
      const int row = t * kLanes + v;
      const Vec u = load(tile.u + row), dy = load(tile.dy + row), by_input = load(tile.by_input + row);
      // sum_n A q was taken with A log2(e)
      Vec grad_dt = by_input * u + load(tile.by_rate + row) * kLn2;
      if (p.softplus) grad_dt *= load(tile.slope + row);
      store(tile.by_input + row, by_input * load(tile.dt + row) + factor * dy);
      store(tile.by_rate + row, grad_dt);
      if (tile.gated) {
        store(tile.y + row, (load(tile.y + row) + factor * u) * load(tile.gate_slope + row));
      }
      grad_skip += dy * u;
      grad_bias += grad_dt;
    }
    store(carry.grad_skip + v, grad_skip);
    store(carry.grad_bias + v, grad_bias);
  }
  const struct { const Rows& rows; const float* from; } results[] = {
      {p.grad_u, tile.by_input}, {p.grad_delta, tile.by_rate}, {p.grad_gate, tile.y}};
  for (const auto& result : results) {
    if (result.rows.data == nullptr) continue;
    store_tile(result.rows, row_offset(result.rows, item.batch, block), tokens, block.lanes, result.from);
  }
}

constexpr int kBackwardRows = 9;

int64_t sum_floats(const Problem& p) { return p.padded_state() / S * kTile * kSumFloats; }

int64_t backward_scratch(const Problem& p) {
  return kBackwardRows * kTileFloats + 3 * kTile * S * kWidth + 2 * kTile * p.padded_state() +
         2 * sum_floats(p);
}

BackwardTile lay_out(const Problem& p, float* scratch) {
  BackwardTile tile;
  float* next = scratch;
  const auto take = [&next](int64_t floats) {
    float* taken = next;
    next += floats;
    return taken;
  };
  float** const rows[kBackwardRows] = {&tile.dt,       &tile.u,       &tile.x, &tile.slope,     &tile.dy,
                                       &tile.by_input, &tile.by_rate, &tile.y, &tile.gate_slope};
  for (float** row : rows) *row = take(kTileFloats);
  float** const groups[] = {&tile.decay, &tile.carried, &tile.local};
  for (float** group : groups) *group = take(kTile * S * kWidth);
  tile.sums_B = take(sum_floats(p));
  tile.sums_C = take(sum_floats(p));
  tile.B = take(kTile * p.padded_state());
  tile.C = take(kTile * p.padded_state());
  tile.padded_state = int(p.padded_state());
  tile.segment = int(p.segment);
  tile.gated = p.gate.data != nullptr && p.grad_gate.data != nullptr;
  return tile;
}

void backward_tile(const Problem& p, const Item& item, int64_t number, int first_row,
                   BackwardCarry& carry, float* scratch) {
  const Tokens tokens = tokens_of(p, number);
  const Block block = block_at(p, item.block);
  const BackwardTile tile = lay_out(p, scratch);
  load_projection(p.B, item.batch, block.group, p, tokens, tile.B);
  load_projection(p.C, item.batch, block.group, p, tokens, tile.C);
  const float largest = open_backward(p, item, block, tokens, tile);
  const bool ordinary = is_ordinary(largest, carry.fastest);
  const Tokens next = tokens_of(p, number > 0 ? number - 1 : 0);
  for (const Rows* rows : {&p.u, &p.delta, &p.gate, &p.grad_out}) {
    prefetch_tile<false>(*rows, row_offset(*rows, item.batch, block), next);
  }
  for (const Rows* rows : {&p.grad_u, &p.grad_delta, &p.grad_gate}) {
    prefetch_tile<true>(*rows, row_offset(*rows, item.batch, block), tokens);
  }
  const int64_t entering = (item.batch * p.tiles() + number) * p.blocks() + item.block;
  for (int n = 0; n < tile.padded_state; n += S) {
    for (int lane = 0; lane < kLanes; lane += kWidth) {
      const int64_t at = n * kLanes + lane;
      const StateGroup g = {carry.rates + at,  p.states + entering * p.state_floats() + at,
                            carry.adjoint + at, carry.grad_A + at, lane, n};
      backward_states(p, tile, g, first_position(p, number), tokens.count, ordinary);
    }
    for (int t = 0; t < tokens.count; ++t) {
      const int64_t row = (first_row + t) * p.padded_state() + n;
      const int64_t sums = (n / S * kTile + t) * kSumFloats;
      end_sums(tile.sums_B + sums, carry.grad_B + row);
      end_sums(tile.sums_C + sums, carry.grad_C + row);
    }
  }
  close_backward(p, item, block, tokens, tile, carry);
}

void begin_backward(const Problem& p, const Item& item, BackwardCarry& carry) {
  const Block block = block_at(p, item.block);
  const int64_t sequence = item.batch * p.channels * p.state;
  gather_state(p.grad_h_last ? p.grad_h_last + sequence : nullptr, block, p, 1.0f, carry.adjoint);
  gather_state(p.A, block, p, kLog2E, carry.rates);
  carry.fastest = largest_rate(p, carry.rates);
}

// ------------------------------------------------------------------------------------- for the driver

void add_state(const Problem& p, int64_t number, const float* from, float* to) {
  const Block block = block_at(p, number);
  for (int lane = 0; lane < block.lanes; ++lane) {
    for (int64_t n = 0; n < p.state; ++n) {
      to[(block.channel + lane) * p.state + n] += from[n * kLanes + lane];
    }
  }
}

void add_channels(const Problem& p, int64_t number, const float* from, float* to) {
  const Block block = block_at(p, number);
  for (int lane = 0; lane < block.lanes; ++lane) to[block.channel + lane] += from[lane];
}

template <class T>
void store_projection_as(const Problem& p, const Rows& rows, int64_t offset, const Tokens& tokens,
                         const float* from) {
  typename T::Stored* base = static_cast<typename T::Stored*>(rows.data) + offset;
  for (int t = 0; t < tokens.count; ++t) {
    typename T::Stored* row = base + tokens.token[t] * rows.token_stride;
    for (int64_t n = 0; n < p.state; ++n) {
      row[n * rows.channel_stride] = T::narrow(from[t * p.padded_state() + n]);
    }
  }
}

void store_projection(const Problem& p, const Rows& rows, int64_t batch, int64_t group, int64_t tile,
                      const float* from) {
  const Tokens tokens = tokens_of(p, tile);
  const int64_t offset = batch * rows.batch_stride + group * rows.group_stride;
  switch (rows.type) {
    case Type::float32: return store_projection_as<Float32>(p, rows, offset, tokens, from);
    case Type::bfloat16: return store_projection_as<BFloat16>(p, rows, offset, tokens, from);
    case Type::float16: return store_projection_as<Float16>(p, rows, offset, tokens, from);
  }
}

}  // namespace

const Kernels kernels = {MEDMAMBA_ISA_NAME, forward,          forward_scratch,
                         begin_backward,    backward_tile,    backward_scratch,
                         add_state,         add_channels,     store_projection};

}  // namespace MEDMAMBA_ISA

const Kernels& MEDMAMBA_KERNELS() { return MEDMAMBA_ISA::kernels; }

}  // namespace medmamba
