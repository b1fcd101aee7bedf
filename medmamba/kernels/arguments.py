"""What one selective scan is asked to do: canonical tensors, options, and the checks at the door.

Shapes: b batch, l length (tokens), d channels, g groups, n state.
u, delta, gate (b, l, d); A (d, n); B, C (b, l, g, n); skip, delta_bias (d,); h0 (b, d, n).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from medmamba.errors import KernelError

ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_ORDER_LENGTH = 2**31 - 1  # an order is a table of int32


@dataclass(frozen=True, kw_only=True)
class ScanArguments:
    """Canonical arguments of one scan; what every backend receives.

    Args:
        order: int32 table (l,): position t reads and writes token ``order[t]``; None is raster.
        reverse: walk the order from its last position to its first.
        reset_every: zero the state before positions r, 2r, ...; 0 never does.
        segment: length of local-bidirectional segments; 0 is a plain causal scan.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    skip: Tensor | None = None
    gate: Tensor | None = None
    delta_bias: Tensor | None = None
    h0: Tensor | None = None
    order: Tensor | None = None
    delta_softplus: bool = False
    reverse: bool = False
    reset_every: int = 0
    segment: int = 0
    out_dtype: torch.dtype = torch.float32

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.u.shape[0]

    @property
    def length(self) -> int:
        """Tokens of one sequence."""
        return self.u.shape[1]

    @property
    def channels(self) -> int:
        """Channels; each has its own decay rates."""
        return self.u.shape[2]

    @property
    def groups(self) -> int:
        """Groups of channels that share B and C."""
        return self.B.shape[2]

    @property
    def state(self) -> int:
        """States of one channel."""
        return self.A.shape[1]

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of state, decay and sums: float32, or float64 for float64 input."""
        return self.A.dtype


class Gradients(NamedTuple):
    """Gradients of one scan; None where none was asked for."""

    u: Tensor | None = None
    delta: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    C: Tensor | None = None
    skip: Tensor | None = None
    gate: Tensor | None = None
    delta_bias: Tensor | None = None
    h0: Tensor | None = None


class Needs(NamedTuple):
    """Which gradients are wanted."""

    u: bool = True
    delta: bool = True
    A: bool = True
    B: bool = True
    C: bool = True
    skip: bool = True
    gate: bool = True
    delta_bias: bool = True
    h0: bool = True


def empty_rows(like: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty (b, l, d) tensor laid out as `like`: rows of channels, or rows of tokens."""
    batch, length, channels = like.shape
    if is_channels_first(like):
        return torch.empty((batch, channels, length), dtype=dtype, device=like.device).mT
    return torch.empty((batch, length, channels), dtype=dtype, device=like.device)


def is_channels_first(rows: Tensor) -> bool:
    """Whether a (b, l, d) view is stored with the tokens innermost."""
    return rows.stride(2) != 1 and rows.stride(1) == 1


def check_tensors(arguments: ScanArguments) -> None:
    """Refuse tensors no backend can take; looks at shapes, strides, types and devices alone.

    Raises:
        KernelError: names the argument, its shape or type, and what was expected.
    """
    u, A = arguments.u, arguments.A
    if u.dim() != 3:
        raise _wrong("u", u, "3 dimensions (batch, length, channels)")
    if A.dim() != 2:
        raise _wrong("A", A, "2 dimensions (channels, state)")
    batch, length, channels = u.shape
    state = A.shape[1]
    rows = (("delta", arguments.delta), ("gate", arguments.gate))
    for name, value in rows:
        _check_shape(name, value, (batch, length, channels))
    _check_shape("A", A, (channels, state))
    if state < 1:
        raise _wrong("A", A, "at least one state")
    projections = (("B", arguments.B), ("C", arguments.C))
    for name, projection in projections:
        _check_projection(name, projection, arguments)
    if arguments.B.shape[2] != arguments.C.shape[2]:
        raise _wrong("C", arguments.C, f"as many groups as B, which has {arguments.B.shape[2]}")
    vectors = (("skip", arguments.skip), ("delta_bias", arguments.delta_bias))
    for name, value in vectors:
        _check_shape(name, value, (channels,))
    _check_shape("h0", arguments.h0, (batch, channels, state))
    for name, value in (("u", u), *rows, *projections):
        if value is not None:
            _check_activation(name, value)
    for name, value in (*rows, ("A", A), *projections, *vectors, ("h0", arguments.h0)):
        if value is None:
            continue
        _check_device(name, value, u)
        if not value.dtype.is_floating_point:
            raise _wrong(name, value, "a real floating-point type")


def check_rows(name: str, value: Tensor, u: Tensor) -> None:
    """Refuse rows that do not lie beside u.

    Raises:
        KernelError: shape, type, strides or device.
    """
    _check_shape(name, value, u.shape)
    _check_activation(name, value)
    _check_device(name, value, u)


def _check_projection(name: str, value: Tensor, arguments: ScanArguments) -> None:
    batch, length, channels = arguments.u.shape
    if value.dim() != 4:
        raise _wrong(name, value, "(batch, length, groups, state) or (batch, length, state)")
    groups = value.shape[2]
    _check_shape(name, value, (batch, length, groups, arguments.A.shape[1]))
    if groups < 1 or channels % groups:
        raise _wrong(name, value, f"a number of groups that divides {channels} channels")


def _check_activation(name: str, value: Tensor) -> None:
    if value.dtype not in ACTIVATION_DTYPES:
        raise _wrong(name, value, "float32, bfloat16, float16 or float64")
    strides = value.stride()
    if strides[-1] == 1 or strides[1] == 1 or value.numel() == 0:
        return
    if value.shape[-1] != 1 and value.shape[1] != 1:
        raise KernelError(
            f"{name} of shape {tuple(value.shape)} has strides {strides}: "
            "neither its last dimension nor its tokens lie next to each other in memory; "
            f"pass {name}.contiguous()"
        )


def _check_device(name: str, value: Tensor, u: Tensor) -> None:
    if value.device != u.device:
        raise KernelError(
            f"{name} is on {value.device} but u is on {u.device}; "
            "move all arguments of the scan to one device"
        )


def check_options(arguments: ScanArguments) -> None:
    """Refuse an order, lengths and a type of output that do not fit the tensors.

    Raises:
        KernelError: names the option, its value, and what was expected.
    """
    length, order = arguments.length, arguments.order
    if arguments.out_dtype not in ACTIVATION_DTYPES:
        raise KernelError(f"out_dtype is {arguments.out_dtype}; give a real floating-point type")
    if order is not None:
        _check_device("order", order, arguments.u)
        if order.dtype != torch.int32 or order.dim() != 1 or order.shape[0] != length:
            raise _wrong("order", order, f"a permutation of {length} tokens as integers")
        if length > MAX_ORDER_LENGTH:
            raise KernelError(f"order has {length} entries; at most {MAX_ORDER_LENGTH} fit")
    reset_every, segment = arguments.reset_every, arguments.segment
    for name, value in (("reset_every", reset_every), ("segment", segment)):
        if not isinstance(value, (int, torch.SymInt)) or value < 0:
            raise KernelError(f"{name} is {value!r}; give 0 (off) or a length")
    if segment and reset_every % segment:
        raise KernelError(
            f"reset_every is {reset_every} and segment is {segment}; "
            "a reset must fall between two segments: make it a multiple of the segment"
        )


def _check_shape(name: str, value: Tensor | None, expected: tuple[int, ...]) -> None:
    if value is not None and value.shape != expected:
        raise _wrong(name, value, f"shape {tuple(expected)}")


def _wrong(name: str, value: Tensor, expected: str) -> KernelError:
    return KernelError(
        f"{name} has shape {tuple(value.shape)} and type {value.dtype}; expected {expected}"
    )
