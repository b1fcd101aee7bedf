"""Several scans of one input, summed: the directions of SS2D and SS3D blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from medmamba.errors import KernelError
from medmamba.kernels.arguments import check_rows
from medmamba.kernels.operator import selective_scan
from medmamba.kernels.scan_order import ScanOrder


def selective_scan_multi(
    u: Tensor,
    deltas: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    C: Sequence[Tensor],
    *,
    orders: Sequence[ScanOrder | Tensor | None],
    skip: Sequence[Tensor | None] | None = None,
    gate: Tensor | None = None,
    delta_bias: Sequence[Tensor | None] | None = None,
    delta_softplus: bool = False,
    segment: int = 0,
) -> Tensor:
    """Sum of one scan per direction over the same channels-last input, then the gate once.

    Args:
        u: (batch, length, channels), shared.
        deltas: one (batch, length, channels) per direction; A, B, C, skip, delta_bias alike.
        A: decay rates per direction.
        B: input projections per direction.
        C: output projections per direction.
        orders: one per direction; no input is permuted or copied.
        skip: (channels,) per direction.
        gate: (batch, length, channels), applied to the sum.
        delta_bias: (channels,) per direction.
        delta_softplus: for every direction.
        segment: for every direction.

    Returns:
        (batch, length, channels) of u's type; the sum itself is float32, in the order given.

    Raises:
        KernelError: the sequences differ in length, or one scan's arguments cannot be used.
    """
    count = len(orders)
    parts: dict[str, Sequence[Tensor | None]] = {"deltas": deltas, "A": A, "B": B, "C": C}
    parts |= {"skip": skip or [None] * count, "delta_bias": delta_bias or [None] * count}
    for name, values in parts.items():
        if len(values) != count or not count:
            raise KernelError(f"{name} has {len(values)} directions but orders has {count}")
    dtype = torch.float64 if u.dtype is torch.float64 else torch.float32
    total: Tensor | None = None
    for direction, order in enumerate(orders):
        part = selective_scan(
            u,
            deltas[direction],
            A[direction],
            B[direction],
            C[direction],
            skip=parts["skip"][direction],
            delta_bias=parts["delta_bias"][direction],
            delta_softplus=delta_softplus,
            order=order,
            segment=segment,
            out_dtype=dtype,
        )
        total = part if total is None else total + part
    assert total is not None
    if gate is not None:
        check_rows("gate", gate, u)
        total = total * functional.silu(gate.to(dtype))
    return total.to(u.dtype)
