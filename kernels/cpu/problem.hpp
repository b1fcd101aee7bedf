// One selective scan as raw pointers and sizes: what the binding fills in and every kernel reads.
// Positions run in scan order, tokens in memory order; all offsets are 64-bit and count elements.
#pragma once

#include <cstdint>

namespace medmamba {

enum class Type : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// A (batch, token, channel) view; for B and C the channel is the state and group_stride is used.
struct Rows {
  void* data = nullptr;
  Type type = Type::float32;
  int64_t batch_stride = 0;
  int64_t token_stride = 0;
  int64_t channel_stride = 1;
  int64_t group_stride = 0;
};

constexpr int kTile = 32;        // tokens between two stored states, and of one pass over the rows: what the
                                 // backward keeps of a tile fits the first cache
constexpr int kLanes = 16;       // channels of one block, whatever the width of a register
constexpr int kStatePadding = 4; // states are padded to a multiple of this with zeros

struct Problem {
  int64_t batch, length, channels, groups, state;
  Rows u, delta, gate, B, C;        // gate.data may be null
  const float* A;                   // (channels, state)
  const float* skip;                // (channels) or null
  const float* delta_bias;          // (channels) or null
  const float* h0;                  // (batch, channels, state) or null
  const int32_t* order;             // (length) or null
  bool reverse, softplus;
  int64_t reset_every, segment;
  int64_t reset_offset;  // the state is zeroed before t > 0 where (t + reset_offset) % reset_every == 0
  bool exclusive;        // a token reads the state without its own input

  Rows partial;   // forward: float32 added before the gate; data may be null
  Rows out;       // forward
  float* h_last;  // forward: (batch, channels, state)
  float* states;  // (batch, tiles, blocks, padded state, kLanes), the state entering each tile; may be null

  Rows grad_out;             // backward; data may be null
  const float* grad_h_last;  // (batch, channels, state) or null
  Rows grad_u, grad_delta, grad_gate, grad_B, grad_C;  // data may be null where not wanted
  float* grad_A;             // (channels, state); these four may be null
  float* grad_skip;          // (channels)
  float* grad_delta_bias;    // (channels)
  float* grad_h0;            // (batch, channels, state)

  // Tokens of a tile: whole segments only. A segment is at most kTile long.
  int64_t tile() const { return segment > 0 ? kTile / segment * segment : kTile; }
  int64_t tiles() const { return (length + tile() - 1) / tile(); }
  int64_t channels_per_group() const { return channels / groups; }
  int64_t blocks_per_group() const { return (channels_per_group() + kLanes - 1) / kLanes; }
  int64_t blocks() const { return groups * blocks_per_group(); }
  int64_t padded_state() const {
    return (state + kStatePadding - 1) / kStatePadding * kStatePadding;
  }
  int64_t state_floats() const { return padded_state() * kLanes; }
  // First state of the second half: a multiple of kStatePadding.
  int64_t half_state() const {
    return (padded_state() / kStatePadding + 1) / 2 * kStatePadding;
  }
  bool resets_before(int64_t t) const {
    return reset_every > 0 && t > 0 && (t + reset_offset) % reset_every == 0;
  }
};

// Sums over states are taken as those of the first half plus those of the second, whoever computes them. Sums over
// channels (dB, dC) are taken over two blocks, then over two pairs of them, then over these fours one after the other.
// Up to kMaxBlocks neighbouring blocks of one group of one sequence: what one thread works on. In the backward one,
// or as many as there are.
constexpr int kMaxBlocks = 4;
struct Exchange;
struct Item {
  int64_t batch;
  int64_t block;       // first block
  int blocks;          // how many
  int half;            // 0 or 1: one half of the states, with the other on another thread; -1: both
  Exchange* exchange;  // with the other half
};

// Rows that the second half hands to the first, tile by tile; a ring.
constexpr int kRing = 16;
constexpr int kExchangedRows = 3;
struct Exchange {
  alignas(64) int64_t produced = 0;  // tiles so far
  alignas(64) int64_t consumed = 0;
  alignas(64) float rows[kRing][kExchangedRows][kTile * kLanes];
};

// Waits until another thread has brought the counter to `least`; spins first, then yields.
void await(const int64_t* counter, int64_t least);
static inline void publish(int64_t* counter, int64_t value) { __atomic_store_n(counter, value, __ATOMIC_RELEASE); }

// What the backward of one block carries from tile to tile.
struct BlockCarry {
  float* adjoint;    // (padded state, kLanes)
  float* rates;      // (padded state, kLanes): A log2(e)
  float* grad_A;     // (padded state, kLanes)
  float* grad_skip;  // (kLanes)
  float* grad_bias;  // (kLanes)
  float fastest;     // largest of rates
};

// The same of an item, and its shares of dB and dC, (tiles under way, Kernels::share_floats).
struct BackwardCarry {
  BlockCarry blocks[kMaxBlocks];
  float *grad_B, *grad_C;
};
constexpr int kPanelTiles = 4;  // tiles after which the shares of dB and dC are added up

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  void (*forward)(const Problem&, const Item&, float* scratch);
  int64_t (*forward_scratch)(const Problem&);
  void (*begin_backward)(const Problem&, const Item&, BackwardCarry&);
  // One tile, from the adjoints in carry; `share` counts floats in carry.grad_B. B and C of the tile are still in
  // the scratch where `same_projections`.
  void (*backward_tile)(const Problem&, const Item&, int64_t tile, int64_t share, bool same_projections,
                        BackwardCarry&, float* scratch);
  int64_t (*backward_scratch)(const Problem&);
  // Floats of the share of one tile in dB or dC: sums over channels under way, the first half of the states first.
  int64_t (*share_floats)(const Problem&);
  void (*add_share)(const float* from, int64_t floats, float* to);
  // [state][lane] and [lane] of one block into (channels, state) and (channels).
  void (*add_state)(const Problem&, const Item&, int64_t block, const float* from, float* to);
  void (*add_channels)(const Problem&, int64_t block, const float* from, float* to);
  // The share of one tile and group, all its items', into dB or dC.
  void (*store_projection)(const Problem&, const Rows&, int64_t batch, int64_t group, int64_t tile,
                           const float* share);
};

const Kernels& kernels_base();
#if defined(__x86_64__)
const Kernels& kernels_v3();
const Kernels& kernels_v4();
#endif

}  // namespace medmamba
