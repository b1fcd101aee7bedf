"""Pieces that the Triton kernels of the forward and of the backward are made of.

Where a program works, in which rows of memory, how it reads and writes them, and the functions of a
token that both directions need. Shapes and terms as in triton_forward.py.
"""

# Triton is a language of its own: tuples grow by addition, ifs on constants stay apart.
# mypy: disable-error-code="untyped-decorator,assignment,no-untyped-def,no-untyped-call"
# ruff: noqa: RUF005

import triton  # noqa: TID251  (part of triton's door)
import triton.language as tl  # noqa: TID251

LOG2E = tl.constexpr(1.4426950408889634)
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
def fetch(pointer, mask, EVEN: tl.constexpr):
    """Read a row of channels in the type of memory, ahead of its use."""
    if EVEN:
        value = tl.load(pointer)
    else:
        value = tl.load(pointer, mask=mask, other=0.0)
    return value


@triton.jit
def load(pointer, mask, EVEN: tl.constexpr):
    """Read a row of channels as float32; channels beyond the group read zero."""
    return fetch(pointer, mask, EVEN).to(tl.float32)


@triton.jit
def store(pointer, value, mask, EVEN: tl.constexpr):
    """Write a row of channels in the type of the pointer."""
    if EVEN:
        tl.store(pointer, value.to(pointer.dtype.element_ty))
    else:
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


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
