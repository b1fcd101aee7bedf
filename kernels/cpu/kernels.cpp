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
        prefetch_tile(*rows, row_offset(*rows, item.batch, block), next);
      }
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

// Rows of up to kMaxBlocks blocks, [block][token][lane].
struct BackwardTile {
  float *dt, *x, *dy;        // step size, dt u, gradient of y before the gate
  float *by_input, *by_rate; // sum_n B g and sum_n A q
  float *y;                  // y without the skip term, where a gate needs it
  float *decay, *carried;    // [token][vector][state]: exp(dt A), and exp(dt A) h_{t-1}
  float* local;              // the same for the local state of a segment
  const float *B, *C;        // [token][padded state]
  float *grad_B, *grad_C;    // [token][padded state]
  int padded_state;
  int segment;
  bool gated;
};

constexpr int kBackwardStates = 4;

// Sums over the lanes of four vectors.
MEDMAMBA_INLINE void add_lane_sums(const Vec* v, float* to, bool accumulate) {
  float sums[4];
#if defined(__AVX512F__)
  const __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(__m512(v[0]), __m512(v[1]), 0x44),
                                 _mm512_shuffle_f32x4(__m512(v[0]), __m512(v[1]), 0xee));
  const __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(__m512(v[2]), __m512(v[3]), 0x44),
                                 _mm512_shuffle_f32x4(__m512(v[2]), __m512(v[3]), 0xee));
  // 128-bit parts: v0 v0 v1 v1 and v2 v2 v3 v3 -> v0 v1 v2 v3
  const __m512 c = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  const __m512 d = _mm512_add_ps(c, _mm512_permute_ps(c, 0xb1));
  const __m512 e = _mm512_add_ps(d, _mm512_permute_ps(d, 0x4e));
  _mm_storeu_ps(sums, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, e)));
#else
  for (int i = 0; i < 4; ++i) {
    float sum = 0.0f;
    for (int lane = 0; lane < kWidth; ++lane) sum += v[i][lane];
    sums[i] = sum;
  }
#endif
  for (int i = 0; i < 4; ++i) to[i] = accumulate ? to[i] + sums[i] : sums[i];
}

// Four states of kCount vectors of channels over the tokens [from, to), forwards then backwards.
// rates, state, adjoint, grad_A: [state][lane] of the first vector; blocks lie state_floats apart.
struct StateGroup {
  const float* rates;
  const float* state;
  float* adjoint;
  float* grad_A;
  int64_t block_pitch;
  bool accumulate;  // not the first vectors to add to grad_B, grad_C
};

// Offsets of vector i of a group that starts at vector `first` of the item.
MEDMAMBA_INLINE int64_t row_at(int vector) {
  return int64_t(vector / kVectors) * kTileFloats + vector % kVectors * kWidth;
}
MEDMAMBA_INLINE int64_t state_at(const StateGroup& g, int vector) {
  return int64_t(vector / kVectors) * g.block_pitch + vector % kVectors * kWidth;
}

template <int kCount, bool kOrdinary>
void recompute_states(const BackwardTile& tile, const StateGroup& g, int first, int from, int to,
                      float* h_now, int n0) {
  constexpr int S = kBackwardStates;
  const Exp2Table table = exp2_table();
  Vec h[kCount][S], A[kCount][S];
  MEDMAMBA_UNROLL for (int i = 0; i < kCount; ++i) {
    MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) {
      h[i][n] = load(h_now + (i * S + n) * kWidth);
      A[i][n] = load(g.rates + state_at(g, first + i) + n * kLanes);
    }
  }
  for (int t = from; t < to; ++t) {
    const float* B = tile.B + t * tile.padded_state + n0;
    const float* C = tile.C + t * tile.padded_state + n0;
    Vec grad_C[S] = {};
    MEDMAMBA_UNROLL for (int i = 0; i < kCount; ++i) {
      const int64_t row = row_at(first + i) + t * kLanes;
      const Vec dt = load(tile.dt + row), x = load(tile.x + row), dy = load(tile.dy + row);
      float* decays = tile.decay + (t * kCount + i) * S * kWidth;
      float* carried = tile.carried + (t * kCount + i) * S * kWidth;
      Vec y = Vec{};
      MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) {
        const Vec decay = decay_of<kOrdinary>(dt, A[i][n], table);
        const Vec before = decay * h[i][n];
        store(decays + n * kWidth, decay);
        store(carried + n * kWidth, before);
        h[i][n] = before + x * B[n];
        grad_C[n] += dy * h[i][n];
        if (tile.gated) y += C[n] * h[i][n];
      }
      if (tile.gated) store(tile.y + row, load(tile.y + row) + y);
    }
    add_lane_sums(grad_C, tile.grad_C + t * tile.padded_state + n0, g.accumulate);
  }
  MEDMAMBA_UNROLL for (int i = 0; i < kCount; ++i) {
    MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) store(h_now + (i * S + n) * kWidth, h[i][n]);
  }
}

// The local states of whole segments, last to first, and what they add to dC.
template <int kCount>
void recompute_local(const BackwardTile& tile, int first, int count, int n0) {
  constexpr int S = kBackwardStates;
  Vec e[kCount][S] = {};
  for (int t = count - 1; t >= 0; --t) {
    const float* B = tile.B + t * tile.padded_state + n0;
    const float* C = tile.C + t * tile.padded_state + n0;
    const bool ends = (t + 1) % tile.segment == 0;
    Vec grad_C[S] = {};
    MEDMAMBA_UNROLL for (int i = 0; i < kCount; ++i) {
      const int64_t row = row_at(first + i) + t * kLanes;
      const Vec x = load(tile.x + row), dy = load(tile.dy + row);
      const float* decays = tile.decay + (t * kCount + i) * S * kWidth;
      float* locals = tile.local + (t * kCount + i) * S * kWidth;
      Vec y = Vec{};
      MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) {
        const Vec local = ends ? Vec{} : load(decays + n * kWidth) * e[i][n];
        store(locals + n * kWidth, local);
        e[i][n] = local + x * B[n];
        grad_C[n] += dy * local;
        if (tile.gated) y += C[n] * local;
      }
      if (tile.gated) store(tile.y + row, load(tile.y + row) + y);
    }
    add_lane_sums(grad_C, tile.grad_C + t * tile.padded_state + n0, true);
  }
}

// Adjoint of the local states, first to last: C dy plus what the token before hands on.
template <int kCount>
void walk_local(const BackwardTile& tile, const StateGroup& g, int first, int count, int n0) {
  constexpr int S = kBackwardStates;
  Vec handed[kCount][S] = {}, dA[kCount][S] = {};
  for (int t = 0; t < count; ++t) {
    const float* B = tile.B + t * tile.padded_state + n0;
    const float* C = tile.C + t * tile.padded_state + n0;
    const bool starts = t % tile.segment == 0;
    Vec grad_B[S] = {};
    MEDMAMBA_UNROLL for (int i = 0; i < kCount; ++i) {
      const int64_t row = row_at(first + i) + t * kLanes;
      const Vec dt = load(tile.dt + row), x = load(tile.x + row), dy = load(tile.dy + row);
      const float* decays = tile.decay + (t * kCount + i) * S * kWidth;
      const float* locals = tile.local + (t * kCount + i) * S * kWidth;
      const float* A = g.rates + state_at(g, first + i);
      Vec by_input = load(tile.by_input + row), by_rate = load(tile.by_rate + row);
      MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) {
        const Vec input = starts ? Vec{} : handed[i][n];
        const Vec adjoint = C[n] * dy + input;
        const Vec q = adjoint * load(locals + n * kWidth);
        handed[i][n] = adjoint * load(decays + n * kWidth);
        by_input += B[n] * input;
        by_rate += load(A + n * kLanes) * q;
        dA[i][n] += dt * q;
        grad_B[n] += x * input;
      }
      store(tile.by_input + row, by_input);
      store(tile.by_rate + row, by_rate);
    }
    add_lane_sums(grad_B, tile.grad_B + t * tile.padded_state + n0, g.accumulate);
  }
  MEDMAMBA_UNROLL for (int i = 0; i < kCount; ++i) {
    MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) {
      float* to = g.grad_A + state_at(g, first + i) + n * kLanes;
      store(to, load(to) + dA[i][n]);
    }
  }
}

template <int kCount>
void walk_back(const BackwardTile& tile, const StateGroup& g, int first, int from, int to, int n0) {
  constexpr int S = kBackwardStates;
  Vec r[kCount][S], dA[kCount][S];
  MEDMAMBA_UNROLL for (int i = 0; i < kCount; ++i) {
    MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) {
      r[i][n] = load(g.adjoint + state_at(g, first + i) + n * kLanes);
      dA[i][n] = load(g.grad_A + state_at(g, first + i) + n * kLanes);
    }
  }
  for (int t = to - 1; t >= from; --t) {
    const float* B = tile.B + t * tile.padded_state + n0;
    const float* C = tile.C + t * tile.padded_state + n0;
    Vec grad_B[S] = {};
    MEDMAMBA_UNROLL for (int i = 0; i < kCount; ++i) {
      const int64_t row = row_at(first + i) + t * kLanes;
      const Vec dt = load(tile.dt + row), x = load(tile.x + row), dy = load(tile.dy + row);
      const float* decays = tile.decay + (t * kCount + i) * S * kWidth;
      const float* carried = tile.carried + (t * kCount + i) * S * kWidth;
      const float* A = g.rates + state_at(g, first + i);
      Vec by_input = load(tile.by_input + row), by_rate = load(tile.by_rate + row);
      MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) {
        const Vec adjoint = C[n] * dy + r[i][n];
        const Vec q = adjoint * load(carried + n * kWidth);
        r[i][n] = adjoint * load(decays + n * kWidth);
        by_input += B[n] * adjoint;
        by_rate += load(A + n * kLanes) * q;
        dA[i][n] += dt * q;
        grad_B[n] += x * adjoint;
      }
      store(tile.by_input + row, by_input);
      store(tile.by_rate + row, by_rate);
    }
    add_lane_sums(grad_B, tile.grad_B + t * tile.padded_state + n0,
                  g.accumulate || tile.segment > 0);
  }
  MEDMAMBA_UNROLL for (int i = 0; i < kCount; ++i) {
    MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) {
      store(g.adjoint + state_at(g, first + i) + n * kLanes, r[i][n]);
      store(g.grad_A + state_at(g, first + i) + n * kLanes, dA[i][n]);
    }
  }
}

template <int kCount>
void backward_states(const Problem& p, const BackwardTile& tile, const StateGroup& g, int first,
                     int n0, int64_t first_position, int count, bool ordinary) {
  constexpr int S = kBackwardStates;
  float h[kCount * S * kWidth];
  MEDMAMBA_UNROLL for (int i = 0; i < kCount; ++i) {
    MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) {
      store(h + (i * S + n) * kWidth, load(g.state + state_at(g, first + i) + n * kLanes));
    }
  }
  for (int t = 0; t < count;) {
    const int to = next_reset(p, first_position, t, count);
    if (ordinary) {
      recompute_states<kCount, true>(tile, g, first, t, to, h, n0);
    } else {
      recompute_states<kCount, false>(tile, g, first, t, to, h, n0);
    }
    if (to < count) std::memset(h, 0, sizeof(h));
    t = to;
  }
  if (tile.segment > 0) {
    recompute_local<kCount>(tile, first, count, n0);
    walk_local<kCount>(tile, g, first, count, n0);
  }
  for (int to = count; to > 0;) {
    int from = 0;  // the last reset before `to`
    if (p.reset_every > 0) {
      const int64_t reset = (first_position + to - 1) / p.reset_every * p.reset_every - first_position;
      from = reset > 0 ? int(reset) : 0;
    }
    walk_back<kCount>(tile, g, first, from, to, n0);
    const int64_t position = first_position + from;
    if (p.reset_every > 0 && position > 0 && position % p.reset_every == 0) {
      MEDMAMBA_UNROLL for (int i = 0; i < kCount; ++i) {
        MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) store(g.adjoint + state_at(g, first + i) + n * kLanes, Vec{});
      }
    }
    to = from;
  }
}

void backward_vectors(const Problem& p, const BackwardTile& tile, StateGroup g, int vectors, int n0,
                      int64_t first_position, int count, bool ordinary) {
  constexpr int kMost = kWidth == 16 ? 4 : 2;
  int first = 0;
  for (; first + kMost <= vectors; first += kMost) {
    g.accumulate = first > 0;
    backward_states<kMost>(p, tile, g, first, n0, first_position, count, ordinary);
  }
  for (; first < vectors; ++first) {
    g.accumulate = first > 0;
    backward_states<1>(p, tile, g, first, n0, first_position, count, ordinary);
  }
}

// Everything of one block that does not depend on the states. Returns the largest step size.
float open_backward(const Problem& p, const Item& item, const Block& block, const Tokens& tokens,
                    const BackwardTile& tile, int64_t at, float* rows) {
  load_tile(p.delta, row_offset(p.delta, item.batch, block), tokens, block.lanes, tile.dt + at);
  const float largest = step_sizes(p, block, tokens.count, tile.dt + at);
  load_tile(p.u, row_offset(p.u, item.batch, block), tokens, block.lanes, tile.x + at);
  if (p.grad_out.data != nullptr) {
    const int64_t offset = row_offset(p.grad_out, item.batch, block);
    load_tile(p.grad_out, offset, tokens, block.lanes, tile.dy + at);
  } else {
    std::memset(tile.dy + at, 0, sizeof(float) * kTileFloats);
  }
  if (p.gate.data != nullptr) {
    load_tile(p.gate, row_offset(p.gate, item.batch, block), tokens, block.lanes, rows);
  }
  const Exp2Table table = exp2_table();
  for (int i = 0; i < tokens.count * kLanes; i += kWidth) {
    store(tile.x + at + i, load(tile.x + at + i) * load(tile.dt + at + i));
    store(tile.by_input + at + i, Vec{});
    store(tile.by_rate + at + i, Vec{});
    if (p.gate.data != nullptr) {
      const Vec z = load(rows + i);
      store(tile.dy + at + i, load(tile.dy + at + i) * z * sigmoid(z, table));
      store(tile.y + at + i, Vec{});
    }
  }
  return largest;
}

// d silu(z) y dout, with the rows of z and dout read once more.
void store_gate_gradient(const Problem& p, const Item& item, const Block& block,
                         const Tokens& tokens, const float* y, float* z, float* dout) {
  load_tile(p.gate, row_offset(p.gate, item.batch, block), tokens, block.lanes, z);
  load_tile(p.u, row_offset(p.u, item.batch, block), tokens, block.lanes, dout);
  float skip[kLanes];
  channel_row(p.skip, block, skip);
  const Exp2Table table = exp2_table();
  for (int i = 0; i < tokens.count * kLanes; i += kWidth) {
    const Vec gate = load(z + i), slope = sigmoid(gate, table);
    Vec whole = load(y + i);
    if (p.skip) whole += load(skip + i % kLanes) * load(dout + i);
    store(z + i, whole * slope * (1.0f + gate * (1.0f - slope)));
  }
  if (p.grad_out.data != nullptr) {
    const int64_t offset = row_offset(p.grad_out, item.batch, block);
    load_tile(p.grad_out, offset, tokens, block.lanes, dout);
  } else {
    std::memset(dout, 0, sizeof(float) * kTileFloats);
  }
  for (int i = 0; i < tokens.count * kLanes; i += kWidth) store(z + i, load(z + i) * load(dout + i));
  store_tile(p.grad_gate, row_offset(p.grad_gate, item.batch, block), tokens, block.lanes, z);
}

// Gradients of u and delta and of the per-channel parameters, from the sums over the states.
void close_backward(const Problem& p, const Item& item, const Block& block, const Tokens& tokens,
                    const BackwardTile& tile, int64_t at, const BackwardCarry& carry, int i,
                    float* rows, float* raw) {
  load_tile(p.u, row_offset(p.u, item.batch, block), tokens, block.lanes, rows);
  load_tile(p.delta, row_offset(p.delta, item.batch, block), tokens, block.lanes, raw);
  float skip[kLanes], bias[kLanes];
  channel_row(p.skip, block, skip);
  channel_row(p.delta_bias, block, bias);
  const Exp2Table table = exp2_table();
  for (int v = 0; v < kLanes; v += kWidth) {
    const Vec factor = load(skip + v), add = load(bias + v);
    Vec grad_skip = Vec{}, grad_bias = Vec{};
    for (int t = 0; t < tokens.count; ++t) {
      const int64_t row = at + t * kLanes + v;
      const Vec u = load(rows + t * kLanes + v), dy = load(tile.dy + row);
      const Vec by_input = load(tile.by_input + row);
      Vec grad_dt = by_input * u + load(tile.by_rate + row);
      if (p.softplus) grad_dt *= sigmoid(load(raw + t * kLanes + v) + add, table);
      store(tile.by_input + row, by_input * load(tile.dt + row) + factor * dy);
      store(tile.by_rate + row, grad_dt);
      grad_skip += dy * u;
      grad_bias += grad_dt;
    }
    store(carry.grad_skip + i * kLanes + v, load(carry.grad_skip + i * kLanes + v) + grad_skip);
    store(carry.grad_bias + i * kLanes + v, load(carry.grad_bias + i * kLanes + v) + grad_bias);
  }
  if (p.grad_u.data != nullptr) {
    const int64_t offset = row_offset(p.grad_u, item.batch, block);
    store_tile(p.grad_u, offset, tokens, block.lanes, tile.by_input + at);
  }
  if (p.grad_delta.data != nullptr) {
    const int64_t offset = row_offset(p.grad_delta, item.batch, block);
    store_tile(p.grad_delta, offset, tokens, block.lanes, tile.by_rate + at);
  }
}

int64_t backward_scratch(const Problem& p) {
  const int64_t group = int64_t(kTile) * kMaxBlocks * kLanes * kBackwardStates;
  return (6 * kMaxBlocks + 2) * kTileFloats + 3 * group + 2 * kTile * p.padded_state() +
         kMaxBlocks * p.state_floats();
}

void backward_tile(const Problem& p, const Item& item, int64_t number, int first_row,
                   BackwardCarry& carry, float* scratch) {
  const Tokens tokens = tokens_of(p, number);
  const int64_t group_floats = int64_t(kTile) * kMaxBlocks * kLanes * kBackwardStates;
  BackwardTile tile;
  float* next = scratch;
  float** const all_rows[] = {&tile.dt, &tile.x, &tile.dy, &tile.by_input, &tile.by_rate, &tile.y};
  for (float** rows : all_rows) {
    *rows = next;
    next += kMaxBlocks * kTileFloats;
  }
  float* rows = next;
  float* more_rows = rows + kTileFloats;
  tile.decay = more_rows + kTileFloats;
  tile.carried = tile.decay + group_floats;
  tile.local = tile.carried + group_floats;
  float* B = tile.local + group_floats;
  float* C = B + kTile * p.padded_state();
  float* rates = C + kTile * p.padded_state();
  tile.B = B;
  tile.C = C;
  tile.padded_state = int(p.padded_state());
  tile.grad_B = carry.grad_B + first_row * p.padded_state();
  tile.grad_C = carry.grad_C + first_row * p.padded_state();
  tile.segment = int(p.segment);
  tile.gated = p.gate.data != nullptr && p.grad_gate.data != nullptr;
  const int64_t group = block_at(p, item.block).group;
  load_projection(p.B, item.batch, group, p, tokens, B);
  load_projection(p.C, item.batch, group, p, tokens, C);
  bool ordinary = true;
  for (int i = 0; i < item.blocks; ++i) {
    const Block block = block_at(p, item.block + i);
    float* rate = rates + i * p.state_floats();
    gather_state(p.A, block, p, kLog2E, rate);
    const float largest = open_backward(p, item, block, tokens, tile, i * kTileFloats, rows);
    if (!is_ordinary(largest, largest_rate(p, rate))) ordinary = false;
  }
  const int64_t state_row = (item.batch * p.tiles() + number) * p.blocks() + item.block;
  for (int n = 0; n < tile.padded_state; n += kBackwardStates) {
    StateGroup g;
    g.rates = rates + n * kLanes;
    g.state = p.states + state_row * p.state_floats() + n * kLanes;
    g.adjoint = carry.adjoint + n * kLanes;
    g.grad_A = carry.grad_A + n * kLanes;
    g.block_pitch = p.state_floats();
    backward_vectors(p, tile, g, item.blocks * kVectors, n, first_position(p, number), tokens.count,
                     ordinary);
  }
  for (int i = 0; i < item.blocks; ++i) {
    const Block block = block_at(p, item.block + i);
    const int64_t at = i * kTileFloats;
    // sum_n A q was taken with A log2(e)
    for (int j = 0; j < tokens.count * kLanes; j += kWidth) {
      store(tile.by_rate + at + j, load(tile.by_rate + at + j) * kLn2);
    }
    if (tile.gated) store_gate_gradient(p, item, block, tokens, tile.y + at, rows, more_rows);
    close_backward(p, item, block, tokens, tile, at, carry, i, rows, more_rows);
  }
}

// ------------------------------------------------------------------------------------- for the driver

void gather_block(const Problem& p, int64_t block, const float* from, float* to) {
  gather_state(from, block_at(p, block), p, 1.0f, to);
}

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

const Kernels kernels = {MEDMAMBA_ISA_NAME, forward,      forward_scratch, backward_tile,
                         backward_scratch,  gather_block, add_state,       add_channels,
                         store_projection};

}  // namespace MEDMAMBA_ISA

const Kernels& MEDMAMBA_KERNELS() { return MEDMAMBA_ISA::kernels; }

}  // namespace medmamba
