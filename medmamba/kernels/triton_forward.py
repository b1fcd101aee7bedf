"""Triton kernels of the forward scan.

One program is one warp that owns a tile of channels and walks a stretch of tokens; every thread
keeps all states of its channels in registers, as a tuple of one vector per state, so that no sum
over states leaves it.

Shapes: b batch, l length, d channels, g groups, n state, c stretches of a sequence ("chunks").
u, delta, gate, out (b, l, d); A (d, n); B, C (b, l, g, n); states (b, c, n, d), float32.
The stretch of a program is cut into segments; the state is zero before each but the first, which
starts from `states`. Positions count the scan; `token` turns them into rows of memory.

What a token needs is read one token ahead, since a program has few warps beside it to hide the
latency of memory; B and C are read one state to a lane and spread over the warp when used.
"""

# Triton is a language of its own: tuples grow by addition, ifs on constants stay apart.
# mypy: disable-error-code="untyped-decorator,assignment,no-untyped-def,no-untyped-call"
# ruff: noqa: B007, RUF005, SIM102

import triton  # noqa: TID251  (part of triton's door)
import triton.language as tl  # noqa: TID251

from medmamba.kernels.triton_parts import (
    LOG2E,
    SIZES,
    fetch,
    fetch_states,
    load,
    load_decays,
    load_states,
    place,
    row_at,
    sigmoid,
    spread,
    step_size,
    store,
    stretch,
)

# States a program of state_pass reads before it needs the first: hides the latency of memory.
PREFETCH = tl.constexpr(16)


@triton.jit(do_not_specialize=SIZES)
def chunk_state(
    value,
    delta,
    A,
    weight,
    delta_bias,
    order,
    states,
    delta_sum,
    length,
    window,
    chunk_length,
    per_window,
    chunks,
    channels,
    group_channels,
    tiles_per_group,
    groups,
    value_batch,
    value_row,
    delta_batch,
    delta_row,
    weight_batch,
    weight_row,
    weight_group,
    A_row,
    states_chunk,
    N: tl.constexpr,
    BD: tl.constexpr,
    LANE_BITS: tl.constexpr,
    EVEN: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    DESCEND: tl.constexpr,
    ADJOINT: tl.constexpr,
):
    """Walk each chunk from a zero state; write the state it ends with and the sum of dt.

    Forward: value is u and weight is B. Adjoint: value is the gradient before the gate, weight is
    C, and the carry is what the gradient of the state becomes one token earlier.
    """
    batch, chunk, group, _, d, lane = place(group_channels, tiles_per_group, groups, chunks, BD)
    mask = lane < group_channels
    first, last = stretch(chunk, length, window, chunk_length, per_window)
    value += batch * value_batch
    delta += batch * delta_batch
    weight += batch * weight_batch + group * weight_group
    A2 = load_decays(A + d * A_row, mask, N, EVEN)
    bias = None
    if delta_bias is not None:
        bias = load(delta_bias + d, mask, EVEN)
    state = ()
    for n in tl.static_range(N):
        state = state + (tl.zeros([BD], tl.float32),)
    total = tl.zeros([BD], tl.float32)
    ahead = row_at(0, first, last, order, length, REVERSE, DESCEND)
    if order is not None:
        beyond = row_at(1, first, last, order, length, REVERSE, DESCEND)
    wide = ahead.to(tl.int64)
    next_x = fetch(value + wide * value_row + d, mask, EVEN)
    next_raw = fetch(delta + wide * delta_row + d, mask, EVEN)
    next_w = fetch_states(weight + wide * weight_row, N, LANE_BITS)
    for i in range(last - first):
        x = next_x.to(tl.float32)
        raw = next_raw.to(tl.float32)
        w = next_w.to(tl.float32)
        if order is not None:
            ahead = beyond
            beyond = row_at(i + 2, first, last, order, length, REVERSE, DESCEND)
        else:
            ahead = row_at(i + 1, first, last, order, length, REVERSE, DESCEND)
        wide = ahead.to(tl.int64)
        next_x = fetch(value + wide * value_row + d, mask, EVEN)
        next_raw = fetch(delta + wide * delta_row + d, mask, EVEN)
        next_w = fetch_states(weight + wide * weight_row, N, LANE_BITS)
        dt = step_size(raw, bias, SOFTPLUS)
        if not ADJOINT:
            x = x * dt
        moved = ()
        for n in tl.static_range(N):
            pushed = x * spread(w, n, BD, LANE_BITS)
            if ADJOINT:
                moved = moved + (tl.exp2(dt * A2[n]) * (state[n] + pushed),)
            else:
                moved = moved + (tl.exp2(dt * A2[n]) * state[n] + pushed,)
        state = moved
        total += dt
    index = batch * chunks + chunk
    store(delta_sum + index * channels + d, total, mask, EVEN)
    for n in tl.static_range(N):
        store(states + index * states_chunk + n * channels + d, state[n], mask, EVEN)


@triton.jit(do_not_specialize=SIZES)
def state_pass(
    states,
    delta_sum,
    A,
    initial,
    ends,
    end_sums,
    initial_window,
    per_window,
    span,
    spans,
    windows,
    channels,
    states_chunk,
    initial_batch,
    A_row,
    N: tl.constexpr,
    BD: tl.constexpr,
    DESCEND: tl.constexpr,
    SEEDED: tl.constexpr,
):
    """Turn the states that chunks end with into those that enter them, in place, span by span.

    A program walks `span` neighbouring chunks of one window for one state. `initial` (b, n, d)
    enters the first chunk visited of window `initial_window`; SEEDED, it is (b, windows, spans, n,
    d) and enters every span. With `ends`, nothing changes but `ends` (b, windows, spans, n, d) and
    `end_sums`, which receive what a span turns a zero state into and its sum of dt.
    """
    tiles = tl.cdiv(channels, BD)
    program = tl.program_id(0)
    tile = program % tiles
    n = (program // tiles) % N
    rest = program // (tiles * N)
    window = (rest // spans) % windows
    batch = (rest // (spans * windows)).to(tl.int64)
    own = (batch * windows + window) * spans + rest % spans
    d = tile * BD + tl.arange(0, BD)
    mask = d < channels
    A2 = tl.load(A + d * A_row + n, mask=mask, other=0.0) * LOG2E
    carry = tl.zeros([BD], tl.float32)
    elapsed = tl.zeros([BD], tl.float32)
    if SEEDED:
        carry = tl.load(initial + (own * N + n) * channels + d, mask=mask, other=0.0)
    elif initial is not None:
        seeded = d < tl.where(window == initial_window, channels, 0)
        carry = tl.load(initial + batch * initial_batch + n * channels + d, mask=seeded, other=0.0)
    start = (rest % spans) * span
    count = tl.minimum(span, per_window - start)
    base = (batch * windows + window) * per_window + start
    for j in range(0, count, PREFETCH):
        local = ()
        decay = ()
        for k in tl.static_range(PREFETCH):
            c = j + k
            if DESCEND:
                c = count - 1 - j - k
            alive = d < tl.where(j + k < count, channels, 0)
            at = base + c
            local = local + (
                tl.load(states + at * states_chunk + n * channels + d, mask=alive, other=0.0),
            )
            total = tl.load(delta_sum + at * channels + d, mask=alive, other=0.0)
            elapsed += total
            decay = decay + (tl.exp2(A2 * total),)
        for k in tl.static_range(PREFETCH):
            c = j + k
            if DESCEND:
                c = count - 1 - j - k
            alive = d < tl.where(j + k < count, channels, 0)
            if ends is None:
                tl.store(states + (base + c) * states_chunk + n * channels + d, carry, mask=alive)
            carry = decay[k] * carry + local[k]
    if ends is not None:
        tl.store(ends + (own * N + n) * channels + d, carry, mask=mask)
        first = d < tl.where(n == 0, channels, 0)
        tl.store(end_sums + own * channels + d, elapsed, mask=first)


@triton.jit(do_not_specialize=SIZES)
def chunk_scan(
    u,
    delta,
    A,
    B,
    C,
    skip,
    gate,
    delta_bias,
    order,
    states,
    partial,
    out,
    last_state,
    length,
    window,
    chunk_length,
    segment,
    per_window,
    chunks,
    channels,
    group_channels,
    tiles_per_group,
    groups,
    u_batch,
    u_row,
    delta_batch,
    delta_row,
    gate_batch,
    gate_row,
    B_batch,
    B_row,
    B_group,
    C_batch,
    C_row,
    C_group,
    A_row,
    states_chunk,
    last_batch,
    N: tl.constexpr,
    BD: tl.constexpr,
    LANE_BITS: tl.constexpr,
    EVEN: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    DESCEND: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    SEGMENTED: tl.constexpr,
):
    """Walk each chunk from its true incoming state and write the output rows.

    `partial` (b, l, d) float32 is a sum already made by another scan of the same tokens. EXCLUSIVE
    leaves a token's own input out of its output.
    """
    batch, chunk, group, _, d, lane = place(group_channels, tiles_per_group, groups, chunks, BD)
    mask = lane < group_channels
    first, last = stretch(chunk, length, window, chunk_length, per_window)
    u += batch * u_batch
    delta += batch * delta_batch
    B += batch * B_batch + group * B_group
    C += batch * C_batch + group * C_group
    out += batch * length * channels
    if partial is not None:
        partial += batch * length * channels
    if gate is not None:
        gate += batch * gate_batch
    A2 = load_decays(A + d * A_row, mask, N, EVEN)
    bias = None
    if delta_bias is not None:
        bias = load(delta_bias + d, mask, EVEN)
    if skip is not None:
        skip_row = load(skip + d, mask, EVEN)
    index = batch * chunks + chunk
    if states is not None:
        state = load_states(states + index * states_chunk + d, channels, mask, N, EVEN)
    else:
        state = ()
        for n in tl.static_range(N):
            state = state + (tl.zeros([BD], tl.float32),)
    segments = 1
    if SEGMENTED:
        segments = tl.cdiv(last - first, segment)
    step = 0
    ahead = row_at(0, first, last, order, length, REVERSE, DESCEND)
    if order is not None:
        beyond = row_at(1, first, last, order, length, REVERSE, DESCEND)
    wide = ahead.to(tl.int64)
    next_x = fetch(u + wide * u_row + d, mask, EVEN)
    next_raw = fetch(delta + wide * delta_row + d, mask, EVEN)
    next_b = fetch_states(B + wide * B_row, N, LANE_BITS)
    next_c = fetch_states(C + wide * C_row, N, LANE_BITS)
    if gate is not None:
        next_z = fetch(gate + wide * gate_row + d, mask, EVEN)
    for s in range(segments):
        begin = first + s * segment
        if DESCEND:
            begin = first + (segments - 1 - s) * segment
        stop = tl.minimum(begin + segment, last)
        entering = ()
        for n in tl.static_range(N):
            entering = entering + (tl.where(s > 0, 0.0, state[n]),)
        state = entering
        for i in range(stop - begin):
            row = ahead.to(tl.int64)
            x = next_x.to(tl.float32)
            raw = next_raw.to(tl.float32)
            b = next_b.to(tl.float32)
            c = next_c.to(tl.float32)
            if gate is not None:
                z = next_z.to(tl.float32)
            if order is not None:
                ahead = beyond
                beyond = row_at(step + 2, first, last, order, length, REVERSE, DESCEND)
            else:
                ahead = row_at(step + 1, first, last, order, length, REVERSE, DESCEND)
            step += 1
            wide = ahead.to(tl.int64)
            next_x = fetch(u + wide * u_row + d, mask, EVEN)
            next_raw = fetch(delta + wide * delta_row + d, mask, EVEN)
            next_b = fetch_states(B + wide * B_row, N, LANE_BITS)
            next_c = fetch_states(C + wide * C_row, N, LANE_BITS)
            if gate is not None:
                next_z = fetch(gate + wide * gate_row + d, mask, EVEN)
            dt = step_size(raw, bias, SOFTPLUS)
            driven = dt * x
            y = tl.zeros([BD], tl.float32)
            if partial is not None:
                y = load(partial + row * channels + d, mask, EVEN)
            if skip is not None:
                y += skip_row * x
            moved = ()
            for n in tl.static_range(N):
                kept = tl.exp2(dt * A2[n]) * state[n]
                h = kept + driven * spread(b, n, BD, LANE_BITS)
                seen = h
                if EXCLUSIVE:
                    seen = kept
                y += spread(c, n, BD, LANE_BITS) * seen
                moved = moved + (h,)
            state = moved
            if gate is not None:
                y = y * z * sigmoid(z)
            store(out + row * channels + d, y, mask, EVEN)
    if last_state is not None:
        if chunk == chunks - 1:
            for n in tl.static_range(N):
                store(last_state + batch * last_batch + n * channels + d, state[n], mask, EVEN)
