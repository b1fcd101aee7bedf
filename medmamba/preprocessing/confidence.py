"""How sure the networks were of each label: means of their probabilities where the label won.

Measured on the working grid, where the networks spoke. Not calibrated: a probability of 0.9 does
not mean that nine voxels of ten are right.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba.files import RECORD_CONFIG
from medmamba.labels import LabelMap

VOXELS_AT_ONCE = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """Of one label or region.

    Args:
        mean_probability: of the label, over the voxels where it won.
        mean_entropy: over the same voxels; 0 is certain, 1 is a guess.
        disagreement: share of flips and folds that said something else there; None where the
            networks spoke once.
    """

    __pydantic_config__ = RECORD_CONFIG

    mean_probability: float
    mean_entropy: float
    disagreement: float | None = None


class ConfidenceSums:
    """Running sums over the voxels of a case, in any order.

    Args:
        label_map: what the channels of logits mean.
    """

    def __init__(self, label_map: LabelMap) -> None:
        self._label_map = label_map
        count = label_map.output_channels
        self._voxels = np.zeros(count)
        self._probability = np.zeros(count)
        self._entropy = np.zeros(count)

    def add(self, logits: NDArray[np.floating], foreground: NDArray[np.bool_]) -> None:
        """Add the voxels (...) of logits (K, ...) that are marked as not background."""
        where = np.flatnonzero(foreground)
        flat = logits.reshape(len(logits), -1)
        add = self._add_regions if self._label_map.has_regions else self._add_classes
        for start in range(0, where.size, VOXELS_AT_ONCE):
            add(flat[:, where[start : start + VOXELS_AT_ONCE]].astype(np.float32, copy=False))

    def result(self) -> dict[str, Confidence]:
        """Return the means by label name; labels that won nowhere are left out."""
        names = list(self._label_map.foreground)
        # Channel 0 of exclusive classes is background.
        offset = 0 if self._label_map.has_regions else 1
        found = {}
        for name, channel in zip(names, range(offset, len(self._voxels)), strict=True):
            count = self._voxels[channel]
            if count:
                found[name] = Confidence(
                    mean_probability=round(float(self._probability[channel] / count), 5),
                    mean_entropy=round(float(self._entropy[channel] / count), 5),
                )
        return found

    def _add_classes(self, logits: NDArray[np.float32]) -> None:
        winner = logits.argmax(axis=0)
        logits = logits - logits.max(axis=0)
        weights = np.exp(logits)
        total = weights.sum(axis=0)
        logits *= weights
        entropy = (np.log(total) - logits.sum(axis=0) / total) / np.log(len(logits))
        self._count(winner, 1 / total, entropy)

    def _add_regions(self, logits: NDArray[np.float32]) -> None:
        for channel, values in enumerate(logits):
            inside = values[values > 0]
            # Of the probability p = 1 / (1 + e^-x), in a form that holds for any x > 0.
            rest = np.exp(-inside)
            probability = 1 / (1 + rest)
            entropy = (np.log1p(rest) + inside * rest * probability) / np.log(2)
            self._count(np.full(inside.size, channel), probability, entropy)

    def _count(
        self, channel: NDArray[np.integer], probability: NDArray[np.float32], entropy: NDArray[Any]
    ) -> None:
        size = len(self._voxels)
        self._voxels += np.bincount(channel, minlength=size)
        self._probability += np.bincount(channel, probability, minlength=size)
        self._entropy += np.bincount(channel, entropy, minlength=size)
