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
  for (int t = tokens.count; t < kTile; ++t) tokens.token[t] = 0;  // may be asked for ahead
  return tokens;
}

// First position after t at which the state is zeroed, at most count.
int next_reset(const Problem& p, int64_t first, int t, int count) {
  if (p.reset_every <= 0) return count;
  const int64_t period = (first + t + p.reset_offset) / p.reset_every + 1;
  const int64_t position = period * p.reset_every - p.reset_offset - first;
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

void scatter_state(const float* from, const Block& block, const Problem& p, int first, int last, float* to) {
  for (int64_t n = first; n < last && n < p.state; ++n) {
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

// delta -> step sizes in place, x = dt u, and the slope of softplus where it is wanted; returns the largest step.
// A NaN does not count: exp2 hands it on.
float step_sizes(const Problem& p, const Block& block, int count, float* dt, const float* u, float* x,
                 float* slope) {
  float bias[kLanes];
  channel_row(p.delta_bias, block, bias);
  const Exp2Table table = exp2_table();
  Vec largest = Vec{};
  for (int at = 0; at < count * kLanes; at += kWidth) {
    Vec value = load(dt + at) + load(bias + at % kLanes);
    if (p.softplus) {
      const Vec e = exp_of_minus_magnitude(value, table);
      if (slope != nullptr) store(slope + at, (value < 0.0f ? e : splat(1.0f)) * reciprocal(e + 1.0f));
      value = softplus_of(value, e);
    }
    store(dt + at, value);
    store(x + at, value * load(u + at));
    const Vec magnitude = as_float(as_int(value) & 0x7fffffff);
    largest = magnitude > largest ? magnitude : largest;
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

// Rows to ask for while a tile is scanned, one token at a time: in one burst they would stop the processor. What is
// absent asks for the same harmless place again and again, which costs less than a branch.
class Prefetch {
 public:
  Prefetch(const Tokens& reads, const Tokens& writes) : tokens_{&reads, &writes} {
    for (auto& kind : rows_) {
      for (Ahead& row : kind) row = {reinterpret_cast<const char*>(&reads), 0};
    }
  }

  void read(const Rows& rows, int64_t offset) { add(0, rows, offset); }
  void write(const Rows& rows, int64_t offset) { add(1, rows, offset); }

  MEDMAMBA_INLINE void ask(const Prefetch& rows, int t) {
    for (int kind = 0; kind < 2; ++kind) {
      const int64_t token = rows.tokens_[kind]->token[t];
      MEDMAMBA_UNROLL for (int i = 0; i < kMost; ++i) {
        const Ahead& row = rows.rows_[kind][i];
        __builtin_prefetch(row.base + token * row.stride, 0, 2);
      }
    }
  }

 private:
  static constexpr int kMost = 4;
  struct Ahead {
    const char* base;
    int64_t stride;
  };

  void add(int kind, const Rows& rows, int64_t offset) {
    if (rows.data == nullptr || rows.channel_stride != 1) return;
    const int64_t size = rows.type == Type::float32 ? 4 : 2;
    rows_[kind][counts_[kind]++] = {static_cast<const char*>(rows.data) + offset * size, rows.token_stride * size};
  }

  const Tokens* tokens_[2];
  Ahead rows_[2][kMost];
  int counts_[2] = {0, 0};
};

// ---------------------------------------------------------------------------------------------- forward

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

// --------------------------------------------------------------------------------------------- backward

// Sums over the states of one half, [token][lane].
struct Sums {
  float *by_input, *by_rate;  // sum_n B g and sum_n A q
  float* y;                   // y without the skip term, where the gate needs it
};

// One block: rows [token][lane], projections [token][padded state].
struct BackwardTile {
  float *dt, *u, *x;   // step size, input, dt u
  float* slope;        // of softplus
  float* dy;           // gradient of y before the gate
  float* gate_slope;   // dout d silu(z)
  Sums sums[2];        // of each half of the states
  float *decay, *carried;  // [token][state of a group]: exp(dt A), and exp(dt A) h_{t-1}
  float* local;            // the same for the local state of a segment
  float *B, *C;
  float *lanes_B, *lanes_C;  // sums over lanes under way of one group of states, [token][kSumFloats]
  int padded_state;
  int segment;
  bool gated;
};

constexpr int S = 4;  // states of a group: their recurrences and dA fill the registers
static_assert(S == kStatePadding, "groups must cover the padded states");

// Sums over the lanes of four states are carried as one vector until all channels are added: the last steps are
// shared.
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

// Four tokens at once: [token][pitch], four states each.
MEDMAMBA_INLINE void end_sums(const float* from, float* to, int64_t pitch) {
  const __m512 c0 = __m512(load(from)), c1 = __m512(load(from + 16));
  const __m512 c2 = __m512(load(from + 32)), c3 = __m512(load(from + 48));
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(c0, c1), _mm512_unpackhi_ps(c0, c1));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(c2, c3), _mm512_unpackhi_ps(c2, c3));
  const __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  const __m512i by_token = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512 rows = _mm512_permutexvar_ps(by_token, sums);
  _mm_storeu_ps(to, _mm512_castps512_ps128(rows));
  _mm_storeu_ps(to + pitch, _mm512_extractf32x4_ps(rows, 1));
  _mm_storeu_ps(to + 2 * pitch, _mm512_extractf32x4_ps(rows, 2));
  _mm_storeu_ps(to + 3 * pitch, _mm512_extractf32x4_ps(rows, 3));
}
#else
constexpr int kSumFloats = 4;

MEDMAMBA_INLINE void begin_sums(const Vec* v, float* to, bool accumulate) {
  Four sums[4];
  for (int n = 0; n < 4; ++n) {
    Four parts[kWidth / 4];
    std::memcpy(parts, &v[n], sizeof(Vec));
    sums[n] = parts[0];
    for (int i = 1; i < kWidth / 4; ++i) sums[n] += parts[i];
  }
  transpose(sums);
  Four total = (sums[0] + sums[1]) + (sums[2] + sums[3]), before;
  std::memcpy(&before, to, sizeof(Four));
  if (accumulate) total += before;
  std::memcpy(to, &total, sizeof(Four));
}

MEDMAMBA_INLINE void end_sums(const float* from, float* to, int64_t pitch) {
  for (int t = 0; t < 4; ++t) std::memcpy(to + t * pitch, from + 4 * t, sizeof(Four));
}
#endif

// A share: [group of states][token][kSumFloats].
constexpr int kGroupShare = kTile * kSumFloats;
int64_t share_floats(const Problem& p) { return p.padded_state() / S * kGroupShare; }

// Four states of one vector of channels: where they lie, all [state][lane].
struct StateGroup {
  const float* rates;
  const float* state;  // that enters the tile
  float* adjoint;
  float* grad_A;
  Sums sums;
  int lane;   // first lane of the vector
  int state0; // first state
  // Where the sums over channels of these states go, and whether to add to what is there.
  float *sums_B, *sums_C;
  bool accumulate;
  bool fresh;  // the first states of their half: nothing to add to in `sums`
};

template <bool kOrdinary, bool kGated, bool kExclusive>
void recompute_states(const BackwardTile& tile, const StateGroup& g, int from, int to, const Prefetch* ahead,
                      Vec* h) {
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
      const Vec seen = kExclusive ? before : h[n];
      grad_C[n] = dy * seen;
      if (kGated) y += C[n] * seen;
    }
    if (kGated) store(g.sums.y + row, g.fresh ? y : load(g.sums.y + row) + y);
    begin_sums(grad_C, g.sums_C + t * kSumFloats, g.accumulate);
    if (ahead != nullptr) Prefetch::ask(*ahead, t);
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
    if (tile.gated) store(g.sums.y + row, load(g.sums.y + row) + y);
    begin_sums(grad_C, g.sums_C + t * kSumFloats, true);
  }
}

// What an adjoint adds to the sums over states of one token.
MEDMAMBA_INLINE void add_token(const StateGroup& g, int row, const float* B, const Vec* A, const Vec* input,
                               const Vec* q, bool fresh) {
  Vec by_input = fresh ? Vec{} : load(g.sums.by_input + row), by_rate = fresh ? Vec{} : load(g.sums.by_rate + row);
  MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) {
    by_input += B[n] * input[n];
    by_rate += A[n] * q[n];
  }
  store(g.sums.by_input + row, by_input);
  store(g.sums.by_rate + row, by_rate);
}

// Adjoint of the local states, first to last: C dy plus what the token before hands on.
void walk_local(const BackwardTile& tile, const StateGroup& g, int count) {
  Vec handed[S] = {}, dA[S] = {}, A[S];
  MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) A[n] = load(g.rates + n * kLanes);
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
    add_token(g, row, B, A, input, q, g.fresh);
    begin_sums(grad_B, g.sums_B + t * kSumFloats, g.accumulate);
  }
  MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) {
    store(g.grad_A + n * kLanes, load(g.grad_A + n * kLanes) + dA[n]);
  }
}

template <bool kExclusive>
void walk_back(const BackwardTile& tile, const StateGroup& g, int from, int to) {
  Vec r[S], dA[S] = {}, A[S];
  MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) {
    r[n] = load(g.adjoint + n * kLanes);
    A[n] = load(g.rates + n * kLanes);
  }
  const bool accumulate = g.accumulate || tile.segment > 0, fresh = g.fresh && tile.segment == 0;
  for (int t = to - 1; t >= from; --t) {
    const float* B = tile.B + t * tile.padded_state + g.state0;
    const float* C = tile.C + t * tile.padded_state + g.state0;
    const int row = t * kLanes + g.lane;
    const Vec dt = load(tile.dt + row), x = load(tile.x + row), dy = load(tile.dy + row);
    Vec input[S], q[S], grad_B[S];
    MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) {
      const Vec adjoint = C[n] * dy + r[n];
      input[n] = kExclusive ? r[n] : adjoint;
      q[n] = adjoint * load(tile.carried + (t * S + n) * kWidth);
      r[n] = adjoint * load(tile.decay + (t * S + n) * kWidth);
      dA[n] += dt * q[n];
      grad_B[n] = x * input[n];
    }
    add_token(g, row, B, A, input, q, fresh);
    begin_sums(grad_B, g.sums_B + t * kSumFloats, accumulate);
  }
  MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) {
    store(g.adjoint + n * kLanes, r[n]);
    store(g.grad_A + n * kLanes, load(g.grad_A + n * kLanes) + dA[n]);
  }
}

template <bool kOrdinary>
void recompute(const BackwardTile& tile, const StateGroup& g, bool exclusive, int from, int to,
               const Prefetch* ahead, Vec* h) {
  if (exclusive) return recompute_states<kOrdinary, true, true>(tile, g, from, to, ahead, h);
  if (tile.gated) return recompute_states<kOrdinary, true, false>(tile, g, from, to, ahead, h);
  return recompute_states<kOrdinary, false, false>(tile, g, from, to, ahead, h);
}

// Both walks of one group of states over the tile that begins at position `first`.
void backward_states(const Problem& p, const BackwardTile& tile, const StateGroup& g, int64_t first,
                     int count, bool ordinary, const Prefetch* ahead) {
  Vec h[S];
  MEDMAMBA_UNROLL for (int n = 0; n < S; ++n) h[n] = load(g.state + n * kLanes);
  for (int t = 0; t < count;) {
    const int to = next_reset(p, first, t, count);
    if (ordinary) {
      recompute<true>(tile, g, p.exclusive, t, to, ahead, h);
    } else {
      recompute<false>(tile, g, p.exclusive, t, to, ahead, h);
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
      const int64_t period = (first + to - 1 + p.reset_offset) / p.reset_every;
      const int64_t reset = period * p.reset_every - p.reset_offset - first;
      from = reset > 0 ? int(reset) : 0;
    }
    if (p.exclusive) {
      walk_back<true>(tile, g, from, to);
    } else {
      walk_back<false>(tile, g, from, to);
    }
    if (p.resets_before(first + from)) {
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
  load_tile(p.delta, row_offset(p.delta, item.batch, block), tokens, block.lanes, tile.dt);
  load_tile(p.u, row_offset(p.u, item.batch, block), tokens, block.lanes, tile.u);
  const float largest = step_sizes(p, block, tokens.count, tile.dt, tile.u, tile.x, tile.slope);
  load_gradient(p, item, block, tokens, tile.dy);
  if (p.gate.data != nullptr) {
    load_tile(p.gate, row_offset(p.gate, item.batch, block), tokens, block.lanes, tile.gate_slope);
  }
  const bool single = p.half_state() == p.padded_state();  // no states in the second half
  for (int i = 0; i < tokens.count * kLanes; i += kWidth) {
    if (single) {
      for (float* sums : {tile.sums[1].by_input, tile.sums[1].by_rate, tile.sums[1].y}) store(sums + i, Vec{});
    }
    if (p.gate.data != nullptr) {
      const Vec z = load(tile.gate_slope + i), grad = load(tile.dy + i), s = sigmoid(z, table);
      store(tile.gate_slope + i, grad * s * (1.0f + z * (1.0f - s)));
      store(tile.dy + i, grad * z * s);
    }
  }
  return largest;
}

// Gradients of the rows and of the per-channel parameters, from the sums over the states.
void close_backward(const Problem& p, const Item& item, const Block& block, const Tokens& tokens,
                    const BackwardTile& tile, const Sums& other, const BlockCarry& carry) {
  float skip[kLanes];
  channel_row(p.skip, block, skip);
  const Sums& own = tile.sums[0];
  for (int v = 0; v < kLanes; v += kWidth) {
    const Vec factor = load(skip + v);
    Vec grad_skip = load(carry.grad_skip + v), grad_bias = load(carry.grad_bias + v);
    for (int t = 0; t < tokens.count; ++t) {
      const int row = t * kLanes + v;
      const Vec u = load(tile.u + row), dy = load(tile.dy + row);
      const Vec by_input = load(own.by_input + row) + load(other.by_input + row);
      const Vec by_rate = load(own.by_rate + row) + load(other.by_rate + row);
      // sum_n A q was taken with A log2(e)
      Vec grad_dt = by_input * u + by_rate * kLn2;
      if (p.softplus) grad_dt *= load(tile.slope + row);
      store(own.by_input + row, by_input * load(tile.dt + row) + factor * dy);
      store(own.by_rate + row, grad_dt);
      if (tile.gated) {
        const Vec y = load(own.y + row) + load(other.y + row);
        store(own.y + row, (y + factor * u) * load(tile.gate_slope + row));
      }
      grad_skip += dy * u;
      grad_bias += grad_dt;
    }
    store(carry.grad_skip + v, grad_skip);
    store(carry.grad_bias + v, grad_bias);
  }
  const struct { const Rows& rows; const float* from; } results[] = {
      {p.grad_u, own.by_input}, {p.grad_delta, own.by_rate}, {p.grad_gate, own.y}};
  for (const auto& result : results) {
    if (result.rows.data == nullptr) continue;
    store_tile(result.rows, row_offset(result.rows, item.batch, block), tokens, block.lanes, result.from);
  }
}

constexpr int kBackwardRows = 12;

int64_t backward_scratch(const Problem& p) {
  return kBackwardRows * kTileFloats + 3 * kTile * S * kWidth + 2 * kTile * p.padded_state() +
         2 * kTile * kSumFloats;
}

BackwardTile lay_out(const Problem& p, float* scratch) {
  BackwardTile tile;
  float* next = scratch;
  const auto take = [&next](int64_t floats) {
    float* taken = next;
    next += floats;
    return taken;
  };
  float** const rows[kBackwardRows] = {
      &tile.dt,               &tile.u,               &tile.x,         &tile.slope,
      &tile.dy,               &tile.gate_slope,      &tile.sums[0].y, &tile.sums[0].by_input,
      &tile.sums[0].by_rate,  &tile.sums[1].y,       &tile.sums[1].by_input,
      &tile.sums[1].by_rate};
  for (float** row : rows) *row = take(kTileFloats);
  float** const groups[] = {&tile.decay, &tile.carried, &tile.local};
  for (float** group : groups) *group = take(kTile * S * kWidth);
  tile.lanes_B = take(kTile * kSumFloats);
  tile.lanes_C = take(kTile * kSumFloats);
  tile.B = take(kTile * p.padded_state());
  tile.C = take(kTile * p.padded_state());
  tile.padded_state = int(p.padded_state());
  tile.segment = int(p.segment);
  tile.gated = p.gate.data != nullptr && p.grad_gate.data != nullptr;
  return tile;
}

// What is read for the tile before this one, and written for this one.
Prefetch backward_prefetch(const Problem& p, const Item& item, const Block& block, const Tokens& tokens,
                           const Tokens& next) {
  Prefetch ahead(next, tokens);
  for (const Rows* rows : {&p.u, &p.delta, &p.gate, &p.grad_out}) {
    ahead.read(*rows, row_offset(*rows, item.batch, block));
  }
  if (item.half == 1) return ahead;
  for (const Rows* rows : {&p.grad_u, &p.grad_delta, &p.grad_gate}) {
    ahead.write(*rows, row_offset(*rows, item.batch, block));
  }
  return ahead;
}

// Hands the sums of the second half over, or closes the tile with them. `done`: blocks of tiles finished before.
void finish_backward(const Problem& p, const Item& item, const Block& block, const Tokens& tokens,
                     const BackwardTile& tile, const BlockCarry& carry, int64_t done) {
  if (item.half < 0) return close_backward(p, item, block, tokens, tile, tile.sums[1], carry);
  float(*slot)[kTileFloats] = item.exchange->rows[done % kRing];
  if (item.half == 1) {
    await(&item.exchange->consumed, done + 1 - kRing);
    std::memcpy(slot[0], tile.sums[1].by_input, sizeof(float) * kTileFloats);
    std::memcpy(slot[1], tile.sums[1].by_rate, sizeof(float) * kTileFloats);
    std::memcpy(slot[2], tile.sums[1].y, sizeof(float) * kTileFloats);
    return publish(&item.exchange->produced, done + 1);
  }
  await(&item.exchange->produced, done + 1);
  close_backward(p, item, block, tokens, tile, {slot[0], slot[1], slot[2]}, carry);
  publish(&item.exchange->consumed, done + 1);
}

// Adds the lanes of one block to what the blocks before have left.
void add_lanes(const float* lanes, float* share, bool accumulate, int count) {
  for (int at = 0; at < count * kSumFloats; at += 4) {
    Four sum, before;
    std::memcpy(&sum, lanes + at, sizeof(Four));
    std::memcpy(&before, share + at, sizeof(Four));
    if (accumulate) sum = before + sum;
    std::memcpy(share + at, &sum, sizeof(Four));
  }
}

// All groups of states of one block, and its sums over channels after those of the item's blocks before.
void walk_block(const Problem& p, const Item& item, const BackwardTile& tile, int i, int64_t number, int count,
                bool ordinary, const Prefetch& ahead, const BlockCarry& carry, float* share_B, float* share_C) {
  const Prefetch* asked = &ahead;
  const int64_t entering = (item.batch * p.tiles() + number) * p.blocks() + item.block + i;
  const int half = int(p.half_state());
  const int last = item.half == 0 ? half : tile.padded_state;
  const bool direct = kVectors == 1 && tile.segment == 0;
  for (int n = item.half == 1 ? half : 0; n < last; n += S) {
    float *to_B = share_B + n / S * kGroupShare, *to_C = share_C + n / S * kGroupShare;
    for (int lane = 0; lane < kLanes; lane += kWidth) {
      const int64_t at = n * kLanes + lane;
      const StateGroup g = {carry.rates + at,
                            p.states + entering * p.state_floats() + at,
                            carry.adjoint + at,
                            carry.grad_A + at,
                            tile.sums[n >= half],
                            lane,
                            n,
                            direct ? to_B : tile.lanes_B,
                            direct ? to_C : tile.lanes_C,
                            direct ? i > 0 : lane > 0,
                            n == 0 || n == half};
      backward_states(p, tile, g, first_position(p, number), count, ordinary, asked);
      asked = nullptr;
    }
    if (direct) continue;
    add_lanes(tile.lanes_B, to_B, i > 0, count);
    add_lanes(tile.lanes_C, to_C, i > 0, count);
  }
}

void backward_tile(const Problem& p, const Item& item, int64_t number, int64_t share, bool same_projections,
                   BackwardCarry& carry, float* scratch) {
  const Tokens tokens = tokens_of(p, number);
  const Tokens next = tokens_of(p, number > 0 ? number - 1 : 0);
  const BackwardTile tile = lay_out(p, scratch);
  if (!same_projections) {
    const int64_t group = block_at(p, item.block).group;
    load_projection(p.B, item.batch, group, p, tokens, tile.B);
    load_projection(p.C, item.batch, group, p, tokens, tile.C);
  }
  for (int i = 0; i < item.blocks; ++i) {
    const Block block = block_at(p, item.block + i);
    const BlockCarry& own = carry.blocks[i];
    const bool ordinary = is_ordinary(open_backward(p, item, block, tokens, tile), own.fastest);
    const Prefetch ahead = backward_prefetch(p, item, block, tokens, next);
    walk_block(p, item, tile, i, number, tokens.count, ordinary, ahead, own, carry.grad_B + share,
               carry.grad_C + share);
    finish_backward(p, item, block, tokens, tile, own, (p.tiles() - 1 - number) * item.blocks + i);
  }
}

void begin_backward(const Problem& p, const Item& item, BackwardCarry& carry) {
  const int64_t sequence = item.batch * p.channels * p.state;
  for (int i = 0; i < item.blocks; ++i) {
    const Block block = block_at(p, item.block + i);
    BlockCarry& own = carry.blocks[i];
    gather_state(p.grad_h_last ? p.grad_h_last + sequence : nullptr, block, p, 1.0f, own.adjoint);
    gather_state(p.A, block, p, kLog2E, own.rates);
    own.fastest = largest_rate(p, own.rates);
  }
}

// ------------------------------------------------------------------------------------- for the driver

void add_state(const Problem& p, const Item& item, int64_t number, const float* from, float* to) {
  const Block block = block_at(p, number);
  const int64_t last = item.half == 0 ? p.half_state() : p.state;
  for (int lane = 0; lane < block.lanes; ++lane) {
    for (int64_t n = item.half == 1 ? p.half_state() : 0; n < last && n < p.state; ++n) {
      to[(block.channel + lane) * p.state + n] += from[n * kLanes + lane];
    }
  }
}

void add_channels(const Problem& p, int64_t number, const float* from, float* to) {
  const Block block = block_at(p, number);
  for (int lane = 0; lane < block.lanes; ++lane) to[block.channel + lane] += from[lane];
}

template <class T>
void store_projection_as(const Rows& rows, int64_t offset, int64_t token, const float* from, int count) {
  typename T::Stored* row = static_cast<typename T::Stored*>(rows.data) + offset + token * rows.token_stride;
  if (rows.channel_stride == 1) return narrow_row<T>(from, row, count);
  for (int n = 0; n < count; ++n) row[n * rows.channel_stride] = T::narrow(from[n]);
}

void store_projection(const Problem& p, const Rows& rows, int64_t batch, int64_t group, int64_t tile,
                      const float* share) {
  constexpr int kStates = 16;  // at once
  const Tokens tokens = tokens_of(p, tile);
  const int64_t offset = batch * rows.batch_stride + group * rows.group_stride;
  alignas(64) float sums[kTile * kStates];
  for (int64_t first = 0; first < p.state; first += kStates) {
    const int count = int(p.state - first < kStates ? p.state - first : kStates);
    for (int n = 0; n < count; n += S) {
      const float* from = share + (first + n) / S * kGroupShare;
      for (int t = 0; t < tokens.count; t += 4) end_sums(from + t * kSumFloats, sums + t * kStates + n, kStates);
    }
    const int64_t at = offset + first * rows.channel_stride;
    for (int t = 0; t < tokens.count; ++t) {
      const float* from = sums + t * kStates;
      switch (rows.type) {
        case Type::float32: store_projection_as<Float32>(rows, at, tokens.token[t], from, count); break;
        case Type::bfloat16: store_projection_as<BFloat16>(rows, at, tokens.token[t], from, count); break;
        case Type::float16: store_projection_as<Float16>(rows, at, tokens.token[t], from, count); break;
      }
    }
  }
}

}  // namespace

const Kernels kernels = {MEDMAMBA_ISA_NAME, forward,          forward_scratch,
                         begin_backward,    backward_tile,    backward_scratch,
                         share_floats,      add_state,        add_channels,
                         store_projection};

}  // namespace MEDMAMBA_ISA

const Kernels& MEDMAMBA_KERNELS() { return MEDMAMBA_ISA::kernels; }

}  // namespace medmamba
