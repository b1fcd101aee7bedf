"""Bringing predictions back: from logits on the working grid to labels on the raw image's grid.

The result is made slab by slab along the first working axis, one class at a time with a running
winner, so the upsampled logits of all classes never exist together. Nothing but the `UndoRecord`
says where voxels came from.
"""

from collections.abc import Callable, Iterator
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
    partial_operator,
    separate_axis,
)
from medmamba.volume import Box, Geometry

SLAB_BYTES = 2 * 1024 * 1024
"""Size of one class of one slab in float32; a few of them stay in the cache."""

REACH = 1
"""Working voxels beyond its neighbours that a raw voxel may depend on, for rounding."""

MOST_UINT8_LABELS = 254
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
    kind = _label_type(label_map)
    cropped = np.zeros(record.shape_after_crop, dtype=kind)
    if fields.is_linear:
        box = fields.active_box(_differs_from_background(fields.logits, label_map))
        if box is None:
            return _paste(cropped, record)
        fields.limit_to(box)
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
        inside[(slice(None), *slab)] = sigmoid(values) if label_map.has_regions else softmax(values)
    return result


def labels_from_probabilities(
    probabilities: NDArray[np.floating], label_map: LabelMap
) -> NDArray[np.unsignedinteger[Any]]:
    """Turn (K, D, H, W) probabilities, a mean over models for example, into a label map."""
    result = np.zeros(probabilities.shape[1:], dtype=_label_type(label_map))
    if label_map.has_regions:
        for region, value in zip(probabilities, label_map.region_order, strict=True):
            result[region > 0.5] = value
    else:
        result[:] = probabilities.argmax(axis=0)
    return result


def on_working_grid(labels: NDArray[Any], record: UndoRecord) -> NDArray[Any]:
    """Bring labels (D, H, W) of the raw grid to the working grid, by nearest neighbours.

    For pictures beside what the network saw; training labels are resampled as the plan says.
    """
    turned = labels.transpose(record.transpose_forward)[box_slices(record.crop_box)]
    pairs = zip(turned.shape, record.working_shape, strict=True)
    picked: NDArray[Any] = turned[np.ix_(*(nearest_indices(old, new) for old, new in pairs))]
    return picked


def working_geometry(record: UndoRecord) -> Geometry:
    """Return where the voxels of the working grid are, to within half of one."""
    matrix = record.geometry.matrix
    turned = np.eye(4)
    scale = np.array(record.working_spacing_mm) / np.array(record.spacing_mm)
    turned[:3, :3] = matrix[:3, list(record.transpose_forward)] * scale
    corner = np.zeros(3)
    corner[list(record.transpose_forward)] = [start for start, _ in record.crop_box]
    turned[:3, 3] = matrix[:3, :3] @ corner + matrix[:3, 3]
    return Geometry.from_matrix(record.working_shape, turned)


def softmax(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Softmax over the first axis."""
    shifted = np.exp(values - values.max(axis=0))
    return shifted / shifted.sum(axis=0)  # type: ignore[no-any-return]


def sigmoid(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logistic function, without overflow."""
    return np.float32(0.5) * (np.float32(1) + np.tanh(np.float32(0.5) * values))  # type: ignore[no-any-return]


_Read = Callable[[int], NDArray[np.floating]]


def _label_type(label_map: LabelMap) -> type[np.unsignedinteger[Any]]:
    return np.uint8 if len(label_map.foreground_values) <= MOST_UINT8_LABELS else np.uint16


def _differs_from_background(
    logits: NDArray[np.floating], label_map: LabelMap
) -> NDArray[np.bool_]:
    """Mark working voxels where anything but background has the largest logit."""
    found = np.zeros(logits.shape[1:], dtype=bool)
    for channel in range(0 if label_map.has_regions else 1, len(logits)):
        found |= logits[channel] > (0 if label_map.has_regions else logits[0])
    return found


def _pick_largest(read: _Read, classes: int, label_map: LabelMap, out: NDArray[Any]) -> None:
    best = read(0)
    wins = np.empty(out.shape, dtype=bool)
    for label in range(1, classes):
        values = read(label)
        np.greater(values, best, out=wins)
        np.maximum(values, best, out=best)
        np.copyto(out, label, where=wins)


def _paint_regions(read: _Read, classes: int, label_map: LabelMap, out: NDArray[Any]) -> None:
    for region in range(classes):
        # sigmoid(x) > 0.5 where x > 0.
        out[read(region) > 0] = label_map.region_order[region]


def _paste(cropped: NDArray[Any], record: UndoRecord) -> NDArray[Any]:
    result = np.zeros(record.geometry.shape, dtype=cropped.dtype)
    result.transpose(record.transpose_forward)[box_slices(record.crop_box)] = cropped
    return result


class _ClassFields:
    """Logits of one class at a time, in slabs of a box of the cropped raw grid."""

    def __init__(
        self, logits: Any, record: UndoRecord, recipe: PreprocessingRecipe, *, half: bool
    ) -> None:
        self.logits = _as_array(logits)
        resampling = recipe.probabilities
        # nnU-Net's resampler in torch works and answers in float32, whatever it is given.
        half = half and resampling.method != "torch"
        self._kind: type[np.floating] = np.float64 if half else np.float32
        self._result: type[np.floating] = np.float16 if half else np.float32
        self._old = record.working_shape
        self._new = record.shape_after_crop
        axis = separate_axis(record.working_spacing_mm, record.spacing_mm, resampling.separate_z)
        self._orders = tuple(
            resampling.order_z if position == axis else resampling.order for position in range(3)
        )
        self._separate = axis
        self.limit_to(tuple((0, size) for size in self._new))

    @property
    def classes(self) -> int:
        return int(self.logits.shape[0])

    def limit_to(self, box: Box) -> None:
        """Make `slabs` cover a box of the cropped raw grid only."""
        self._box = box
        self._operators: list[tuple[int, AxisOperator]] = []
        self._sources = [slice(None)] * 3
        for axis in (1, 2):
            old, new, rows = self._old[axis], self._new[axis], slice(*box[axis])
            if old == new:
                self._sources[axis] = rows
                continue
            operator, self._sources[axis] = partial_operator(
                old, new, self._orders[axis], rows, self._kind
            )
            self._operators.append((axis, operator))
        # The axis that grows least goes first, so that the other has less to do.
        self._operators.sort(key=lambda pair: self._new[pair[0]] / self._old[pair[0]])

    def slabs(self) -> Iterator[tuple[slice, slice, slice]]:
        """Yield boxes of the cropped raw grid that are worked on at once."""
        (start, stop), rows, columns = self._box
        area = (rows[1] - rows[0]) * (columns[1] - columns[0])
        thickness = max(1, SLAB_BYTES // (4 * area))
        for first in range(start, stop, thickness):
            yield slice(first, min(first + thickness, stop)), slice(*rows), slice(*columns)

    def values(self, slab: tuple[slice, ...], label: int) -> NDArray[np.floating]:
        """Return the logits of one class in one slab, as a new array."""
        depth = slab[0]
        if self._old[0] == self._new[0]:
            result = self._planes(label, depth)
        elif self._orders[0] == 0:
            nearest = nearest_indices(self._old[0], self._new[0])[depth]
            source = slice(int(nearest[0]), int(nearest[-1]) + 1)
            result = self._planes(label, source)[nearest - source.start]
        elif self._orders[0] == 1:
            result = self._between(label, depth)
        else:
            operator, source = partial_operator(
                self._old[0], self._new[0], self._orders[0], depth, self._kind
            )
            result = operator.apply(self._planes(label, source), 0)
        if not self.is_linear:
            low, high = self._range(slab, label)
            np.clip(result, low, high, out=result)
        return result.astype(self._result, copy=False)

    def _range(
        self, slab: tuple[slice, ...], label: int
    ) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        """Return what a class may not leave, since splines overshoot: its range, or its slices'."""
        axis = self._separate
        if axis is None or self._orders[axis] > 0:
            return self.logits[label].min(), self.logits[label].max()
        others = tuple(other for other in range(3) if other != axis)
        nearest = nearest_indices(self._old[axis], self._new[axis])[slab[axis]]
        values = np.take(self.logits[label], nearest, axis=axis)
        return values.min(axis=others, keepdims=True), values.max(axis=others, keepdims=True)

    def active_box(self, coarse: NDArray[np.bool_]) -> Box | None:
        """Return the box of the raw grid that ``coarse`` working voxels can reach, if any.

        A linearly interpolated value is a mean of its neighbours: where none of them differs from
        background, neither does it.
        """
        box: list[tuple[int, int]] = []
        for axis in range(3):
            others = tuple(other for other in range(3) if other != axis)
            found = np.flatnonzero(coarse.any(axis=others))
            if found.size == 0:
                return None
            low, high, _ = linear_taps(self._old[axis], self._new[axis])
            reach = (high >= found[0] - REACH) & (low <= found[-1] + REACH)
            inside = np.flatnonzero(reach)
            box.append((int(inside[0]), int(inside[-1]) + 1))
        return tuple(box)

    @property
    def is_linear(self) -> bool:
        """Whether every resampled value is a mean of its neighbours."""
        return max(self._orders) <= 1

    def _planes(self, label: int, source: slice) -> NDArray[Any]:
        rows, columns = self._sources[1:]
        values = np.array(self.logits[label, source, rows, columns], dtype=self._kind)
        for axis, operator in self._operators:
            values = operator.apply(values, axis)
        return values

    def _between(self, label: int, depth: slice) -> NDArray[Any]:
        low, high, weight = (part[depth] for part in linear_taps(self._old[0], self._new[0]))
        source = slice(int(low[0]), int(high[-1]) + 1)
        planes = self._planes(label, source)
        result = np.empty((len(low), *planes.shape[1:]), dtype=planes.dtype)
        for plane, below, above, second in zip(
            result,
            low - source.start,
            high - source.start,
            weight.astype(planes.dtype),
            strict=True,
        ):
            np.multiply(planes[below], 1 - second, out=plane)
            plane += planes[above] * second
        return result


def _as_array(logits: Any) -> NDArray[np.floating]:
    if isinstance(logits, np.ndarray):
        return np.asarray(logits)
    array: NDArray[np.floating] = logits.detach().float().cpu().numpy()
    return array
