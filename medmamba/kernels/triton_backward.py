"""Triton kernels of the backward scan: two streaming passes that never store the states.

With g_t the gradient of the state h_t, r_t = a_{t+1} g_{t+1} the carry and q_t = g_t a_t h_{t-1},
each state obeys

    q_{t+1} = q_t + x_t B_t r_t - dy_t C_t a_t h_{t-1},        x_t = dt_t u_t

so what seems to need h and g at once, the part of the gradients of dt and A that goes through the
decay, is a running sum of scalars: R_t = sum_n A_n C_tn a_tn h_{t-1,n} from a forward walk
(`forward_pass`) and P_t = sum_n A_n B_tn r_tn from a reverse walk (`reverse_pass`). Both leave the
token's own input out, which would cancel between them, so nothing is lost where decays are strong.
The sum is anchored where a segment ends, at sum_n A_n r_n h_n, which the forward walk knows. Our
own derivation; shapes as in triton_forward.py.
"""

# Triton is a language of its own: tuples grow by addition, ifs on constants stay apart.
# mypy: disable-error-code="untyped-decorator,assignment,no-untyped-def,no-untyped-call"
# ruff: noqa: B007, RUF005, SIM102

import triton  # noqa: TID251  (part of triton's door)
import triton.language as tl  # noqa: TID251

from medmamba.kernels.triton_forward import (
    SIZES,
    load,
    load_decays,
    load_scalars,
    load_states,
    place,
    sigmoid,
    softplus,
    step_size,
    store,
    stretch,
    token,
)

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def fold(value, BD: tl.constexpr, LANE_BITS: tl.constexpr):
    """Sum the channels that one thread holds: (BD,) to (lanes,)."""
    return tl.sum(tl.reshape(value, [1 << LANE_BITS, BD >> LANE_BITS]), axis=1)


@triton.jit
def exchange(low, high, BIT: tl.constexpr, LANE_BITS: tl.constexpr):
    """Add over two lanes that differ in BIT: `low` for the one without it, `high` for the other."""
    lanes = tl.arange(0, 1 << LANE_BITS)
    upper = (lanes & BIT) != 0
    sent = tl.where(upper, low, high)
    return tl.where(upper, high, low) + tl.gather(sent, lanes ^ BIT, 0)


@triton.jit
def store_sums(pointer, pairs, N: tl.constexpr, LEVELS: tl.constexpr, LANE_BITS: tl.constexpr):
    """Finish the sums of N states over the channels of the tile, in a fixed order, and store them.

    A reduce-scatter: every exchange also halves the number of values, so that N + log2(lanes / N)
    shuffles do what N separate sums do in N log2(lanes), and each lane ends with one state. The
    first step, between even and odd states over the top bit of the lane, is made in `pairs`;
    2 ** LEVELS is N rounded up and at least 2.
    """
    lanes = tl.arange(0, 1 << LANE_BITS)
    sums = pairs
    for k in tl.static_range((N + 1) // 2, 1 << (LEVELS - 1)):
        sums = sums + (tl.zeros([1 << LANE_BITS], tl.float32),)
    for level in tl.static_range(1, LEVELS):
        halved = ()
        for k in tl.static_range(1 << (LEVELS - 1 - level)):
            high = sums[k + (1 << (LEVELS - 1 - level))]
            halved = halved + (exchange(sums[k], high, 1 << (LANE_BITS - 1 - level), LANE_BITS),)
        sums = halved
    total = sums[0]
    for level in tl.static_range(LEVELS, LANE_BITS):
        total += tl.gather(total, lanes ^ (1 << (LANE_BITS - 1 - level)), 0)
    pair = (lanes & ((1 << (LANE_BITS - 1)) - 1)) >> (LANE_BITS - LEVELS)
    n = 2 * pair + (lanes >> (LANE_BITS - 1))
    first = (lanes & ((1 << (LANE_BITS - LEVELS)) - 1)) == 0
    tl.store(pointer + n, total, mask=first & (n < N))


@triton.jit(do_not_specialize=SIZES)
def forward_pass(
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
    carries,
    grad_out,
    partial,
    y_out,
    grad_gate,
    decay_sum,
    anchor,
    delta_sum,
    grad_C,
    grad_A,
    grad_skip,
    length,
    window,
    chunk_length,
    segment,
    per_window,
    chunks,
    segments_per_chunk,
    channels,
    group_channels,
    tiles_per_group,
    groups,
    batches,
    u_batch,
    u_row,
    delta_batch,
    delta_row,
    gate_batch,
    gate_row,
    out_batch,
    out_row,
    B_batch,
    B_row,
    B_group,
    C_batch,
    C_row,
    C_group,
    A_row,
    states_chunk,
    carries_chunk,
    N: tl.constexpr,
    BD: tl.constexpr,
    LEVELS: tl.constexpr,
    LANE_BITS: tl.constexpr,
    EVEN: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    DESCEND: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    SEGMENTED: tl.constexpr,
):
    """Recompute h; write R_t, anchors, the gradients of C and the gate, and a part of that of A.

    `decay_sum` (b, l, d) receives R_t; `anchor` and `delta_sum` (b, c, segments, d); `grad_C`
    (tiles, b, l, g, n) and `grad_A` (programs, n, tile) are summed over programs by the host.
    """
    batch, chunk, group, tile, d, lane = place(group_channels, tiles_per_group, groups, chunks, BD)
    mask = lane < group_channels
    first, last = stretch(chunk, length, window, chunk_length, per_window)
    u += batch * u_batch
    delta += batch * delta_batch
    grad_out += batch * out_batch
    B += batch * B_batch + group * B_group
    C += batch * C_batch + group * C_group
    rows = batch * length
    TOP: tl.constexpr = 1 << (LANE_BITS - 1)
    if grad_C is not None:
        grad_C += ((tile * batches + batch) * length * groups + group) * N
    A2 = load_decays(A + d * A_row, mask, N, EVEN)
    bias = None
    if delta_bias is not None:
        bias = load(delta_bias + d, mask, EVEN)
    if skip is not None:
        skip_row = load(skip + d, mask, EVEN)
    index = batch * chunks + chunk
    state = ()
    slope = ()
    for n in tl.static_range(N):
        state = state + (tl.zeros([BD], tl.float32),)
        slope = slope + (tl.zeros([BD], tl.float32),)
    if states is not None:
        state = load_states(states + index * states_chunk + d, channels, mask, N, EVEN)
    sum_skip = tl.zeros([BD], tl.float32)
    segments = 1
    if SEGMENTED:
        segments = tl.cdiv(last - first, segment)
    for s in range(segments):
        nth = s
        if DESCEND:
            nth = segments - 1 - s
        begin = first + nth * segment
        stop = tl.minimum(begin + segment, last)
        entering = ()
        for n in tl.static_range(N):
            entering = entering + (tl.where(s > 0, 0.0, state[n]),)
        state = entering
        elapsed = tl.zeros([BD], tl.float32)
        for i in range(stop - begin):
            position = begin + i
            if DESCEND:
                position = stop - 1 - i
            row = token(position, order, length, REVERSE)
            x = load(u + row * u_row + d, mask, EVEN)
            dt = step_size(load(delta + row * delta_row + d, mask, EVEN), bias, SOFTPLUS)
            dy = load(grad_out + row * out_row + d, mask, EVEN)
            at = (rows + row) * channels + d
            if gate is not None:
                z = load(gate + batch * gate_batch + row * gate_row + d, mask, EVEN)
                y = tl.zeros([BD], tl.float32)
                if partial is not None:
                    y = load(partial + at, mask, EVEN)
                if skip is not None:
                    y += skip_row * x
                opened = sigmoid(z)
                grad_y = dy * z * opened
            else:
                grad_y = dy
            b = load_scalars(B + row * B_row, N)
            c = load_scalars(C + row * C_row, N)
            driven = dt * x
            elapsed += dt
            weighted = elapsed * grad_y
            if grad_skip is not None:
                sum_skip += grad_y * x
            total = tl.zeros([BD], tl.float32)
            moved = ()
            sloped = ()
            pairs = ()
            for n in tl.static_range(N):
                kept = tl.exp2(dt * A2[n]) * state[n]
                h = kept + driven * b[n]
                seen = h
                if EXCLUSIVE:
                    seen = kept
                shown = c[n] * kept
                if gate is not None:
                    y += c[n] * seen
                total += A2[n] * shown
                sloped = sloped + (slope[n] + weighted * shown,)
                moved = moved + (h,)
                if grad_C is not None:
                    share = fold(grad_y * seen, BD, LANE_BITS)
                    if n % 2 == 0:
                        even = share
                    else:
                        pairs = pairs + (exchange(even, share, TOP, LANE_BITS),)
            state = moved
            slope = sloped
            if grad_C is not None:
                if N % 2 == 1:
                    pairs = pairs + (exchange(even, tl.zeros_like(even), TOP, LANE_BITS),)
                store_sums(grad_C + row * groups * N, pairs, N, LEVELS, LANE_BITS)
            store(decay_sum + at, total, mask, EVEN)
            if y_out is not None:
                store(y_out + at, y, mask, EVEN)
            if grad_gate is not None:
                store(grad_gate + at, dy * y * opened * (1.0 + z * (1.0 - opened)), mask, EVEN)
        reached = tl.zeros([BD], tl.float32)
        if carries is not None:
            ends = s == segments - 1
            sloped = ()
            for n in tl.static_range(N):
                r = load(carries + index * carries_chunk + n * channels + d, mask, EVEN)
                met = tl.where(ends, r * state[n], 0.0)
                reached += A2[n] * met
                sloped = sloped + (slope[n] + elapsed * met,)
            slope = sloped
        at_segment = (index * segments_per_chunk + nth) * channels + d
        store(anchor + at_segment, reached, mask, EVEN)
        store(delta_sum + at_segment, elapsed, mask, EVEN)
    own = grad_A + tl.program_id(0).to(tl.int64) * (N * BD) + tl.arange(0, BD)
    for n in tl.static_range(N):
        tl.store(own + n * BD, slope[n])
    if grad_skip is not None:
        store(grad_skip + index * channels + d, sum_skip, mask, EVEN)


@triton.jit(do_not_specialize=SIZES)
def reverse_pass(
    u,
    delta,
    A,
    B,
    C,
    skip,
    gate,
    delta_bias,
    order,
    carries,
    grad_out,
    partial_u,
    partial_delta,
    decay_sum,
    anchor,
    delta_sum,
    grad_u,
    grad_delta,
    grad_B,
    grad_A,
    grad_bias,
    grad_initial,
    length,
    window,
    chunk_length,
    segment,
    per_window,
    chunks,
    segments_per_chunk,
    channels,
    group_channels,
    tiles_per_group,
    groups,
    batches,
    u_batch,
    u_row,
    delta_batch,
    delta_row,
    gate_batch,
    gate_row,
    out_batch,
    out_row,
    B_batch,
    B_row,
    B_group,
    C_batch,
    C_row,
    C_group,
    A_row,
    carries_chunk,
    initial_batch,
    N: tl.constexpr,
    BD: tl.constexpr,
    LEVELS: tl.constexpr,
    LANE_BITS: tl.constexpr,
    EVEN: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    DESCEND: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    SEGMENTED: tl.constexpr,
    FINAL: tl.constexpr,
):
    """Recompute g against the walk of the forward; write all gradients that need it.

    DESCEND is the direction of the forward: this pass walks the other way. `partial_u` and
    `partial_delta` (b, l, d) hold what other scans of the same tokens contributed. Only the FINAL
    one of several goes through the softplus and adds the skip.
    """
    batch, chunk, group, tile, d, lane = place(group_channels, tiles_per_group, groups, chunks, BD)
    mask = lane < group_channels
    first, last = stretch(chunk, length, window, chunk_length, per_window)
    u += batch * u_batch
    delta += batch * delta_batch
    grad_out += batch * out_batch
    B += batch * B_batch + group * B_group
    C += batch * C_batch + group * C_group
    rows = batch * length
    TOP: tl.constexpr = 1 << (LANE_BITS - 1)
    if grad_B is not None:
        grad_B += ((tile * batches + batch) * length * groups + group) * N
    A2 = load_decays(A + d * A_row, mask, N, EVEN)
    index = batch * chunks + chunk
    if delta_bias is not None:
        bias = load(delta_bias + d, mask, EVEN)
    if skip is not None:
        skip_row = load(skip + d, mask, EVEN)
    carry = ()
    slope = ()
    for n in tl.static_range(N):
        carry = carry + (tl.zeros([BD], tl.float32),)
        slope = slope + (tl.zeros([BD], tl.float32),)
    if carries is not None:
        carry = load_states(carries + index * carries_chunk + d, channels, mask, N, EVEN)
    sum_bias = tl.zeros([BD], tl.float32)
    segments = 1
    if SEGMENTED:
        segments = tl.cdiv(last - first, segment)
    for s in range(segments):
        nth = segments - 1 - s
        if DESCEND:
            nth = s
        begin = first + nth * segment
        stop = tl.minimum(begin + segment, last)
        entering = ()
        for n in tl.static_range(N):
            entering = entering + (tl.where(s > 0, 0.0, carry[n]),)
        carry = entering
        at_segment = (index * segments_per_chunk + nth) * channels + d
        running = load(anchor + at_segment, mask, EVEN)
        elapsed = load(delta_sum + at_segment, mask, EVEN)
        for i in range(stop - begin):
            position = stop - 1 - i
            if DESCEND:
                position = begin + i
            row = token(position, order, length, REVERSE)
            at = (rows + row) * channels + d
            x = load(u + row * u_row + d, mask, EVEN)
            raw = load(delta + row * delta_row + d, mask, EVEN)
            if delta_bias is not None:
                raw += bias
            dt = raw
            if SOFTPLUS:
                dt = softplus(raw)
            dy = load(grad_out + row * out_row + d, mask, EVEN)
            if gate is not None:
                z = load(gate + batch * gate_batch + row * gate_row + d, mask, EVEN)
                dy = dy * z * sigmoid(z)
            b = load_scalars(B + row * B_row, N)
            c = load_scalars(C + row * C_row, N)
            seen_sum = load(decay_sum + at, mask, EVEN)
            driven = dt * x
            weighted = elapsed * driven
            pushed = tl.zeros([BD], tl.float32)
            total = tl.zeros([BD], tl.float32)
            moved = ()
            sloped = ()
            pairs = ()
            for n in tl.static_range(N):
                g = carry[n] + dy * c[n]
                felt = g
                if EXCLUSIVE:
                    felt = carry[n]
                fed = b[n] * carry[n]
                pushed += b[n] * felt
                total += A2[n] * fed
                sloped = sloped + (slope[n] - weighted * fed,)
                moved = moved + (tl.exp2(dt * A2[n]) * g,)
                if grad_B is not None:
                    share = fold(driven * felt, BD, LANE_BITS)
                    if n % 2 == 0:
                        even = share
                    else:
                        pairs = pairs + (exchange(even, share, TOP, LANE_BITS),)
            carry = moved
            slope = sloped
            if grad_B is not None:
                if N % 2 == 1:
                    pairs = pairs + (exchange(even, tl.zeros_like(even), TOP, LANE_BITS),)
                store_sums(grad_B + row * groups * N, pairs, N, LEVELS, LANE_BITS)
            running += dy * seen_sum - driven * total
            elapsed -= dt
            du = dt * pushed
            ddt = x * pushed + LN2 * running
            if partial_u is not None:
                du += load(partial_u + at, mask, EVEN)
                ddt += load(partial_delta + at, mask, EVEN)
            if FINAL:
                if skip is not None:
                    du += skip_row * dy
                if SOFTPLUS:
                    ddt *= sigmoid(raw)
                sum_bias += ddt
            store(grad_u + at, du, mask, EVEN)
            store(grad_delta + at, ddt, mask, EVEN)
    own = grad_A + tl.program_id(0).to(tl.int64) * (N * BD) + tl.arange(0, BD)
    for n in tl.static_range(N):
        tl.store(own + n * BD, slope[n])
    if FINAL:
        if delta_bias is not None:
            store(grad_bias + index * channels + d, sum_bias, mask, EVEN)
    if grad_initial is not None:
        starts = chunk == 0
        if DESCEND:
            starts = chunk == chunks - 1
        if starts:
            for n in tl.static_range(N):
                store(grad_initial + batch * initial_batch + n * channels + d, carry[n], mask, EVEN)
