"""Bringing predictions back: from logits on the working grid to labels on the raw image's grid.

The result is made slab by slab along the first working axis, as soon as the planes of logits that
a slab depends on are there. Nothing but the `UndoRecord` says where voxels came from.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba.labels import LabelMap
from medmamba.preprocessing.class_fields import ClassFields, GridChange, PlaneWindow, Slab
from medmamba.preprocessing.confidence import Confidence, ConfidenceSums
from medmamba.preprocessing.crop import box_slices
from medmamba.preprocessing.pipeline import UndoRecord
from medmamba.preprocessing.recipe import PreprocessingRecipe
from medmamba.preprocessing.resample_axis import nearest_indices
from medmamba.volume import Box, Geometry

MOST_UINT8_LABELS = 254
"""nnU-Net writes uint16 from 255 foreground labels on."""

OnProbabilities = Callable[[tuple[slice, ...], NDArray[np.float32]], None]
"""Called with boxes (D, H, W) of the raw grid and the probabilities (K, ...) in them."""


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
    stream = LabelStream(record, recipe, label_map, compat=compat)
    stream.feed(0, as_array(logits))
    return stream.finish()


class LabelStream:
    """Labels from logits that arrive plane by plane along the first working axis.

    Memory follows from the label map alone, not from the logits, unless probabilities are
    resampled by splines of higher order: these depend on everything and wait for the last plane.

    Args:
        record: what preprocessing did to the case.
        recipe: how probabilities are resampled.
        label_map: what the channels of the logits mean.
        compat: round resampled logits to float16, as nnU-Net does.
        on_probabilities: given the probabilities on the raw grid too, but for the margin that
            preprocessing cropped.
    """

    def __init__(
        self,
        record: UndoRecord,
        recipe: PreprocessingRecipe,
        label_map: LabelMap,
        *,
        compat: bool = False,
        on_probabilities: OnProbabilities | None = None,
    ) -> None:
        self._record, self._label_map = record, label_map
        self._window = PlaneWindow(GridChange.of(record, recipe, half=compat))
        self._result = np.zeros(record.geometry.shape, dtype=label_type(label_map))
        turned = self._result.transpose(record.transpose_forward)
        self._cropped = turned[box_slices(record.crop_box)]
        self._decide = _paint_regions if label_map.has_regions else _pick_largest
        self._confidence = ConfidenceSums(label_map)
        self._on_probabilities = on_probabilities
        self._done = 0

    def feed(self, start: int, planes: NDArray[np.floating]) -> None:
        """Take the next planes (K, n, h, w); what they decide is written before returning."""
        self._confidence.add(planes, differs_from_background(planes, self._label_map))
        self._window.feed(start, planes)
        ready = self._window.ready
        if ready > self._done:
            fields = self._window.fields()
            self._write_labels(fields, ready)
            if self._on_probabilities is not None:
                self._write_probabilities(fields, ready, self._on_probabilities)
            self._done = ready
            self._window.release(ready)

    def finish(self) -> NDArray[np.unsignedinteger[Any]]:
        """Return the labels (D, H, W), once all planes were fed."""
        if self._done < self._cropped.shape[0]:
            raise ValueError(f"planes for raw planes from {self._done} on are missing")
        return self._result

    @property
    def nbytes(self) -> int:
        """Memory of the labels."""
        return self._result.nbytes

    @property
    def confidence(self) -> dict[str, Confidence]:
        """How sure the networks were, by label name."""
        return self._confidence.result()

    def _rest(self, until: int) -> Box:
        return ((self._done, until), *((0, size) for size in self._cropped.shape[1:]))

    def _write_labels(self, fields: ClassFields, until: int) -> None:
        box = self._rest(until)
        if self._window.change.is_linear:
            active = fields.active_box(differs_from_background(fields.logits, self._label_map))
            if active is None:
                return
            box = ((max(self._done, active[0][0]), min(until, active[0][1])), *active[1:])
        for slab in fields.slabs(box):
            out = np.zeros(tuple(part.stop - part.start for part in slab), self._result.dtype)
            self._decide(partial(fields.values, slab), fields.classes, self._label_map, out)
            self._cropped[slab] = out

    def _write_probabilities(self, fields: ClassFields, until: int, tell: OnProbabilities) -> None:
        for slab in fields.slabs(self._rest(until)):
            values = slab_probabilities(fields, slab, self._label_map)
            tell(*on_raw_grid(slab, values, self._record))


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
    change = GridChange.of(record, recipe, half=compat)
    fields = ClassFields(as_array(logits), change)
    result = np.zeros((fields.classes, *record.geometry.shape), dtype=np.float32)
    if not label_map.has_regions:
        result[0] = 1.0
    for slab in fields.slabs(tuple((0, size) for size in change.new)):
        box, values = on_raw_grid(slab, slab_probabilities(fields, slab, label_map), record)
        result[(slice(None), *box)] = values
    return result


def slab_probabilities(fields: ClassFields, slab: Slab, label_map: LabelMap) -> NDArray[np.float32]:
    """Return the probabilities (K, ...) in a slab of the cropped raw grid."""
    values = np.stack([fields.values(slab, k) for k in range(fields.classes)])
    values = values.astype(np.float32, copy=False)
    return sigmoid(values) if label_map.has_regions else softmax(values)


def on_raw_grid(
    slab: Slab, values: NDArray[Any], record: UndoRecord
) -> tuple[tuple[slice, ...], NDArray[Any]]:
    """Return a slab (..., n, h, w) of the cropped raw grid turned to (D, H, W), its box first."""
    back = [record.transpose_forward.index(axis) for axis in range(3)]
    starts = [start for start, _ in record.crop_box]
    moved = [slice(p.start + s, p.stop + s) for p, s in zip(slab, starts, strict=True)]
    leading = tuple(range(values.ndim - 3))
    turned = values.transpose(*leading, *(len(leading) + axis for axis in back))
    return tuple(moved[axis] for axis in back), turned


def labels_from_probabilities(
    probabilities: NDArray[np.floating], label_map: LabelMap
) -> NDArray[np.unsignedinteger[Any]]:
    """Turn (K, D, H, W) probabilities, a mean over models for example, into a label map."""
    result = np.zeros(probabilities.shape[1:], dtype=label_type(label_map))
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


def label_type(label_map: LabelMap) -> type[np.unsignedinteger[Any]]:
    """Return the number type that a label map is written in."""
    return np.uint8 if len(label_map.foreground_values) <= MOST_UINT8_LABELS else np.uint16


def differs_from_background(logits: NDArray[np.floating], label_map: LabelMap) -> NDArray[np.bool_]:
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


def as_array(logits: Any) -> NDArray[np.floating]:
    """Return logits as an array on the CPU, float32 unless they are an array already."""
    if isinstance(logits, np.ndarray):
        return np.asarray(logits)
    array: NDArray[np.floating] = logits.detach().float().cpu().numpy()
    return array
