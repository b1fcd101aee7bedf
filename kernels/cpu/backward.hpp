// The backward of one tile of an item: what surrounds the walks over the states.
#pragma once

#include "backward_states.hpp"

namespace medmamba {
namespace MEDMAMBA_ISA {
namespace {

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
         2 * kTile * kSumFloats + 2 * share_floats(p);
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
  tile.pair_B = take(share_floats(p));
  tile.pair_C = take(share_floats(p));
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
void add_lanes(const float* lanes, const Target& target, int count) {
  for (int at = 0; at < count * kSumFloats; at += 4) {
    Four sum, before;
    std::memcpy(&sum, lanes + at, sizeof(Four));
    if (target.other != nullptr) {
      std::memcpy(&before, target.other + at, sizeof(Four));
      sum = before + sum;
    }
    if (target.accumulate) {
      std::memcpy(&before, target.to + at, sizeof(Four));
      sum = before + sum;
    }
    std::memcpy(target.to + at, &sum, sizeof(Four));
  }
}

// Where block i of an item leaves its sums over channels: those of the second pair apart until both are there.
Target target_of(float* share, float* pair, int i, int blocks) {
  if (i < 2 || blocks == 3) return {share, nullptr, i > 0};
  return i == 2 ? Target{pair, nullptr, false} : Target{share, pair, true};
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
    const int64_t group = n / S * kGroupShare;
    const Target to_B = target_of(share_B + group, tile.pair_B + group, i, item.blocks);
    const Target to_C = target_of(share_C + group, tile.pair_C + group, i, item.blocks);
    for (int lane = 0; lane < kLanes; lane += kWidth) {
      const int64_t at = n * kLanes + lane;
      const StateGroup g = {carry.rates + at,
                            p.states + entering * p.state_floats() + at,
                            carry.adjoint + at,
                            carry.grad_A + at,
                            tile.sums[n >= half],
                            lane,
                            n,
                            direct ? to_B : Target{tile.lanes_B, nullptr, lane > 0},
                            direct ? to_C : Target{tile.lanes_C, nullptr, lane > 0},
                            n == 0 || n == half};
      backward_states(p, tile, g, first_position(p, number), count, ordinary, asked);
      asked = nullptr;
    }
    if (direct) continue;
    add_lanes(tile.lanes_B, to_B, count);
    add_lanes(tile.lanes_C, to_C, count);
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

}  // namespace
}  // namespace MEDMAMBA_ISA
}  // namespace medmamba
