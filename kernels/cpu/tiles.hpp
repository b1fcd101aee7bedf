// What forward and backward have in common: where a block and a tile lie, what is read for them, step sizes, decays.
#pragma once

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

}  // namespace
}  // namespace MEDMAMBA_ISA
}  // namespace medmamba
