"""Logits on the raw image's grid, one class and one slab at a time, from a window of planes.

Upsampled logits of all classes never exist together, and of the logits on the working grid only
the planes that a slab depends on need be there.

Shapes: K classes, (d, h, w) the working grid, (D, H, W) the cropped raw grid in working axis order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from medmamba.preprocessing.pipeline import Shape3, UndoRecord
from medmamba.preprocessing.recipe import PreprocessingRecipe
from medmamba.preprocessing.resample import separate_axis
from medmamba.preprocessing.resample_axis import (
    AxisOperator,
    linear_taps,
    nearest_indices,
    partial_operator,
)
from medmamba.volume import Box

SLAB_BYTES = 2 * 1024 * 1024
"""Size of one class of one slab in float32; a few of them stay in the cache."""

REACH = 1
"""Working voxels beyond its neighbours that a raw voxel may depend on, for rounding."""

Slab = tuple[slice, slice, slice]
"""Box of the cropped raw grid."""


@dataclass(frozen=True, kw_only=True)
class GridChange:
    """How logits go from the working grid to the cropped raw grid.

    Args:
        old: voxels of the working grid.
        new: voxels of the cropped raw grid, in working axis order.
        orders: of the spline along each axis.
        separate: axis that is resampled on its own, if any.
        half: round resampled logits to float16, as nnU-Net does.
    """

    old: Shape3
    new: Shape3
    orders: tuple[int, ...]
    separate: int | None
    half: bool

    @classmethod
    def of(cls, record: UndoRecord, recipe: PreprocessingRecipe, *, half: bool) -> Self:
        """Follow the recipe of a plan for one case."""
        chosen = recipe.probabilities
        axis = separate_axis(record.working_spacing_mm, record.spacing_mm, chosen.separate_z)
        return cls(
            old=record.working_shape,
            new=record.shape_after_crop,
            orders=tuple(chosen.order_z if at == axis else chosen.order for at in range(3)),
            separate=axis,
            # nnU-Net's resampler in torch works and answers in float32, whatever it is given.
            half=half and chosen.method != "torch",
        )

    @property
    def is_linear(self) -> bool:
        """Whether every resampled value is a mean of its neighbours."""
        return max(self.orders) <= 1

    def ready(self, stop: int) -> int:
        """Return how many raw planes follow from the working planes before ``stop``."""
        if stop >= self.old[0]:
            return self.new[0]
        if not self.is_linear:
            return 0  # splines are clipped to the range of all planes
        return int(np.searchsorted(self._neighbours[1], stop))

    def first_needed(self, plane: int) -> int:
        """Return the first working plane that raw planes from ``plane`` on depend on."""
        return int(self._neighbours[0][plane]) if plane < self.new[0] else self.old[0]

    @cached_property
    def _neighbours(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """First and last working plane of each raw plane."""
        if self.old[0] == self.new[0]:
            planes = np.arange(self.new[0])
            return planes, planes
        if self.orders[0] == 0:
            nearest = nearest_indices(self.old[0], self.new[0])
            return nearest, nearest
        low, high, _ = linear_taps(self.old[0], self.new[0])
        return low, high


class PlaneWindow:
    """Logits that arrive plane by plane along the first working axis.

    Keeps the planes that raw planes still to be made depend on; where splines of higher order
    depend on everything, all of them.
    """

    def __init__(self, change: GridChange) -> None:
        self.change = change
        self._parts: list[NDArray[np.floating]] = []
        self._first = 0
        self._stop = 0

    @property
    def ready(self) -> int:
        """How many raw planes can be made."""
        return self.change.ready(self._stop)

    def feed(self, start: int, planes: NDArray[np.floating]) -> None:
        """Take the next planes (K, n, h, w), which must not be changed afterwards."""
        if start != self._stop:
            raise ValueError(f"plane {self._stop} is next, not {start}")
        self._parts.append(planes)
        self._stop += planes.shape[1]

    def fields(self) -> "ClassFields":
        """Return access to the raw planes that are ready and not released."""
        if len(self._parts) > 1:
            self._parts = [np.concatenate(self._parts, axis=1)]
        return ClassFields(self._parts[0], self.change, first=self._first)

    def release(self, until: int) -> None:
        """Forget what raw planes from ``until`` on do not need."""
        keep = min(self.change.first_needed(until), self._stop)
        if keep == self._first:
            return
        joined = self._parts[0] if len(self._parts) == 1 else np.concatenate(self._parts, axis=1)
        # A copy, or the planes before it would stay in memory with it.
        self._parts = [joined[:, keep - self._first :].copy()] if keep < self._stop else []
        self._first = keep


class ClassFields:
    """Logits of one class at a time, in slabs of a box of the cropped raw grid.

    Args:
        logits: (K, n, h, w), planes of the working grid from ``first`` on.
        change: between the grids.
        first: working plane that ``logits`` begin with.
    """

    def __init__(self, logits: NDArray[np.floating], change: GridChange, *, first: int = 0) -> None:
        self.logits = logits
        self._change = change
        self._first = first
        self._kind: type[np.floating] = np.float64 if change.half else np.float32
        self._result: type[np.floating] = np.float16 if change.half else np.float32

    @property
    def classes(self) -> int:
        """Outputs of the network."""
        return int(self.logits.shape[0])

    def slabs(self, box: Box) -> Iterator[Slab]:
        """Prepare for a box of the cropped raw grid, and yield its parts to be worked on at once.

        `values` may be asked for these only.
        """
        self._limit_to(box)
        (start, stop), rows, columns = box
        area = (rows[1] - rows[0]) * (columns[1] - columns[0])
        thickness = max(1, SLAB_BYTES // (4 * area))
        for first in range(start, stop, thickness):
            yield slice(first, min(first + thickness, stop)), slice(*rows), slice(*columns)

    def _limit_to(self, box: Box) -> None:
        self._operators: list[tuple[int, AxisOperator]] = []
        self._sources = [slice(None)] * 3
        for axis in (1, 2):
            old, new, rows = self._change.old[axis], self._change.new[axis], slice(*box[axis])
            if old == new:
                self._sources[axis] = rows
                continue
            operator, self._sources[axis] = partial_operator(
                old, new, self._change.orders[axis], rows, self._kind
            )
            self._operators.append((axis, operator))
        # The axis that grows least goes first, so that the other has less to do.
        self._operators.sort(key=lambda pair: self._change.new[pair[0]] / self._change.old[pair[0]])

    def values(self, slab: Slab, label: int) -> NDArray[np.floating]:
        """Return the logits of one class in one slab, as a new array."""
        depth, (old, new, order) = slab[0], self._along(0)
        if old == new:
            result = self._planes(label, depth)
        elif order == 0:
            nearest = nearest_indices(old, new)[depth]
            source = slice(int(nearest[0]), int(nearest[-1]) + 1)
            result = self._planes(label, source)[nearest - source.start]
        elif order == 1:
            result = self._between(label, depth)
        else:
            operator, source = partial_operator(old, new, order, depth, self._kind)
            result = operator.apply(self._planes(label, source), 0)
        if not self._change.is_linear:
            low, high = self._range(slab, label)
            np.clip(result, low, high, out=result)
        return result.astype(self._result, copy=False)

    def active_box(self, coarse: NDArray[np.bool_]) -> Box | None:
        """Return the box of the raw grid that marked voxels of ``logits`` can reach, if any.

        A linearly interpolated value is a mean of its neighbours: where none of them differs from
        background, neither does it.
        """
        box: list[tuple[int, int]] = []
        for axis in range(3):
            others = tuple(other for other in range(3) if other != axis)
            found = np.flatnonzero(coarse.any(axis=others))
            if found.size == 0:
                return None
            if axis == 0:
                found = found + self._first
            low, high, _ = linear_taps(*self._along(axis)[:2])
            reach = (high >= found[0] - REACH) & (low <= found[-1] + REACH)
            inside = np.flatnonzero(reach)
            box.append((int(inside[0]), int(inside[-1]) + 1))
        return tuple(box)

    def _along(self, axis: int) -> tuple[int, int, int]:
        return self._change.old[axis], self._change.new[axis], self._change.orders[axis]

    def _range(self, slab: Slab, label: int) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        """Return what a class may not leave, since splines overshoot: its range, or its slices'."""
        axis = self._change.separate
        if axis is None or self._change.orders[axis] > 0:
            return self.logits[label].min(), self.logits[label].max()
        others = tuple(other for other in range(3) if other != axis)
        nearest = nearest_indices(*self._along(axis)[:2])[slab[axis]]
        values = np.take(self.logits[label], nearest, axis=axis)
        return values.min(axis=others, keepdims=True), values.max(axis=others, keepdims=True)

    def _planes(self, label: int, source: slice) -> NDArray[Any]:
        rows, columns = self._sources[1:]
        held = slice(source.start - self._first, source.stop - self._first)
        values = np.array(self.logits[label, held, rows, columns], dtype=self._kind)
        for axis, operator in self._operators:
            values = operator.apply(values, axis)
        return values

    def _between(self, label: int, depth: slice) -> NDArray[Any]:
        low, high, weight = (part[depth] for part in linear_taps(*self._along(0)[:2]))
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
