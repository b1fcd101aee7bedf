"""How many voxels agree: counts, Dice and IoU of one label, with nnU-Net's rules.

A label that neither mask contains has no Dice (NaN), so that it does not enter means; voxels with
the ignore value in the reference count for nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Voxel counts of one label (or region) in one case."""

    tp: int
    fp: int
    fn: int
    tn: int

    @property
    def n_ref(self) -> int:
        """Voxels of the label in the reference."""
        return self.tp + self.fn

    @property
    def n_pred(self) -> int:
        """Voxels of the label in the prediction."""
        return self.tp + self.fp

    @property
    def dice(self) -> float:
        """Twice the intersection over the sum of sizes; NaN if both masks are empty."""
        total = 2 * self.tp + self.fp + self.fn
        return 2 * self.tp / total if total else float("nan")

    @property
    def iou(self) -> float:
        """Intersection over union; NaN if both masks are empty."""
        union = self.tp + self.fp + self.fn
        return self.tp / union if union else float("nan")


def region_mask(labels: NDArray[np.integer], values: Sequence[int]) -> NDArray[np.bool_]:
    """Return where ``labels`` is any of ``values``."""
    if len(values) == 1:
        single: NDArray[np.bool_] = labels == values[0]
        return single
    return np.isin(labels, list(values))


def count_overlap(
    reference: NDArray[np.bool_], prediction: NDArray[np.bool_], *, voxels: int
) -> Overlap:
    """Count agreement of two masks.

    Args:
        reference: mask inside any box that holds all true voxels of both masks.
        prediction: the same box.
        voxels: all voxels that count, also those outside the box.
    """
    tp = int(np.count_nonzero(reference & prediction))
    n_ref = int(np.count_nonzero(reference))
    n_pred = int(np.count_nonzero(prediction))
    return Overlap(tp=tp, fp=n_pred - tp, fn=n_ref - tp, tn=voxels - n_ref - n_pred + tp)
