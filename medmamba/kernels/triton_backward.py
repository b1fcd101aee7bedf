"""Triton kernels of the backward scan: two streaming passes that never store the states.

With g_t the gradient of the state h_t, r_t = a_{t+1} g_{t+1} the carry and q_t = g_t a_t h_{t-1},
each state obeys

    q_{t+1} = q_t + x_t B_t r_t - dy_t C_t a_t h_{t-1},        x_t = dt_t u_t

so what seems to need h and g at once, the part of the gradients of dt and A that goes through the
decay, is a running sum of scalars: R_t = sum_n A_n C_tn a_tn h_{t-1,n} from a forward walk
(`forward_pass`) and P_t = sum_n A_n B_tn r_tn from a reverse walk (`reverse_pass`). Both leave the
token's own input out, which would cancel between them, so nothing is lost where decays are strong.
Every ANCHOR tokens the sum starts anew, so that its rounding stays that of few terms: at the last
token t of such a block it is sum_n A_n r_tn a_tn h_{t-1,n} plus the term of its own dy_t, and the
forward walk keeps h_{t-1} there. The gradient of A is the same sum weighted by the dt that passed
since the block began. Our own derivation; shapes as in triton_forward.py.
"""

# Triton is a language of its own: tuples grow by addition, ifs on constants stay apart.
# mypy: disable-error-code="untyped-decorator,assignment,no-untyped-def,no-untyped-call"
# ruff: noqa: B007, RUF005, SIM102

import triton  # noqa: TID251  (part of triton's door)
import triton.language as tl  # noqa: TID251

from medmamba.kernels.triton_parts import (
    SIZES,
    fetch,
    fetch_states,
    load,
    load_decays,
    load_states,
    place,
    row_at,
    sigmoid,
    softplus,
    spread,
    step_size,
    store,
    stretch,
)
from medmamba.kernels.triton_sums import add_state, fold, no_sums, store_sums

LN2 = tl.constexpr(0.6931471805599453)


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
    grad_out,
    partial,
    y_out,
    grad_gate,
    gated,
    decay_sum,
    kept,
    grad_C,
    sums,
    length,
    window,
    chunk_length,
    segment,
    per_window,
    chunks,
    blocks_per_chunk,
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
    ANCHOR: tl.constexpr,
):
    """Recompute h; write R_t, the gradients of C and the gate, and a part of that of A.

    `decay_sum` (b, l, d) receives R_t and `gated` (b, l, d) the gradient before the gate. `kept`
    (programs, blocks, n + 1, tile), in the order of the walk, receives the state before the last
    token of each block, and the dt that passed in it. `grad_C` (tiles, b, l, g, n) and `sums`
    (programs, n + 1, tile), for A and in its last row for the skip, are added up by the host.
    """
    batch, chunk, group, tile, d, lane = place(group_channels, tiles_per_group, groups, chunks, BD)
    mask = lane < group_channels
    first, last = stretch(chunk, length, window, chunk_length, per_window)
    u += batch * u_batch
    delta += batch * delta_batch
    grad_out += batch * out_batch
    if gate is not None:
        gate += batch * gate_batch
    B += batch * B_batch + group * B_group
    C += batch * C_batch + group * C_group
    decay_sum += batch * length * channels
    if partial is not None:
        partial += batch * length * channels
    if gated is not None:
        gated += batch * length * channels
    if y_out is not None:
        y_out += batch * length * channels
    if grad_gate is not None:
        grad_gate += batch * length * channels
    if grad_C is not None:
        grad_C += ((tile * batches + batch) * length * groups + group) * N
    A2 = load_decays(A + d * A_row, mask, N, EVEN)
    bias = None
    if delta_bias is not None:
        bias = load(delta_bias + d, mask, EVEN)
    if skip is not None:
        skip_row = load(skip + d, mask, EVEN)
    # Of wavefronts of 64 lanes the branch takes an instruction an element; H100s take the two
    # loops 0.45 ms of 2.4 longer than the branch.
    WALKS: tl.constexpr = 2 if LANE_BITS > 5 else 1
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
    program = tl.program_id(0).to(tl.int64)
    slot = kept + program * blocks_per_chunk * ((N + 1) * BD) + tl.arange(0, BD)
    step = 0
    ahead = row_at(0, first, last, order, length, REVERSE, DESCEND)
    if order is not None:
        beyond = row_at(1, first, last, order, length, REVERSE, DESCEND)
    wide = ahead.to(tl.int64)
    next_x = fetch(u + wide * u_row + d, mask, EVEN)
    next_raw = fetch(delta + wide * delta_row + d, mask, EVEN)
    next_dy = fetch(grad_out + wide * out_row + d, mask, EVEN)
    next_b = fetch_states(B + wide * B_row, N, LANE_BITS)
    next_c = fetch_states(C + wide * C_row, N, LANE_BITS)
    if gate is not None:
        next_z = fetch(gate + wide * gate_row + d, mask, EVEN)
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
        blocks = tl.cdiv(stop - begin, ANCHOR)
        elapsed = tl.zeros([BD], tl.float32)
        for j in range(WALKS * blocks):
            block = j // WALKS
            if DESCEND:
                block = blocks - 1 - block
            tokens = tl.minimum(ANCHOR, stop - begin - block * ANCHOR)
            if j % WALKS == 0:
                elapsed = tl.zeros([BD], tl.float32)
            if WALKS == 2:  # a block is walked up to its last token, then that token
                tokens -= 1
                if j % 2 == 1:
                    tokens = 1
                    for n in tl.static_range(N):
                        tl.store(slot + n * BD, state[n])
            for i in range(tokens):
                row = ahead.to(tl.int64)
                x = next_x.to(tl.float32)
                raw = next_raw.to(tl.float32)
                dy = next_dy.to(tl.float32)
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
                next_dy = fetch(grad_out + wide * out_row + d, mask, EVEN)
                next_b = fetch_states(B + wide * B_row, N, LANE_BITS)
                next_c = fetch_states(C + wide * C_row, N, LANE_BITS)
                if gate is not None:
                    next_z = fetch(gate + wide * gate_row + d, mask, EVEN)
                at = row * channels + d
                if WALKS == 1:
                    if i == tokens - 1:
                        for n in tl.static_range(N):
                            tl.store(slot + n * BD, state[n])
                dt = step_size(raw, bias, SOFTPLUS)
                if gate is not None:
                    y = tl.zeros([BD], tl.float32)
                    if partial is not None:
                        y = load(partial + at, mask, EVEN)
                    if skip is not None:
                        y += skip_row * x
                    opened = sigmoid(z)
                    grad_y = dy * z * opened
                else:
                    grad_y = dy
                driven = dt * x
                elapsed += dt
                weighted = elapsed * grad_y
                if skip is not None:
                    sum_skip += grad_y * x
                total = tl.zeros([BD], tl.float32)
                moved = ()
                sloped = ()
                pending = no_sums(LEVELS, LANE_BITS)
                for n in tl.static_range(N):
                    decayed = tl.exp2(dt * A2[n]) * state[n]
                    h = decayed + driven * spread(b, n, BD, LANE_BITS)
                    seen = h
                    if EXCLUSIVE:
                        seen = decayed
                    weight = spread(c, n, BD, LANE_BITS)
                    shown = weight * decayed
                    if gate is not None:
                        y += weight * seen
                    total += A2[n] * shown
                    sloped = sloped + (slope[n] + weighted * shown,)
                    moved = moved + (h,)
                    if grad_C is not None:
                        share = fold(grad_y * seen, BD, LANE_BITS)
                        pending, total_of = add_state(pending, share, n, LEVELS, LANE_BITS)
                state = moved
                slope = sloped
                if grad_C is not None:
                    store_sums(grad_C + row * groups * N, pending, total_of, N, LEVELS, LANE_BITS)
                if gated is not None:
                    store(gated + at, grad_y, mask, EVEN)
                store(decay_sum + at, total, mask, EVEN)
                if y_out is not None:
                    store(y_out + at, y, mask, EVEN)
                if grad_gate is not None:
                    grad_z = dy * y * opened * (1.0 + z * (1.0 - opened))
                    store(grad_gate + at, grad_z, mask, EVEN)
            tl.store(slot + N * BD, elapsed)
            slot += (j % WALKS + 1) // WALKS * ((N + 1) * BD)
    own = sums + tl.program_id(0).to(tl.int64) * ((N + 1) * BD) + tl.arange(0, BD)
    for n in tl.static_range(N):
        tl.store(own + n * BD, slope[n])
    tl.store(own + N * BD, sum_skip)


@triton.jit(do_not_specialize=SIZES)
def reverse_pass(
    u,
    delta,
    A,
    B,
    C,
    skip,
    delta_bias,
    order,
    carries,
    grad_out,
    partial_u,
    partial_delta,
    decay_sum,
    kept,
    grad_u,
    grad_delta,
    grad_B,
    sums,
    grad_initial,
    length,
    window,
    chunk_length,
    segment,
    per_window,
    chunks,
    blocks_per_chunk,
    channels,
    group_channels,
    tiles_per_group,
    groups,
    batches,
    u_batch,
    u_row,
    delta_batch,
    delta_row,
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
    ANCHOR: tl.constexpr,
    FINAL: tl.constexpr,
):
    """Recompute g against the walk of the forward; write all gradients that need it.

    `grad_out` is the gradient before the gate. DESCEND is the direction of the forward: this pass
    walks the other way. `partial_u` and `partial_delta` (b, l, d) hold what other scans of the same
    tokens contributed. Only the FINAL one of several goes through the softplus and adds the skip.
    The last row of `sums` is for the bias.
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
    if grad_B is not None:
        grad_B += ((tile * batches + batch) * length * groups + group) * N
    A2 = load_decays(A + d * A_row, mask, N, EVEN)
    index = batch * chunks + chunk
    bias = None
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
    program = tl.program_id(0).to(tl.int64)
    whole = tl.maximum(segments - 1, 0) * tl.cdiv(segment, ANCHOR)
    ragged = tl.cdiv(tl.maximum(last - first - (segments - 1) * segment, 0), ANCHOR)
    if not SEGMENTED:
        whole = 0
        ragged = tl.cdiv(tl.maximum(last - first, 0), ANCHOR)
    slot = kept + program * blocks_per_chunk * ((N + 1) * BD) + tl.arange(0, BD)
    slot += (whole + ragged) * ((N + 1) * BD)
    step = 0
    ahead = row_at(0, first, last, order, length, REVERSE, not DESCEND)
    if order is not None:
        beyond = row_at(1, first, last, order, length, REVERSE, not DESCEND)
    wide = ahead.to(tl.int64)
    next_x = fetch(u + wide * u_row + d, mask, EVEN)
    next_raw = fetch(delta + wide * delta_row + d, mask, EVEN)
    next_dy = fetch(grad_out + wide * out_row + d, mask, EVEN)
    next_b = fetch_states(B + wide * B_row, N, LANE_BITS)
    next_c = fetch_states(C + wide * C_row, N, LANE_BITS)
    next_sum = fetch(decay_sum + (rows + wide) * channels + d, mask, EVEN)
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
        blocks = tl.cdiv(stop - begin, ANCHOR)
        for j in range(blocks):
            block = blocks - 1 - j
            if DESCEND:
                block = j
            tokens = tl.minimum(ANCHOR, stop - begin - block * ANCHOR)
            slot -= (N + 1) * BD
            elapsed = tl.load(slot + N * BD)
            running = tl.zeros([BD], tl.float32)
            dt = step_size(next_raw.to(tl.float32), bias, SOFTPLUS)
            sloped = ()
            for n in tl.static_range(N):
                met = carry[n] * (tl.exp2(dt * A2[n]) * tl.load(slot + n * BD))
                running += A2[n] * met
                sloped = sloped + (slope[n] + elapsed * met,)
            slope = sloped
            for i in range(tokens):
                row = ahead.to(tl.int64)
                x = next_x.to(tl.float32)
                raw = next_raw.to(tl.float32)
                dy = next_dy.to(tl.float32)
                b = next_b.to(tl.float32)
                c = next_c.to(tl.float32)
                seen_sum = next_sum
                if order is not None:
                    ahead = beyond
                    beyond = row_at(step + 2, first, last, order, length, REVERSE, not DESCEND)
                else:
                    ahead = row_at(step + 1, first, last, order, length, REVERSE, not DESCEND)
                step += 1
                wide = ahead.to(tl.int64)
                next_x = fetch(u + wide * u_row + d, mask, EVEN)
                next_raw = fetch(delta + wide * delta_row + d, mask, EVEN)
                next_dy = fetch(grad_out + wide * out_row + d, mask, EVEN)
                next_b = fetch_states(B + wide * B_row, N, LANE_BITS)
                next_c = fetch_states(C + wide * C_row, N, LANE_BITS)
                next_sum = fetch(decay_sum + (rows + wide) * channels + d, mask, EVEN)
                at = (rows + row) * channels + d
                if bias is not None:
                    raw += bias
                dt = raw
                if SOFTPLUS:
                    dt = softplus(raw)
                driven = dt * x
                running += dy * seen_sum
                # B g is B r, summed here, and B C dy, whose sum over states no channel changes.
                pushed = tl.zeros([BD], tl.float32)
                total = tl.zeros([BD], tl.float32)
                fed = ()
                for n in tl.static_range(N):
                    part = spread(b, n, BD, LANE_BITS) * carry[n]
                    pushed += part
                    fed = fed + (part,)
                # What enters from behind the block is in the anchor, without this token's input.
                # The branch also ends the life of `fed` here: assemblers put such sums off to the
                # end of the token and ran out of registers.
                if i > 0:
                    weighted = elapsed * driven
                    sloped = ()
                    for n in tl.static_range(N):
                        total += A2[n] * fed[n]
                        sloped = sloped + (slope[n] - weighted * fed[n],)
                    slope = sloped
                    running -= driven * total
                if not EXCLUSIVE:
                    pushed += dy * tl.sum(b * c)
                moved = ()
                pending = no_sums(LEVELS, LANE_BITS)
                for n in tl.static_range(N):
                    g = carry[n] + dy * spread(c, n, BD, LANE_BITS)
                    felt = g
                    if EXCLUSIVE:
                        felt = carry[n]
                    moved = moved + (tl.exp2(dt * A2[n]) * g,)
                    if grad_B is not None:
                        share = fold(driven * felt, BD, LANE_BITS)
                        pending, total_of = add_state(pending, share, n, LEVELS, LANE_BITS)
                carry = moved
                if grad_B is not None:
                    store_sums(grad_B + row * groups * N, pending, total_of, N, LEVELS, LANE_BITS)
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
    own = sums + tl.program_id(0).to(tl.int64) * ((N + 1) * BD) + tl.arange(0, BD)
    for n in tl.static_range(N):
        tl.store(own + n * BD, slope[n])
    tl.store(own + N * BD, sum_bias)
    if grad_initial is not None:
        starts = chunk == 0
        if DESCEND:
            starts = chunk == chunks - 1
        if starts:
            for n in tl.static_range(N):
                store(grad_initial + batch * initial_batch + n * channels + d, carry[n], mask, EVEN)
