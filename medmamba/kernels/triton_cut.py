"""How one scan becomes walks of many programs: states in blocks, sequences in chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from medmamba.kernels.arguments import ScanArguments

# Chunk lengths are a pure function of shapes, so that results do not depend on the device: sized
# for the 132 multiprocessors of an H100 with this many programs (warps) each.
PROGRAMS = 132 * 64
SINGLE_CHUNK_PROGRAMS = 132 * 4  # this many fill the device without cutting the sequence
CHUNK_STEP = 64
MAX_CHUNK = 4096
MAX_TRAINED_CHUNK = 512  # a program of the backward walks at most this many tokens
ANCHOR = 16  # tokens after which the running sums of the backward start anew
STATE_BLOCK = 16  # states one program keeps in registers; more are walked block by block
WIDE_TILE, NARROW_TILE = 64, 32
BACKWARD_REGISTERS = 192  # ten warps on a multiprocessor, and nothing spills
NVIDIA_LANES, AMD_LANES = 32, 64
CAPABILITY = (8, 0)  # least of an NVIDIA device


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Sizes a benchmark may vary; None is chosen from the shape.

    Args:
        tile: channels of one program; a power of two from 32.
        backward_tile: the same for the two passes of the backward.
        chunk: tokens of one program.
        state_block: states of one program, at most 32.
        registers: most registers of one thread in the two passes of the backward.
        anchor: tokens after which the running sums of the backward start anew.
        lanes: threads of a warp.
    """

    tile: int | None = None
    backward_tile: int | None = None
    chunk: int | None = None
    state_block: int = STATE_BLOCK
    registers: int | None = BACKWARD_REGISTERS
    anchor: int = ANCHOR
    lanes: int = NVIDIA_LANES if torch.version.hip is None else AMD_LANES


DEFAULT = Tuning()


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How the positions of a sequence are dealt to programs.

    Windows are what resets make. A short window is a segment, and a program walks several of them;
    a long one is cut into chunks, whose states are then passed along.

    Args:
        window: positions after which nothing is carried over to the next program's window.
        chunk: positions of one program.
        segment: positions after which the state of a program is zeroed.
        per_window: chunks of a window.
        windows: windows of the sequence.
    """

    window: int
    chunk: int
    segment: int
    per_window: int
    windows: int

    @property
    def chunks(self) -> int:
        """Programs along one sequence."""
        return self.windows * self.per_window

    @property
    def segments_per_chunk(self) -> int:
        """Segments of one program."""
        return -(-self.chunk // self.segment)

    @property
    def passes_states(self) -> bool:
        """Whether states travel between programs."""
        return self.per_window > 1


@dataclass(frozen=True, kw_only=True)
class Leg:
    """One walk over the tokens for a block of states; the outputs of all legs add up.

    Args:
        first: first state of the block.
        last: one past its last state.
        descend: walk the positions backwards, as the local half of a bidirectional scan does.
        exclusive: leave a token's own input out of its output.
    """

    first: int
    last: int
    cut: Cut
    descend: bool = False
    exclusive: bool = False

    @property
    def causal(self) -> bool:
        """Whether this leg takes h0 and gives h_last."""
        return not self.descend


def tile_of(arguments: ScanArguments, wanted: int | None) -> int:
    """Channels of one program: two to a thread where the group has that many."""
    if wanted is not None:
        return wanted
    return NARROW_TILE if group_channels(arguments) <= NARROW_TILE else WIDE_TILE


def forward_tile(arguments: ScanArguments, tuning: Tuning) -> int:
    """The same of the walks of the forward, on AMD too, whose wavefronts are twice as wide.

    The backward has no registers for that there. The cut never follows it: results do not depend on
    the device.
    """
    if tuning.tile is None and tuning.lanes == AMD_LANES and group_channels(arguments) > WIDE_TILE:
        return 2 * AMD_LANES
    return tile_of(arguments, tuning.tile)


def group_channels(arguments: ScanArguments) -> int:
    """Channels that share B and C."""
    return arguments.channels // arguments.groups


def tiles_per_group(arguments: ScanArguments, tile: int) -> int:
    """Programs side by side that one group needs."""
    return -(-group_channels(arguments) // tile)


def causal_cut(arguments: ScanArguments, tuning: Tuning, *, trained: bool) -> Cut:
    """The cut of the causal scan; a trained one keeps chunks short enough for exact gradients."""
    return _cut(arguments, arguments.reset_every, tuning, trained=trained)


def states_shape(arguments: ScanArguments, tuning: Tuning = DEFAULT) -> tuple[int, ...]:
    """Shape of what forward saves: (b, chunks, n, d), or (0,) where no state is passed on."""
    if arguments.u.numel() == 0:
        return (0,)
    cut = causal_cut(arguments, tuning, trained=True)
    if not cut.passes_states:
        return (0,)
    return (arguments.batch, cut.chunks, arguments.state, arguments.channels)


def blocks_per_chunk(cut: Cut, anchor: int) -> int:
    """Blocks of a chunk, each with a running sum of its own."""
    return cut.segments_per_chunk * -(-cut.segment // anchor)


def legs_of(arguments: ScanArguments, tuning: Tuning, *, trained: bool) -> tuple[Leg, ...]:
    """All walks of one scan; the last is causal and finishes the output."""
    blocks = [
        (first, min(first + tuning.state_block, arguments.state))
        for first in range(0, arguments.state, tuning.state_block)
    ]
    legs: list[Leg] = []
    if arguments.segment > 1:
        local = _cut(arguments, arguments.segment, tuning, trained=trained)
        legs += [
            Leg(first=first, last=last, cut=local, descend=True, exclusive=True)
            for first, last in blocks
        ]
    causal = causal_cut(arguments, tuning, trained=trained)
    legs += [Leg(first=first, last=last, cut=causal) for first, last in blocks]
    return tuple(legs)


def _cut(arguments: ScanArguments, window: int, tuning: Tuning, *, trained: bool) -> Cut:
    length = arguments.length
    window = min(window or length, length)
    target = tuning.chunk or _chunk(arguments, tuning, trained=trained)
    if window <= target:
        span = window * max(1, min(target, length) // window)
        return Cut(
            window=span, chunk=span, segment=window, per_window=1, windows=-(-length // span)
        )
    return Cut(
        window=window,
        chunk=target,
        segment=target,
        per_window=-(-window // target),
        windows=-(-length // window),
    )


def _chunk(arguments: ScanArguments, tuning: Tuning, *, trained: bool) -> int:
    tiles = arguments.groups * tiles_per_group(arguments, tile_of(arguments, tuning.tile))
    programs = arguments.batch * tiles
    longest = MAX_TRAINED_CHUNK if trained else MAX_CHUNK
    if programs >= SINGLE_CHUNK_PROGRAMS and arguments.length <= longest:
        return longest
    wanted = arguments.length * programs // PROGRAMS
    return min(max(-(-wanted // CHUNK_STEP) * CHUNK_STEP, CHUNK_STEP), longest)


def backward_bytes(arguments: ScanArguments, tuning: Tuning = DEFAULT) -> int:
    """Bytes of the buffers of one backward beside its gradients, as triton_gradients.py has them.

    Two float32 maps (the sum of decays, the gradient before the gate) unless a float32 gradient
    lends its memory, running sums every ``anchor`` tokens, and room for the gradients of B and C
    of every tile of channels.
    """
    legs = legs_of(arguments, tuning, trained=True)
    tile = tile_of(arguments, tuning.backward_tile)
    tiles = arguments.groups * tiles_per_group(arguments, tile)
    rows = arguments.u.numel()
    lends = len(legs) == 1 and arguments.u.dtype is torch.float32
    maps = 0 if lends else 1 if arguments.gate is None else 2
    values = (maps + 3 * (len(legs) > 1)) * rows
    for leg in legs:
        states = leg.last - leg.first
        programs = arguments.batch * leg.cut.chunks * tiles * tile
        values += programs * (states + 1) * (2 + blocks_per_chunk(leg.cut, tuning.anchor))
        values += arguments.batch * leg.cut.chunks * states * arguments.channels
        values += 2 * tiles * arguments.batch * arguments.length * states
    return 4 * values
