"""Validation during training: Dice of fixed patches ("pseudo Dice"), not of whole cases.

Legend: B batch, K classes or regions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from medmamba.labels import LabelMap
from medmamba.training.losses import itself, region_targets
from medmamba.training.sampling import Batch

REGION_THRESHOLD = 0.0
"""Logit above which a voxel belongs to a region: sigmoid(0) = 0.5."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Loss and Dice over the validation patches; NaN where a class never occurred."""

    loss: float
    dice_per_class: dict[str, float]
    batches: int

    @property
    def dice(self) -> float:
        """Mean over classes that occurred."""
        known = [value for value in self.dice_per_class.values() if value == value]
        return sum(known) / len(known) if known else float("nan")


def validate(
    next_batch: Callable[[], Batch],
    evaluate: Callable[[Batch], tuple[Tensor, Tensor]],
    label_map: LabelMap,
    goes_on: Callable[[int], bool],
    total: Callable[[Tensor], Tensor] = itself,
) -> Validation:
    """Sum overlap over batches while ``goes_on(number of batches so far)``.

    Args:
        next_batch: hands out the fixed batches in order.
        evaluate: returns loss and full-resolution logits (B, K, *spatial) of a batch.
        label_map: which classes or regions are counted.
        goes_on: asked before every batch.
        total: sums counts over the processes that share the batches.
    """
    names = list(label_map.foreground)
    counts = torch.zeros(3, len(names), dtype=torch.float64)
    losses: list[float] = []
    while goes_on(len(losses)):
        batch = next_batch()
        loss, logits = evaluate(batch)
        losses.append(loss.item())
        counts += count_overlap(logits, batch.labels.to(logits.device), label_map).cpu()
    hits, extra, missed = total(counts)
    voxels = 2 * hits + extra + missed
    dice = torch.where(voxels > 0, 2 * hits / voxels.clip(min=1), torch.nan)
    return Validation(
        loss=sum(losses) / len(losses) if losses else float("nan"),
        dice_per_class=dict(zip(names, dice.tolist(), strict=True)),
        batches=len(losses),
    )


def count_overlap(logits: Tensor, labels: Tensor, label_map: LabelMap) -> Tensor:
    """Count true positives, false positives and false negatives per class or region (3, K).

    Voxels without annotation are left out.
    """
    annotated = torch.ones_like(labels, dtype=torch.bool)
    if label_map.ignore_value is not None:
        annotated = labels != label_map.ignore_value
    truth = region_targets(labels, label_map)[:, : len(label_map.foreground)]
    if label_map.has_regions:
        predicted = logits > REGION_THRESHOLD
    else:
        winner = logits.argmax(1, keepdim=True)
        values = [group[0] for group in label_map.foreground.values()]
        predicted = torch.cat([winner == value for value in values], dim=1)
    axes = (0, *range(2, logits.ndim))
    return torch.stack(
        [
            (predicted & truth & annotated).sum(axes),
            (predicted & ~truth & annotated).sum(axes),
            (~predicted & truth & annotated).sum(axes),
        ]
    ).double()
