"""Triton kernels of the forward scan, and the pieces that the backward shares with them.

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

LOG2E = tl.constexpr(1.4426950408889634)
# States a program of state_pass reads before it needs the first: hides the latency of memory.
PREFETCH = tl.constexpr(16)
# Sizes that change from volume to volume: one compiled kernel serves them all.
SIZES = (
    "length",
    "window",
    "chunk_length",
    "segment",
    "per_window",
    "span",
    "spans",
    "chunks",
    "blocks_per_chunk",
    "windows",
    "initial_window",
    "batches",
)


@triton.jit
def log1p_of_unit(e):
    """Compute log(1 + e) for e in [0, 1].

    e times a Chebyshev fit of degree 9; relative error 5e-9 before rounding.
    """
    p = -0.0031760570127516985 * e + 0.019542526453733444
    p = p * e - 0.056373611092567444
    p = p * e + 0.10543623566627502
    p = p * e - 0.1526966691017151
    p = p * e + 0.1966327428817749
    p = p * e - 0.24951615929603577
    p = p * e + 0.33329710364341736
    p = p * e - 0.49999892711639404
    return (p * e + 1.0) * e


@triton.jit
def softplus(x):
    """Compute max(x, 0) + log(1 + exp(-|x|)): exact for every x, without a threshold."""
    return tl.where(x > 0, x, 0.0) + log1p_of_unit(tl.exp2(-tl.abs(x) * LOG2E))


@triton.jit
def sigmoid(x):
    """Compute 1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def load(pointer, mask, EVEN: tl.constexpr):
    """Read a row of channels as float32; channels beyond the group read zero."""
    if EVEN:
        value = tl.load(pointer)
    else:
        value = tl.load(pointer, mask=mask, other=0.0)
    return value.to(tl.float32)


@triton.jit
def store(pointer, value, mask, EVEN: tl.constexpr):
    """Write a row of channels in the type of the pointer."""
    if EVEN:
        tl.store(pointer, value.to(pointer.dtype.element_ty))
    else:
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def fetch(pointer, mask, EVEN: tl.constexpr):
    """Read a row of channels in the type of memory, ahead of its use."""
    if EVEN:
        value = tl.load(pointer)
    else:
        value = tl.load(pointer, mask=mask, other=0.0)
    return value


@triton.jit
def fetch_states(pointer, N: tl.constexpr, LANE_BITS: tl.constexpr):
    """Read the N states of one token of B or C, one to a lane, ahead of their use."""
    lanes = tl.arange(0, 1 << LANE_BITS)
    return tl.load(pointer + lanes, mask=lanes < N, other=0.0)


@triton.jit
def spread(states, n: tl.constexpr, BD: tl.constexpr, LANE_BITS: tl.constexpr):
    """The value of lane n for all channels of the tile."""
    lanes = tl.arange(0, 1 << LANE_BITS)
    value = tl.gather(states, lanes * 0 + n, 0)
    wide = tl.broadcast_to(value[:, None], [1 << LANE_BITS, BD >> LANE_BITS])
    return tl.reshape(wide, [BD])


@triton.jit
def load_states(pointer, channels, mask, N: tl.constexpr, EVEN: tl.constexpr):
    """Read N rows of channels, one tensor each."""
    values = ()
    for n in tl.static_range(N):
        values = values + (load(pointer + n * channels, mask, EVEN),)
    return values


@triton.jit
def load_decays(A, mask, N: tl.constexpr, EVEN: tl.constexpr):
    """Read A (d, n) times log2(e), so that a decay is one exp2 of one product."""
    values = ()
    for n in tl.static_range(N):
        values = values + (load(A + n, mask, EVEN) * LOG2E,)
    return values


@triton.jit
def place(
    group_channels,
    tiles_per_group,
    groups,
    chunks,
    BD: tl.constexpr,
):
    """Batch, chunk, group and channels of a program; the tiles of one chunk are neighbours."""
    program = tl.program_id(0)
    tiles = tiles_per_group * groups
    rest = program // tiles
    tile = program % tiles
    batch = (rest // chunks).to(tl.int64)
    chunk = rest % chunks
    group = tile // tiles_per_group
    lane = (tile % tiles_per_group) * BD + tl.arange(0, BD)
    return batch, chunk, group, tile % tiles_per_group, group * group_channels + lane, lane


@triton.jit
def stretch(chunk, length, window, chunk_length, per_window):
    """First and last position of a chunk: chunks never cross the windows that resets make."""
    start = (chunk // per_window) * window
    first = start + (chunk % per_window) * chunk_length
    last = tl.minimum(tl.minimum(first + chunk_length, start + window), length)
    return first, last


@triton.jit
def token(position, order, length, REVERSE: tl.constexpr):
    """Row of memory within its sequence read and written at a scan position, 32-bit."""
    if REVERSE:
        position = length - 1 - position
    if order is not None:
        row = tl.load(order + position)
    else:
        row = position
    return row


@triton.jit
def row_at(step, first, last, order, length, REVERSE: tl.constexpr, DESCEND: tl.constexpr):
    """Row of a step of the walk over a chunk; beyond the last step, the last token's again."""
    final = tl.maximum(last - 1, 0)
    position = tl.minimum(first + step, final)
    if DESCEND:
        position = tl.maximum(last - 1 - step, tl.minimum(first, final))
    return token(position, order, length, REVERSE)


@triton.jit
def step_size(raw, bias, SOFTPLUS: tl.constexpr):
    """Step size of one token from the projected delta."""
    if bias is not None:
        raw += bias
    if SOFTPLUS:
        raw = softplus(raw)
    return raw


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
