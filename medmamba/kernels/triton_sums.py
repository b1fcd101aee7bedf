"""Sums over the channels of a tile, in a fixed order, for dB and dC: a reduce-scatter of lanes."""

# Triton is a language of its own: tuples grow by addition, ifs on constants stay apart.
# mypy: disable-error-code="untyped-decorator,assignment,no-untyped-def,no-untyped-call"
# ruff: noqa: B007, RUF005

import triton  # noqa: TID251  (part of triton's door)
import triton.language as tl  # noqa: TID251


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
def no_sums(LEVELS: tl.constexpr, LANE_BITS: tl.constexpr):
    """An empty set of half-made sums, one for each level of their tree."""
    pending = ()
    for level in tl.static_range(LEVELS):
        pending = pending + (tl.zeros([1 << LANE_BITS], tl.float32),)
    return pending


@triton.jit
def add_state(pending, share, n: tl.constexpr, LEVELS: tl.constexpr, LANE_BITS: tl.constexpr):
    """Bring the share of state n into the sums over the channels of the tile, in a fixed order.

    A reduce-scatter: every exchange also halves the number of values, so that N + log2(lanes / N)
    shuffles do what N separate sums do in N log2(lanes), and each lane ends with one state. Values
    meet as soon as both are there, which keeps few of them alive; the last state's is the result.
    """
    value = share
    for level in tl.static_range(LEVELS):
        if (n + 1) % (1 << level) == 0:
            if (n >> level) % 2 == 1:
                value = exchange(pending[level], value, 1 << (LANE_BITS - 1 - level), LANE_BITS)
            else:
                replaced = ()
                for k in tl.static_range(LEVELS):
                    if k == level:
                        replaced = replaced + (value,)
                    else:
                        replaced = replaced + (pending[k],)
                pending = replaced
    return pending, value


@triton.jit
def store_sums(
    pointer, pending, total, N: tl.constexpr, LEVELS: tl.constexpr, LANE_BITS: tl.constexpr
):
    """Finish the sums that `add_state` began, and store them; 2 ** LEVELS is N rounded up."""
    lanes = tl.arange(0, 1 << LANE_BITS)
    for n in tl.static_range(N, 1 << LEVELS):
        pending, total = add_state(pending, tl.zeros_like(total), n, LEVELS, LANE_BITS)
    for level in tl.static_range(LEVELS, LANE_BITS):
        total += tl.gather(total, lanes ^ (1 << (LANE_BITS - 1 - level)), 0)
    n = lanes * 0
    for level in tl.static_range(LEVELS):
        n += ((lanes >> (LANE_BITS - 1 - level)) & 1) << level
    first = (lanes & ((1 << (LANE_BITS - LEVELS)) - 1)) == 0
    tl.store(pointer + n, total, mask=first & (n < N))
