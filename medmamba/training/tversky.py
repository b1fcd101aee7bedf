"""Tversky scores of whole patches and of the cells of a grid.

Legend: B batch, K classes. Probabilities and targets are (B, K, *spatial).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

BatchTotal = Callable[[Tensor], Tensor]
"""Adds up sums of this process's samples over all processes that share the batch."""

SMOOTH = 1e-5
REGION_BASE, REGION_SLOPE = 0.3, 0.4
"""a and b of the adaptive weights a + b * share of the error (MambaClinix)."""

_POOL: dict[int, Callable[[Tensor, tuple[int, ...]], Tensor]] = {
    2: functional.adaptive_avg_pool2d,  # type: ignore[dict-item]
    3: functional.adaptive_avg_pool3d,  # type: ignore[dict-item]
}


def confusion(
    probabilities: Tensor, target: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return soft true positives, false positives and false negatives per voxel."""
    truth = target.to(probabilities.dtype)
    if mask is not None:
        keep = mask.to(probabilities.dtype)
        probabilities, truth = probabilities * keep, truth * keep
    true_positive = probabilities * truth
    # p(1 - y) and (1 - p)y; with a mask both are zero where nothing is annotated.
    return true_positive, probabilities - true_positive, truth - true_positive


def tversky_score(
    probabilities: Tensor,
    target: Tensor,
    *,
    weights: tuple[float, float],
    batch: BatchTotal | None,
    mask: Tensor | None,
) -> Tensor:
    """Return the Tversky index per sample and class, or per class of the whole ``batch``."""
    axes = tuple(range(2, probabilities.ndim))
    parts = torch.stack([part.sum(axes) for part in confusion(probabilities, target, mask)])
    hits, extra, missed = parts if batch is None else batch(parts.sum(1))
    alpha, beta = weights
    index: Tensor = (hits + SMOOTH) / (hits + alpha * extra + beta * missed + SMOOTH)
    return index


def region_tversky_score(
    probabilities: Tensor,
    target: Tensor,
    *,
    grid: tuple[int, ...],
    batch: BatchTotal | None,
    mask: Tensor | None,
) -> Tensor:
    """Return MambaClinix's region-specific Tversky score per class and cell.

    Cells are those of adaptive average pooling, which overlap where the grid does not divide the
    patch. The weights adapt to the kind of error of each cell, and gradients flow through them.
    """
    pool = _POOL[len(grid)]
    parts = torch.stack([pool(part, grid) for part in confusion(probabilities, target, mask)])
    hits, extra, missed = parts if batch is None else batch(parts.sum(1))
    error = extra + missed + SMOOTH
    alpha = REGION_BASE + REGION_SLOPE * (extra + SMOOTH) / error
    beta = REGION_BASE + REGION_SLOPE * (missed + SMOOTH) / error
    index: Tensor = (hits + SMOOTH) / (hits + alpha * extra + beta * missed + SMOOTH)
    return index
