"""The scan of a map along one order, with its projections: one direction of an SS2D or SS3D block.

A plain composition keeps the projections of every direction. The streamed form walks the direction
chunk by chunk of its own order, carrying the state, and recomputes each chunk in the backward pass;
it keeps its input, which all directions of a block share, and a state per chunk. Chunks of an order
that is no raster are gathered, which is all that is copied.

Shapes: B batch, L tokens, E inner width, N state size, R rank of the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from medmamba.kernels.linear import compute_dtype
from medmamba.kernels.operator import selective_scan
from medmamba.kernels.placement import is_fake
from medmamba.kernels.scan_order import ScanOrder


class DirectionWeights(NamedTuple):
    """The tensors of one direction.

    Args:
        x_proj: (R + 2N, E): step, B, C.
        dt_proj: (E, R).
        dt_bias: (E,).
        A_log: (E, N).
        D: (E,).
    """

    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor


class _Piece(NamedTuple):
    """Consecutive positions of a walk: their tokens, as rows of x, and how to walk them."""

    tokens: slice | Tensor
    order: ScanOrder


def scan_direction(
    x: Tensor,
    weights: DirectionWeights,
    order: ScanOrder,
    *,
    segment: int = 0,
    chunk: int = 0,
) -> Tensor:
    """Scan a map one way.

    Projections run in the autocast type where autocast is on; A, D and the step bias enter the scan
    as they are stored.

    Args:
        x: (B, L, E).
        weights: of this direction.
        order: the tokens of x by position.
        segment: length of local bidirectional segments; 0 scans forward only.
        chunk: positions of a chunk, rounded up to whole segments and windows; 0 does not stream.

    Returns:
        (B, L, E) with tokens where they were, float32 at least.
    """
    dtype = compute_dtype(x)
    cast = weights._replace(
        x_proj=weights.x_proj.to(dtype),
        dt_proj=weights.dt_proj.to(dtype),
    )
    with torch.autocast(x.device.type, enabled=False):
        if chunk and chunk < x.shape[1] and not torch.compiler.is_compiling():
            pieces = tuple(_pieces(order, x.shape[1], segment, chunk))
            settings = (pieces[:1] if is_fake(x) else pieces, segment)  # one stands for all there
            return _Streamed.apply(settings, x, *cast)  # type: ignore[no-any-return,no-untyped-call]
        return _scan(x, cast, order, segment, None)[0]


def _scan(
    x: Tensor, weights: DirectionWeights, order: ScanOrder, segment: int, h0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output (B, L, E) and last state (B, E, N)."""
    rank, state = weights.dt_proj.shape[1], weights.A_log.shape[1]
    step, B, C = functional.linear(x.to(weights.x_proj.dtype), weights.x_proj).split_with_sizes(
        [rank, state, state], dim=-1
    )
    found: tuple[Tensor, Tensor] = selective_scan(
        x,
        functional.linear(step, weights.dt_proj),
        -torch.exp(weights.A_log),
        B,
        C,
        skip=weights.D,
        delta_bias=weights.dt_bias,
        delta_softplus=True,
        h0=h0,
        return_last_state=True,
        out_dtype=torch.promote_types(x.dtype, torch.float32),
        order=order,
        segment=segment,
    )
    return found


def _pieces(order: ScanOrder, length: int, segment: int, chunk: int) -> Iterator[_Piece]:
    """The walk in chunks that cut neither a segment nor a window."""
    unit = math.lcm(segment or 1, order.reset_every or 1)
    chunk = -(-chunk // unit) * unit
    for first in range(0, length, chunk):
        last = min(first + chunk, length)
        rows = slice(length - last, length - first) if order.reverse else slice(first, last)
        tokens = rows if order.index is None else order.index[rows].long()
        yield _Piece(tokens, ScanOrder(reverse=order.reverse, reset_every=order.reset_every))


class _Streamed(torch.autograd.Function):
    """The walk in chunks; saves the input and the state that enters every chunk."""

    @staticmethod
    def forward(
        ctx: Any, settings: tuple[tuple[_Piece, ...], int], x: Tensor, *tensors: Tensor
    ) -> Tensor:
        pieces, segment = settings
        weights = DirectionWeights(*tensors)
        wide = torch.promote_types(x.dtype, torch.float32)
        out = x.new_empty(x.shape, dtype=wide)
        states = x.new_zeros((len(pieces), x.shape[0], *weights.A_log.shape), dtype=wide)
        for number, (tokens, order) in enumerate(pieces):
            y, last = _scan(x[:, tokens], weights, order, segment, states[number])
            out[:, tokens] = y
            if number + 1 < len(pieces) and not order.reset_every:
                states[number + 1] = last
        ctx.settings = settings
        ctx.save_for_backward(x, states, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, states, *tensors = ctx.saved_tensors
        pieces, segment = ctx.settings
        grad_x = torch.empty_like(x)
        grad_state = torch.zeros_like(states[0])
        totals = [torch.zeros_like(tensor, dtype=states.dtype) for tensor in tensors]
        for number in reversed(range(len(pieces))):
            tokens, order = pieces[number]
            leaves = (x[:, tokens], states[number], *tensors)
            found = _piece_gradients(leaves, grad[:, tokens], grad_state, order, segment)
            grad_x[:, tokens] = found[0]
            if not order.reset_every:
                grad_state = found[1]
            for total, share in zip(totals, found[2:], strict=True):
                total += share
        given = [total.to(tensor.dtype) for total, tensor in zip(totals, tensors, strict=True)]
        return (None, grad_x, *given)


def _piece_gradients(
    leaves: Sequence[Tensor], grad: Tensor, grad_state: Tensor, order: ScanOrder, segment: int
) -> tuple[Tensor, ...]:
    """Recompute a piece and differentiate it with respect to its rows, state and weights."""
    with torch.enable_grad():
        x, state, *tensors = (leaf.detach().requires_grad_() for leaf in leaves)
        outputs = _scan(x, DirectionWeights(*tensors), order, segment, state)
        return torch.autograd.grad(
            outputs, (x, state, *tensors), (grad, grad_state), materialize_grads=True
        )
