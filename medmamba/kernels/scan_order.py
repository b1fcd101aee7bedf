"""Scan orders: in which sequence the tokens of a (D, H, W) or (H, W) grid are visited.

An order is a table from scan position to token index in raster order, read by the kernels: nothing
is permuted or copied. A registry entry gives the list of orders of one mixer, one per direction.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from medmamba.errors import KernelError
from medmamba.kernels.placement import is_fake

Shape = tuple[int, ...]
WINDOW = 8  # voxels; side of a local window
INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, kw_only=True, eq=False)
class ScanOrder:
    """One walk over the tokens.

    Args:
        index: int32 table (length,), token visited at each position; None is raster order.
        reverse: walk from the last position to the first.
        reset_every: the state is zeroed every so many positions; 0 never.

    Raises:
        KernelError: the table visits a token twice, or one that does not exist.
    """

    index: Tensor | None = None
    reverse: bool = False
    reset_every: int = 0

    def __post_init__(self) -> None:
        """Look through the table, once for all scans: kernels trust it."""
        if self.index is not None and not torch.compiler.is_compiling():
            require_permutation(self.index)

    def reversed(self) -> ScanOrder:
        """The same walk backwards."""
        return replace(self, reverse=not self.reverse)

    def to(self, device: torch.device | str) -> ScanOrder:
        """The same walk with its table on another device."""
        return self if self.index is None else replace(self, index=self.index.to(device))

    def tokens(self, length: int) -> Tensor:
        """Token of each position as int64, with the direction applied."""
        index = torch.arange(length) if self.index is None else self.index.long()
        return index.flip(0) if self.reverse else index


def require_permutation(index: Tensor) -> None:
    """Refuse a table that is no permutation; one without values, of an estimate, passes.

    Raises:
        KernelError: names the first position that is wrong.
    """
    if index.dim() != 1 or index.dtype not in INTEGERS:
        raise KernelError(
            f"order has shape {tuple(index.shape)} and type {index.dtype}; "
            "expected a permutation of the tokens as integers"
        )
    if is_fake(index):
        return
    tokens = index.long()
    wrong = (tokens < 0) | (tokens >= len(tokens))
    if not wrong.any():
        seen = torch.zeros_like(wrong)
        seen[tokens] = True
        if seen.all():
            return
        ranked, position = torch.sort(tokens, stable=True)
        wrong[position[1:][ranked[1:] == ranked[:-1]]] = True
    first = int(wrong.nonzero()[0])
    raise KernelError(
        f"order is not a permutation of the tokens: position {first} holds {int(tokens[first])}"
    )


def scan_orders(
    name: str, shape: Shape, device: torch.device | str = "cpu"
) -> tuple[ScanOrder, ...]:
    """The orders of one registered name for a grid, cached.

    Args:
        name: a key of `SCAN_ORDERS`.
        shape: tokens per axis, (H, W) or (D, H, W).
        device: where the tables are wanted.

    Raises:
        KernelError: the name is not registered, or the grid does not suit the order.
    """
    if name not in SCAN_ORDERS:
        raise KernelError(f"scan order {name!r} is unknown; give one of {', '.join(SCAN_ORDERS)}")
    return _cached(name, tuple(int(size) for size in shape), str(device))


@functools.lru_cache(maxsize=64)
def _cached(name: str, shape: Shape, device: str) -> tuple[ScanOrder, ...]:
    # Tables outlive the call, so none may be made of the fake or meta tensors of an estimate.
    with _disable_current_modes(), torch.device("cpu"):
        return tuple(order.to(device) for order in SCAN_ORDERS[name](shape))


def raster(shape: Shape) -> tuple[ScanOrder, ...]:
    """Last axis fastest."""
    del shape
    return (ScanOrder(),)


def reverse(shape: Shape) -> tuple[ScanOrder, ...]:
    """Raster backwards."""
    del shape
    return (ScanOrder(reverse=True),)


def bidirectional(shape: Shape) -> tuple[ScanOrder, ...]:
    """Raster and its reverse (Vim, arXiv 2401.09417)."""
    return raster(shape) + reverse(shape)


def cross(shape: Shape) -> tuple[ScanOrder, ...]:
    """Rasters of every cyclic rotation of the axes, then their reverses (VMamba, arXiv 2401.10166).

    Two axes give 4 directions (rows, columns, and both backwards), three give 6.
    """
    forward = tuple(_axis_raster(shape, rotation) for rotation in range(len(shape)))
    return forward + tuple(order.reversed() for order in forward)


def tri(shape: Shape) -> tuple[ScanOrder, ...]:
    """Forward, reverse and inter-slice, the raster of the (H, W, D) map (SegMamba, 2401.13560)."""
    return (*bidirectional(shape), _axis_raster(shape, 1))


def snake(shape: Shape) -> tuple[ScanOrder, ...]:
    """Raster in which every other row and every other plane runs backwards: all steps are 1 long.

    PlainMamba (arXiv 2403.17695), in any number of axes.
    """
    index = torch.arange(shape[-1])
    stride = shape[-1]
    for size in reversed(shape[:-1]):
        flips = torch.arange(size) % 2 == 1
        blocks = torch.where(flips[:, None], index.flip(0), index)
        index = (blocks + stride * torch.arange(size)[:, None]).reshape(-1)
        stride *= size
    return (_order(index),)


def local_window(shape: Shape, window: int | Shape = WINDOW) -> tuple[ScanOrder, ...]:
    """Cubic windows in raster order, raster inside; windows at the far edges may be partial.

    LocalMamba (arXiv 2403.09338). `local_window_reset` makes each a sequence of its own.

    Args:
        shape: tokens per axis.
        window: side of a window, or one side per axis.
    """
    sides = (window,) * len(shape) if isinstance(window, int) else window
    position = _coordinates(shape)
    key = torch.zeros(math.prod(shape), dtype=torch.int64)
    for axis, size in enumerate(shape):
        key = key * -(-size // sides[axis]) + position[axis] // sides[axis]
    for axis in range(len(shape)):
        key = key * sides[axis] + position[axis] % sides[axis]
    return (_order(torch.argsort(key)),)


def local_window_reset(shape: Shape, window: int = WINDOW) -> tuple[ScanOrder, ...]:
    """Windows as independent sequences, all of one size.

    Per axis a window has the largest side up to `window` that divides the axis, so that every
    grid has its windows: 6 tokens of 12, and all of an axis that is shorter than a window.
    """
    sides = tuple(
        next(side for side in range(min(window, size), 0, -1) if size % side == 0) for size in shape
    )
    return tuple(
        replace(order, reset_every=math.prod(sides)) for order in local_window(shape, sides)
    )


def _axis_raster(shape: Shape, rotation: int) -> ScanOrder:
    """Raster of the map whose axes are rotated left, e.g. (D, H, W) -> (H, W, D) for 1."""
    if rotation == 0:
        return ScanOrder()
    axes = [(axis + rotation) % len(shape) for axis in range(len(shape))]
    return _order(torch.arange(math.prod(shape)).reshape(shape).permute(axes).reshape(-1))


def _coordinates(shape: Shape) -> list[Tensor]:
    axes = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
    return [axis.reshape(-1) for axis in axes]


def _order(index: Tensor) -> ScanOrder:
    return ScanOrder(index=index.to(torch.int32))


SCAN_ORDERS: dict[str, Callable[[Shape], tuple[ScanOrder, ...]]] = {
    "raster": raster,
    "reverse": reverse,
    "bidirectional": bidirectional,
    "cross": cross,
    "tri": tri,
    "snake": snake,
    "local-window": local_window,
    "local-window-reset": local_window_reset,
}
