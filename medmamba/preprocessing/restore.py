"""Bringing predictions back: from logits on the working grid to labels on the raw image's grid.

The result is made slab by slab along the first working axis, one class at a time with a running
winner, so the upsampled logits of all classes never exist together. Nothing but the `UndoRecord`
says where voxels came from.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba.labels import LabelMap
from medmamba.preprocessing.crop import box_slices
from medmamba.preprocessing.pipeline import UndoRecord
from medmamba.preprocessing.recipe import PreprocessingRecipe
from medmamba.preprocessing.resample import (
    AxisOperator,
    linear_taps,
    nearest_indices,
    separate_axis,
    spline_operator,
)

SLAB_BYTES = 16 * 1024 * 1024
"""Size of one class of one slab in float32; a few of them exist at a time."""

LARGEST_UINT8_LABEL = 254
"""nnU-Net writes uint16 from 255 foreground labels on."""


def restore_labels(
    logits: Any,
    record: UndoRecord,
    recipe: PreprocessingRecipe,
    label_map: LabelMap,
    *,
    compat: bool = False,
) -> NDArray[np.unsignedinteger[Any]]:
    """Turn logits into a label map on the raw image's grid.

    Args:
        logits: (K, d, h, w) array or tensor on the working grid.
        record: what preprocessing did to the case.
        recipe: how probabilities are resampled.
        label_map: what the channels of the logits mean.
        compat: round resampled logits to float16, as nnU-Net does.

    Returns:
        (D, H, W) uint8, or uint16 where label values need it.
    """
    fields = _ClassFields(logits, record, recipe, half=compat)
    largest = max(label_map.all_values)
    kind = np.uint8 if largest <= LARGEST_UINT8_LABEL else np.uint16
    cropped = np.zeros(record.shape_after_crop, dtype=kind)
    decide = _paint_regions if label_map.has_regions else _pick_largest
    for slab in fields.slabs():
        decide(partial(fields.values, slab), fields.classes, label_map, cropped[slab])
    return _paste(cropped, record)


def restore_probabilities(
    logits: Any,
    record: UndoRecord,
    recipe: PreprocessingRecipe,
    label_map: LabelMap,
    *,
    compat: bool = False,
) -> NDArray[np.float32]:
    """Turn logits into probabilities on the raw image's grid.

    Outside the non-zero region background has probability 1 (where classes exclude each other)
    and every region 0.

    Args:
        logits: (K, d, h, w) array or tensor on the working grid.
        record: what preprocessing did to the case.
        recipe: how probabilities are resampled.
        label_map: what the channels of the logits mean.
        compat: round resampled logits to float16, as nnU-Net does.

    Returns:
        (K, D, H, W) float32.
    """
    fields = _ClassFields(logits, record, recipe, half=compat)
    result = np.zeros((fields.classes, *record.geometry.shape), dtype=np.float32)
    if not label_map.has_regions:
        result[0] = 1.0
    turned = result.transpose(0, *(axis + 1 for axis in record.transpose_forward))
    inside = turned[(slice(None), *box_slices(record.crop_box))]
    for slab in fields.slabs():
        values = np.stack([fields.values(slab, k) for k in range(fields.classes)])
        values = values.astype(np.float32, copy=False)
        inside[:, slab] = sigmoid(values) if label_map.has_regions else softmax(values)
    return result


def labels_from_probabilities(
    probabilities: NDArray[np.floating], label_map: LabelMap
) -> NDArray[np.unsignedinteger[Any]]:
    """Turn (K, D, H, W) probabilities, a mean over models for example, into a label map."""
    kind = np.uint8 if max(label_map.all_values) <= LARGEST_UINT8_LABEL else np.uint16
    result = np.zeros(probabilities.shape[1:], dtype=kind)
    if label_map.has_regions:
        for region, value in zip(probabilities, label_map.region_order, strict=True):
            result[region > 0.5] = value
    else:
        result[:] = probabilities.argmax(axis=0)
    return result


def softmax(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Softmax over the first axis."""
    shifted = np.exp(values - values.max(axis=0))
    return shifted / shifted.sum(axis=0)  # type: ignore[no-any-return]


def sigmoid(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logistic function, without overflow."""
    return np.float32(0.5) * (np.float32(1) + np.tanh(np.float32(0.5) * values))  # type: ignore[no-any-return]


_Read = Callable[[int], NDArray[np.floating]]


def _pick_largest(read: _Read, classes: int, label_map: LabelMap, out: NDArray[Any]) -> None:
    best = read(0)
    out[:] = 0
    for label in range(1, classes):
        values = read(label)
        wins = values > best
        np.copyto(best, values, where=wins)
        out[wins] = label


def _paint_regions(read: _Read, classes: int, label_map: LabelMap, out: NDArray[Any]) -> None:
    for region in range(classes):
        # sigmoid(x) > 0.5 where x > 0.
        out[read(region) > 0] = label_map.region_order[region]


def _paste(cropped: NDArray[Any], record: UndoRecord) -> NDArray[Any]:
    result = np.zeros(record.geometry.shape, dtype=cropped.dtype)
    result.transpose(record.transpose_forward)[box_slices(record.crop_box)] = cropped
    return result


@dataclass(frozen=True)
class _Plane:
    """Resampling inside the slices of the first axis: one operator per axis, or none."""

    operators: tuple[tuple[int, AxisOperator], ...]

    def apply(self, values: NDArray[np.floating]) -> NDArray[np.floating]:
        for axis, operator in self.operators:
            values = operator.apply(values, axis)
        return values


class _ClassFields:
    """Logits of one class at a time, on the cropped raw grid, in slabs of the first axis."""

    def __init__(
        self, logits: Any, record: UndoRecord, recipe: PreprocessingRecipe, *, half: bool
    ) -> None:
        self._logits = _as_array(logits)
        self._half = half
        self._old = record.working_shape
        self._new = record.shape_after_crop
        resampling = recipe.probabilities
        self._axis = separate_axis(
            record.working_spacing_mm, record.spacing_mm, resampling.separate_z
        )
        self._orders = tuple(
            resampling.order_z if axis == self._axis else resampling.order for axis in range(3)
        )
        in_plane = sorted((1, 2), key=lambda axis: self._new[axis] / self._old[axis])
        self._plane = _Plane(
            tuple(
                (axis, self._operator(axis))
                for axis in in_plane
                if self._old[axis] != self._new[axis]
            )
        )

    @property
    def classes(self) -> int:
        return int(self._logits.shape[0])

    def slabs(self) -> Iterator[slice]:
        depth, height, width = self._new
        thickness = max(1, SLAB_BYTES // (4 * height * width))
        for start in range(0, depth, thickness):
            yield slice(start, min(start + thickness, depth))

    def values(self, slab: slice, label: int) -> NDArray[np.floating]:
        """Logits of one class in one slab, as a new array."""
        if self._old[0] == self._new[0]:
            rows = self._read(label, slab)
            result = self._plane.apply(rows)
        elif self._orders[0] == 0:
            nearest = nearest_indices(self._old[0], self._new[0])[slab]
            source = slice(int(nearest[0]), int(nearest[-1]) + 1)
            result = self._plane.apply(self._read(label, source))[nearest - source.start]
        elif self._orders[0] == 1:
            result = self._interpolated(label, slab)
        else:
            planes = self._plane.apply(self._read(label, slice(None)))
            result = self._operator(0).apply(planes, 0)[slab]
        return result.astype(np.float16 if self._half else np.float32, copy=True)

    def _interpolated(self, label: int, slab: slice) -> NDArray[np.floating]:
        low, high, weight = (part[slab] for part in linear_taps(self._old[0], self._new[0]))
        source = slice(int(low[0]), int(high[-1]) + 1)
        planes = self._plane.apply(self._read(label, source))
        second = weight.astype(planes.dtype)[:, None, None]
        below, above = planes[low - source.start], planes[high - source.start]
        result: NDArray[np.floating] = below * (1 - second) + above * second
        return result

    def _read(self, label: int, source: slice) -> NDArray[np.floating]:
        kind = np.float64 if self._half else np.float32
        rows: NDArray[np.floating] = np.array(self._logits[label, source], dtype=kind)
        return rows

    def _operator(self, axis: int) -> AxisOperator:
        kind = np.float64 if self._half else np.float32
        return spline_operator(self._old[axis], self._new[axis], self._orders[axis], kind)


def _as_array(logits: Any) -> NDArray[np.floating]:
    if isinstance(logits, np.ndarray):
        return np.asarray(logits)
    array: NDArray[np.floating] = logits.detach().float().cpu().numpy()
    return array
