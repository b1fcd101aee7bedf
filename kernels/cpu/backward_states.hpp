// Both walks of the backward over one group of states of a tile.
#pragma once

#include "channel_sums.hpp"
#include "tiles.hpp"

namespace medmamba {
namespace MEDMAMBA_ISA {
namespace {

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
  float *pair_B, *pair_C;    // of the second two blocks of an item, like a share
  int padded_state;
  int segment;
  bool gated;
};

// Four states of one vector of channels: where they lie, all [state][lane].
struct StateGroup {
  const float* rates;
  const float* state;  // that enters the tile
  float* adjoint;
  float* grad_A;
  Sums sums;
  int lane;   // first lane of the vector
  int state0; // first state
  Target sums_B, sums_C;  // over channels
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
    begin_sums(grad_C, g.sums_C, t);
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
    begin_sums(grad_C, {g.sums_C.to, nullptr, true}, t);
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
    begin_sums(grad_B, g.sums_B, t);
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
  const Target sums_B = {g.sums_B.to, g.sums_B.other, g.sums_B.accumulate || tile.segment > 0};
  const bool fresh = g.fresh && tile.segment == 0;
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
    begin_sums(grad_B, sums_B, t);
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

}  // namespace
}  // namespace MEDMAMBA_ISA
}  // namespace medmamba
