"""The directions of one layer's scan: from an option's name to walks over a map, and their merge.

The walks themselves are ``medmamba.kernels.scan_order``; here are the two names that are more
than a list of walks: "local-bidirectional" (segments scanned both ways in one pass) and
"siamese-flip" (one set of weights, four views).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from medmamba.errors import PlanError
from medmamba.kernels.scan_order import SCAN_ORDERS, WINDOW, ScanOrder, scan_orders

LOCAL = "local-bidirectional"
SIAMESE = "siamese-flip"
ORDERS = (*SCAN_ORDERS, LOCAL, SIAMESE)

SEGMENT = 16
"""Tokens per segment of the local bidirectional scan (LBMamba's value above 256 tokens). Fixed,
so that a checkpoint means the same at every length."""


@dataclass(frozen=True, kw_only=True)
class Direction:
    """One walk of a layer.

    Args:
        order: which token is visited when.
        segment: length of local bidirectional segments; 0 scans forward only.
        flip_channels: present the channels in reverse.
        tables: token at each position, and position of each token, where ``order`` has a table.
    """

    order: ScanOrder
    segment: int = 0
    flip_channels: bool = False
    tables: tuple[Tensor, Tensor] | None = None


def count_directions(order: str, dimension: int) -> int:
    """Return how many sets of scan weights a layer with this order has.

    Raises:
        PlanError: no order has that name, or it does not exist in this dimension.
    """
    if order not in ORDERS:
        raise PlanError(f"scan order {order!r} does not exist. Choose one of: {', '.join(ORDERS)}.")
    if order in (LOCAL, SIAMESE):
        return 1
    return len(scan_orders(order, (WINDOW,) * dimension))


def views(order: str, dimension: int) -> int:
    """Return how many outputs a layer with this order merges."""
    return 4 if order == SIAMESE else count_directions(order, dimension)


def directions(
    order: str, shape: Sequence[int], device: torch.device, *, reverse: bool = False
) -> tuple[Direction, ...]:
    """Return the walks of a layer over a map of ``shape``.

    With ``reverse`` a local bidirectional scan runs backwards, as every second layer's does.
    """
    if order == LOCAL:
        return (Direction(order=ScanOrder(reverse=reverse), segment=SEGMENT),)
    if order == SIAMESE:
        ways = (ScanOrder(), ScanOrder(reverse=True))
        return tuple(
            Direction(order=way, flip_channels=flip) for flip in (False, True) for way in ways
        )
    return tuple(
        Direction(order=way, tables=_tables(way))
        for way in scan_orders(order, tuple(shape), device)
    )


# The compiler takes what this returns as it is, instead of tracing how tables are made and kept.
# This is what torch.compiler.assume_constant_result does, whose call alone imports the compiler:
# a second of every start.
directions._dynamo_marked_constant = True  # type: ignore[attr-defined]


def walk(tokens: Tensor, direction: Direction) -> Tensor:
    """Bring tokens (B, L, C) into the sequence of a direction.

    Independent windows become sequences of their own, (B·windows, window, C).
    """
    order = direction.order
    if direction.tables is not None:
        tokens = tokens[:, direction.tables[0]]
    elif order.reverse:
        tokens = tokens.flip(1)
    if order.reset_every:
        tokens = tokens.reshape(-1, order.reset_every, tokens.shape[2])
    return tokens.flip(2) if direction.flip_channels else tokens


def walk_back(tokens: Tensor, direction: Direction, batch: int) -> Tensor:
    """Undo ``walk``."""
    order = direction.order
    tokens = tokens.flip(2) if direction.flip_channels else tokens
    if order.reset_every:
        tokens = tokens.reshape(batch, -1, tokens.shape[2])
    if direction.tables is not None:
        return tokens[:, direction.tables[1]]
    return tokens.flip(1) if order.reverse else tokens


@functools.lru_cache(maxsize=32)
def _tables(order: ScanOrder) -> tuple[Tensor, Tensor] | None:
    if order.index is None:
        return None
    # Tables outlive the call, so none may be made of the fake tensors of an estimate.
    with _disable_current_modes():
        tokens = order.index.long()
        if order.reverse:
            tokens = tokens.flip(0)
        return tokens, torch.argsort(tokens)


def require_merge(merge: str, known: Sequence[str]) -> str:
    """Return the name of a merge after checking that it exists.

    Raises:
        PlanError: it does not.
    """
    if merge not in known:
        raise PlanError(f"merge {merge!r} does not exist. Choose one of: {', '.join(known)}.")
    return merge
