"""Spline resampling of one channel in slabs along its first axis: memory follows from the result.

The same sums in the same order as over the whole array; only how much of it is there at once
differs. Splines decay by 0.27 a sample, so a slab of the result depends on few planes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba.preprocessing.recipe import ResamplingRecipe
from medmamba.preprocessing.resample_axis import spline_operator

ReadPlanes = Callable[[slice], NDArray[np.floating]]
"""Gives planes (n, h, w) of a channel, as an array of its own."""

Shape = tuple[int, ...]

SOURCE_BYTES = 1 << 25
"""Planes read at once, in float64."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Range:
    """What results may not leave, since splines overshoot; of each slice where one axis is apart.

    Args:
        axis: whose slices have their own ranges; None for one range of all.
    """

    axis: int | None
    low: NDArray[np.floating]
    high: NDArray[np.floating]

    def clip(self, values: NDArray[np.float64], first: int) -> NDArray[np.float64]:
        """Clip planes from ``first`` on, in place."""
        if self.axis is None:
            return np.clip(values, self.low, self.high, out=values)
        planes = slice(first, first + values.shape[0]) if self.axis == 0 else slice(None)
        return np.clip(values, self.low[planes], self.high[planes], out=values)


def resample_planes(
    read: ReadPlanes,
    old: Shape,
    recipe: ResamplingRecipe,
    axis: int | None,
    out: NDArray[np.floating],
) -> None:
    """Resample a channel by splines, clipped to the range of what it was made from.

    Args:
        read: gives the channel's planes.
        old: its shape.
        recipe: orders.
        axis: resampled on its own, after the others and without clipping; None for none.
        out: receives the result; its shape is the new one.
    """
    steps = _Steps(old, out.shape, recipe, axis, _range(read, old, axis))
    along = steps.along_first
    if along is None:
        for planes in _spans(old):
            out[planes] = steps.before(read(planes).astype(np.float64), planes.start)
        return
    held: list[NDArray[np.float64]] = []
    first = stop = 0
    # What no later block needs is let go.
    needed = np.minimum.accumulate([source for _, source, _ in along.blocks][::-1])[::-1]
    for (row, source, matrix), keep in zip(along.blocks, needed.tolist(), strict=True):
        while stop < source + matrix.shape[1]:
            planes = slice(stop, min(stop + _planes_at_once(old), old[0]))
            held.append(steps.before(read(planes).astype(np.float64), stop))
            stop = planes.stop
        window = np.concatenate(held) if len(held) > 1 else held[0]
        window = window[keep - first :]
        held, first = [window], keep
        used = window[source - keep :][: matrix.shape[1]]
        made = np.matmul(matrix, used.reshape(len(used), -1)).reshape(-1, *used.shape[1:])
        out[row : row + len(made)] = steps.after(made, row)


class _Steps:
    """What is done to planes before and after they are combined along the first axis."""

    def __init__(
        self,
        old: Shape,
        new: Shape,
        recipe: ResamplingRecipe,
        axis: int | None,
        limits: _Range,
    ) -> None:
        operators = {
            position: spline_operator(
                old[position],
                new[position],
                recipe.order_z if position == axis else recipe.order,
            )
            for position in range(3)
            if old[position] != new[position]
        }
        if axis is None:
            # Axes that shrink go first, so that later products are smaller.
            order: Sequence[int] = sorted(range(3), key=lambda at: new[at] / old[at])
            sequence: list[int | _Range] = [*order, limits]
        else:
            sequence = [*(at for at in range(3) if at != axis), limits, axis]
        steps = [step for step in sequence if isinstance(step, _Range) or step in operators]
        cut = steps.index(0) if 0 in operators else len(steps)
        self.along_first = operators.get(0)
        self._operators = operators
        self._before, self._after = steps[:cut], steps[cut + 1 :]

    def before(self, planes: NDArray[np.float64], first: int) -> NDArray[np.float64]:
        """Work on planes of the source from ``first`` on; they may be changed."""
        return self._apply(self._before, planes, first)

    def after(self, planes: NDArray[np.float64], first: int) -> NDArray[np.float64]:
        """Work on planes of the result from ``first`` on; they may be changed."""
        return self._apply(self._after, planes, first)

    def _apply(
        self, steps: "Sequence[int | _Range]", planes: NDArray[np.float64], first: int
    ) -> NDArray[np.float64]:
        for step in steps:
            if isinstance(step, _Range):
                planes = step.clip(planes, first)
            else:
                planes = self._operators[step].apply(planes, step)
        return planes


def _range(read: ReadPlanes, old: Shape, axis: int | None) -> _Range:
    others = tuple(position for position in range(3) if position != axis)
    lows: list[NDArray[Any]] = []
    highs: list[NDArray[Any]] = []
    for planes in _spans(old):
        part = read(planes)
        lows.append(part.min(axis=others, keepdims=True))
        highs.append(part.max(axis=others, keepdims=True))
    if axis == 0:
        return _Range(axis=axis, low=np.concatenate(lows), high=np.concatenate(highs))
    low, high = np.concatenate(lows).min(0), np.concatenate(highs).max(0)
    return _Range(axis=axis, low=low[None], high=high[None])


def _spans(old: Shape) -> Iterator[slice]:
    step = _planes_at_once(old)
    for start in range(0, old[0], step):
        yield slice(start, min(start + step, old[0]))


def _planes_at_once(old: Shape) -> int:
    return max(1, SOURCE_BYTES // (8 * old[1] * old[2]))
