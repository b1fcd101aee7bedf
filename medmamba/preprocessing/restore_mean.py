"""Labels from the mean probabilities of several models, each with a working grid of its own.

Shapes: K classes, (D, H, W) the raw image's grid.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba.labels import LabelMap
from medmamba.preprocessing.class_fields import GridChange, PlaneWindow
from medmamba.preprocessing.confidence import Confidence, ConfidenceSums
from medmamba.preprocessing.pipeline import UndoRecord
from medmamba.preprocessing.recipe import PreprocessingRecipe
from medmamba.preprocessing.restore import (
    OnProbabilities,
    label_type,
    labels_from_probabilities,
    on_raw_grid,
    slab_probabilities,
)
from medmamba.volume import Box

SMALLEST_PROBABILITY = 1e-7
"""Keeps logarithms of probabilities finite."""


class MeanStream:
    """Labels from logits of several members, of which each arrives plane by plane.

    Where all members have the same first working axis, only the planes that not all members have
    given yet are kept; otherwise the sum of probabilities of the whole image.

    Args:
        records: what preprocessing did to the case for each member.
        recipes: how each member's probabilities are resampled.
        label_map: common to all.
        compat: round resampled logits to float16, as nnU-Net does.
        on_probabilities: given the mean probabilities too, as of ``restore.LabelStream``.
    """

    def __init__(
        self,
        records: Sequence[UndoRecord],
        recipes: Sequence[PreprocessingRecipe],
        label_map: LabelMap,
        *,
        compat: bool = False,
        on_probabilities: OnProbabilities | None = None,
    ) -> None:
        self._records, self._label_map = tuple(records), label_map
        self._windows = [
            PlaneWindow(GridChange.of(record, recipe, half=compat))
            for record, recipe in zip(records, recipes, strict=True)
        ]
        self._result = np.zeros(records[0].geometry.shape, dtype=label_type(label_map))
        self._confidence = ConfidenceSums(label_map)
        self._on_probabilities = on_probabilities
        self._done = [0] * len(records)
        self._is_common = len({record.transpose_forward[0] for record in records}) == 1
        self._sum: NDArray[np.float32] | None = None

    def feed(self, member: int, start: int, planes: NDArray[np.floating]) -> None:
        """Take the next planes (K, n, h, w) of a member."""
        self._windows[member].feed(start, planes)
        if self._is_common:
            self._advance(range(len(self._windows)), min(each.ready for each in self._windows))
        else:
            self._advance([member], self._windows[member].ready)

    def finish(self) -> NDArray[np.unsignedinteger[Any]]:
        """Return the labels (D, H, W), once all planes of all members were fed."""
        if any(
            done < window.change.new[0]
            for done, window in zip(self._done, self._windows, strict=True)
        ):
            raise ValueError("planes are missing")
        if self._sum is not None:
            for plane in range(self._result.shape[0]):
                box = (slice(plane, plane + 1), slice(None), slice(None))
                self._decide(box, self._sum[(slice(None), *box)] / np.float32(len(self._windows)))
        return self._result

    @property
    def nbytes(self) -> int:
        """Memory of the labels."""
        return self._result.nbytes

    @property
    def confidence(self) -> dict[str, Confidence]:
        """How sure the members were together, by label name."""
        return self._confidence.result()

    def _advance(self, members: Sequence[int] | range, until: int) -> None:
        done = self._done[members[0]]
        if until <= done:
            return
        slabs = []
        for member in members:
            window = self._windows[member]
            fields = window.fields()
            box: Box = ((done, until), *((0, size) for size in window.change.new[1:]))
            slabs.append([(fields, slab, self._records[member]) for slab in fields.slabs(box)])
        for parts in zip(*slabs, strict=True):
            total: NDArray[np.float32] | None = None
            for fields, slab, record in parts:
                values = slab_probabilities(fields, slab, self._label_map)
                place, turned = on_raw_grid(slab, values, record)
                total = turned if total is None else total + turned
            assert total is not None
            if self._is_common:
                self._decide(place, total / np.float32(len(parts)))
            else:
                self._add(place, total)
        for member in members:
            self._windows[member].release(until)
            self._done[member] = until

    def _add(self, place: tuple[slice, ...], values: NDArray[np.float32]) -> None:
        if self._sum is None:
            self._sum = np.zeros((len(values), *self._result.shape), dtype=np.float32)
        self._sum[(slice(None), *place)] += values

    def _decide(self, place: tuple[slice, ...], probabilities: NDArray[np.float32]) -> None:
        labels = labels_from_probabilities(probabilities, self._label_map)
        self._result[place] = labels
        likely = np.clip(probabilities, SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
        logits = np.log(likely)
        if self._label_map.has_regions:
            logits -= np.log1p(-likely)
        self._confidence.add(logits, labels > 0)
        if self._on_probabilities is not None:
            self._on_probabilities(place, probabilities)
