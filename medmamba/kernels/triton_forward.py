"""Triton kernels of the forward scan, and the pieces that the backward shares with them.

One program is one warp that owns a tile of channels and walks a stretch of tokens; every thread
keeps all states of its channels in registers, as a tuple of one vector per state, so that no sum
over states leaves it.

Shapes: b batch, l length, d channels, g groups, n state, c stretches of a sequence ("chunks").
u, delta, gate, out (b, l, d); A (d, n); B, C (b, l, g, n); states (b, c, n, d), float32.
The stretch of a program is cut into segments; the state is zero before each but the first, which
starts from `states`. Positions count the scan; `_token` turns them into rows of memory.
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
    "chunks",
    "segments_per_chunk",
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
def load_scalars(pointer, N: tl.constexpr):
    """Read the N states of one token of B or C as float32 scalars."""
    values = ()
    for n in tl.static_range(N):
        values = values + (tl.load(pointer + n).to(tl.float32),)
    return values


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
    """Row of memory read and written at a scan position, 64-bit."""
    if REVERSE:
        position = length - 1 - position
    if order is not None:
        row = tl.load(order + position).to(tl.int64)
    else:
        row = position.to(tl.int64)
    return row


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
    gate,
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
    gate_batch,
    gate_row,
    delta_batch,
    delta_row,
    weight_batch,
    weight_row,
    weight_group,
    A_row,
    states_chunk,
    N: tl.constexpr,
    BD: tl.constexpr,
    EVEN: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    DESCEND: tl.constexpr,
    ADJOINT: tl.constexpr,
):
    """Walk each chunk from a zero state; write the state it ends with and the sum of dt.

    Forward: value is u and weight is B. Adjoint: value is the gradient of out, weight is C, and the
    carry is what the gradient of the state becomes one token earlier.
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
    for i in range(last - first):
        position = first + i
        if DESCEND:
            position = last - 1 - i
        row = token(position, order, length, REVERSE)
        x = load(value + row * value_row + d, mask, EVEN)
        dt = step_size(load(delta + row * delta_row + d, mask, EVEN), bias, SOFTPLUS)
        w = load_scalars(weight + row * weight_row, N)
        if ADJOINT:
            if gate is not None:
                z = load(gate + batch * gate_batch + row * gate_row + d, mask, EVEN)
                x = x * z * sigmoid(z)
        else:
            x = x * dt
        moved = ()
        for n in tl.static_range(N):
            if ADJOINT:
                moved = moved + (tl.exp2(dt * A2[n]) * (state[n] + x * w[n]),)
            else:
                moved = moved + (tl.exp2(dt * A2[n]) * state[n] + x * w[n],)
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
    initial_window,
    per_window,
    windows,
    channels,
    states_chunk,
    initial_batch,
    A_row,
    N: tl.constexpr,
    BD: tl.constexpr,
    DESCEND: tl.constexpr,
):
    """Turn the states that chunks end with into those that enter them, in place, window by window.

    `initial` (b, n, d) enters the first chunk visited of window `initial_window`.
    """
    tiles = tl.cdiv(channels, BD)
    program = tl.program_id(0)
    tile = program % tiles
    n = (program // tiles) % N
    window = (program // (tiles * N)) % windows
    batch = (program // (tiles * N * windows)).to(tl.int64)
    d = tile * BD + tl.arange(0, BD)
    mask = d < channels
    A2 = tl.load(A + d * A_row + n, mask=mask, other=0.0) * LOG2E
    carry = tl.zeros([BD], tl.float32)
    if initial is not None:
        seeded = d < tl.where(window == initial_window, channels, 0)
        carry = tl.load(initial + batch * initial_batch + n * channels + d, mask=seeded, other=0.0)
    base = (batch * windows + window) * per_window
    for j in range(0, per_window, PREFETCH):
        local = ()
        decay = ()
        for k in tl.static_range(PREFETCH):
            c = j + k
            if DESCEND:
                c = per_window - 1 - j - k
            alive = d < tl.where(j + k < per_window, channels, 0)
            at = base + c
            local = local + (
                tl.load(states + at * states_chunk + n * channels + d, mask=alive, other=0.0),
            )
            total = tl.load(delta_sum + at * channels + d, mask=alive, other=0.0)
            decay = decay + (tl.exp2(A2 * total),)
        for k in tl.static_range(PREFETCH):
            c = j + k
            if DESCEND:
                c = per_window - 1 - j - k
            alive = d < tl.where(j + k < per_window, channels, 0)
            tl.store(states + (base + c) * states_chunk + n * channels + d, carry, mask=alive)
            carry = decay[k] * carry + local[k]


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
            position = begin + i
            if DESCEND:
                position = stop - 1 - i
            row = token(position, order, length, REVERSE)
            x = load(u + row * u_row + d, mask, EVEN)
            dt = step_size(load(delta + row * delta_row + d, mask, EVEN), bias, SOFTPLUS)
            if gate is not None:
                z = load(gate + batch * gate_batch + row * gate_row + d, mask, EVEN)
            b = load_scalars(B + row * B_row, N)
            c = load_scalars(C + row * C_row, N)
            driven = dt * x
            y = tl.zeros([BD], tl.float32)
            if partial is not None:
                y = load(partial + (batch * length + row) * channels + d, mask, EVEN)
            if skip is not None:
                y += skip_row * x
            moved = ()
            for n in tl.static_range(N):
                kept = tl.exp2(dt * A2[n]) * state[n]
                h = kept + driven * b[n]
                if EXCLUSIVE:
                    y += c[n] * kept
                else:
                    y += c[n] * h
                moved = moved + (h,)
            state = moved
            if gate is not None:
                y = y * z * sigmoid(z)
            store(out + row * channels + d, y, mask, EVEN)
    if last_state is not None:
        if chunk == chunks - 1:
            for n in tl.static_range(N):
                store(last_state + batch * last_batch + n * channels + d, state[n], mask, EVEN)
