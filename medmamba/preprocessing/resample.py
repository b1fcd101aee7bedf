"""Resampling between grids of different spacing, equal to nnU-Net's to rounding.

Splines on the half-pixel grid are separable, so each axis is one banded matrix and the work is
matrix products: equal to ``scipy.ndimage.zoom(grid_mode=True, mode="nearest")``, on which
nnU-Net's ``skimage.transform.resize`` rests, within 1e-12, at a fraction of its time.
Label maps are resampled by scores per label, computed only where a neighbourhood is mixed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medmamba.errors import PlanError
from medmamba.preprocessing.recipe import ResamplingRecipe

ANISOTROPY_THRESHOLD = 3.0
"""Ratio of spacings above which nnU-Net resamples the coarse axis separately."""

PADDING = 12
"""Edge padding of scipy's zoom before the spline prefilter."""

BAND_FLOOR = 1e-14
"""Spline weights below this do not change a float64 sum."""

ROWS_PER_PRODUCT = 32

Real = TypeVar("Real", np.float32, np.float64)
Shape = tuple[int, ...]
Spacing = tuple[float, ...]


def resampled_shape(shape: Shape, spacing_mm: Spacing, new_spacing_mm: Spacing) -> Shape:
    """Return the voxels per axis that cover the same extent at another spacing."""
    return tuple(
        round(old / new * size)
        for size, old, new in zip(shape, spacing_mm, new_spacing_mm, strict=True)
    )


def separate_axis(
    spacing_mm: Spacing, new_spacing_mm: Spacing, force: bool | None = None
) -> int | None:
    """Choose the axis that is resampled on its own, because slices are far apart.

    Args:
        spacing_mm: of the array as it is.
        new_spacing_mm: of the array to be.
        force: True always separates the coarsest current axis, False never separates.

    Returns:
        The axis, or None if there is none or if several are equally coarse.
    """
    if force is False:
        return None
    if force or _is_anisotropic(spacing_mm):
        chosen = spacing_mm
    elif _is_anisotropic(new_spacing_mm):
        chosen = new_spacing_mm
    else:
        return None
    coarsest = [axis for axis, value in enumerate(chosen) if value == max(chosen)]
    return coarsest[0] if len(coarsest) == 1 else None


def resample_image(
    image: NDArray[np.floating],
    shape: Shape,
    recipe: ResamplingRecipe,
    axis: int | None = None,
    *,
    device: str | None = None,
) -> NDArray[np.float32]:
    """Resample every channel by splines, clipped to the range of what it was made from.

    Args:
        image: (C, D, H, W).
        shape: the new (D, H, W).
        recipe: method and orders.
        axis: a spatial axis to resample separately, or None (see `separate_axis`).
        device: PyTorch device to compute on, with the same numbers; NumPy on the CPU when None.

    Raises:
        PlanError: the recipe names a method that does not exist.
    """
    if image.shape[1:] == shape or _keeps_shape(recipe):
        return image.astype(np.float32, copy=False)
    if device is not None or recipe.method == "torch":
        import torch

        from medmamba.preprocessing.resample_torch import resample_image_on

        return resample_image_on(torch.device(device or "cpu"), image, shape, recipe, axis)
    result = np.empty((image.shape[0], *shape), dtype=np.float32)
    for channel, values in enumerate(image):
        if axis is None:
            result[channel] = _resample_clipped(values, shape, recipe.order, axes=(0, 1, 2))
        else:
            result[channel] = _resample_by_slices(values, shape, recipe, axis)
    return result


def resample_labels(
    labels: NDArray[np.int16],
    shape: Shape,
    recipe: ResamplingRecipe,
    axis: int | None = None,
    *,
    device: str | None = None,
) -> NDArray[np.int16]:
    """Resample a label map: the label with the largest interpolated indicator wins.

    Exact ties go to the nearest voxel's label if it is among the tied, else to the smallest tied
    label (the rule of batchgenerators 0.25.5). Along a separate axis of an order above 0, nnU-Net
    instead writes every label, ascending, where its indicator exceeds one half.

    Args:
        labels: (D, H, W).
        shape: the new (D, H, W).
        recipe: method and orders.
        axis: a spatial axis to resample separately by its own order, or None.
        device: PyTorch device to compute on, with the same labels; linear votes only, which is
            what plans ask for. NumPy on the CPU when None.
    """
    if labels.shape == shape or _keeps_shape(recipe):
        return labels
    is_linear = recipe.order == 1 and (axis is None or recipe.order_z == 0)
    if recipe.method == "torch" or (device is not None and is_linear):
        import torch

        from medmamba.preprocessing.resample_torch import resample_labels_on

        return resample_labels_on(torch.device(device or "cpu"), labels, shape, recipe, axis)
    if axis is not None and recipe.order_z == 0:
        labels = np.take(labels, nearest_indices(labels.shape[axis], shape[axis]), axis=axis)
        return _vote(labels, shape, recipe.order)
    if axis is not None:
        between = tuple(
            old if position == axis else new
            for position, (old, new) in enumerate(zip(labels.shape, shape, strict=True))
        )
        labels = _vote(labels, between, recipe.order)
        return _overwrite_along(labels, shape[axis], axis, recipe.order_z)
    return _vote(labels, shape, recipe.order)


@dataclass(frozen=True, eq=False)
class AxisOperator:
    """One axis of a spline resampling as row blocks of a banded matrix.

    Args:
        blocks: (first row, first source index, matrix) of each block.
    """

    size: int
    blocks: tuple[tuple[int, int, NDArray[np.floating]], ...]

    def apply(self, array: NDArray[Real], axis: int) -> NDArray[Real]:
        """Resample one axis of a three-dimensional array."""
        shape = list(array.shape)
        shape[axis] = self.size
        result = np.empty(shape, dtype=array.dtype)
        for row, source, matrix in self.blocks:
            rows = slice(row, row + matrix.shape[0])
            columns = slice(source, source + matrix.shape[1])
            _product(array, result, matrix, rows=rows, columns=columns, axis=axis)
        return result


def spline_operator(
    old: int, new: int, order: int, dtype: type[np.floating] = np.float64
) -> AxisOperator:
    """Build the operator that takes ``old`` samples to ``new`` along one axis."""
    return _banded(spline_matrix(old, new, order), dtype)


def partial_operator(
    old: int, new: int, order: int, rows: slice, dtype: type[np.floating]
) -> tuple[AxisOperator, slice]:
    """Build the operator for some of the new samples, and say which old ones it reads."""
    matrix = spline_matrix(old, new, order)[rows]
    used = np.flatnonzero((np.abs(matrix) > BAND_FLOOR).any(axis=0))
    source = slice(int(used[0]), int(used[-1]) + 1)
    return _banded(matrix[:, source], dtype), source


def _banded(matrix: NDArray[np.float64], dtype: type[np.floating]) -> AxisOperator:
    blocks = []
    for row in range(0, len(matrix), ROWS_PER_PRODUCT):
        rows = matrix[row : row + ROWS_PER_PRODUCT]
        used = np.flatnonzero((np.abs(rows) > BAND_FLOOR).any(axis=0))
        first, last = int(used[0]), int(used[-1]) + 1
        blocks.append((row, first, np.ascontiguousarray(rows[:, first:last], dtype=dtype)))
    return AxisOperator(len(matrix), tuple(blocks))


def nearest_indices(old: int, new: int) -> NDArray[np.intp]:
    """Return the source index of each new sample on the half-pixel grid."""
    nearest = np.floor(_source_coordinates(old, new) + 0.5).astype(np.intp)
    return np.clip(nearest, 0, old - 1)


def _product(
    array: NDArray[Real],
    result: NDArray[Real],
    matrix: NDArray[np.floating],
    *,
    rows: slice,
    columns: slice,
    axis: int,
) -> None:
    if axis == 0:
        flat = array.reshape(array.shape[0], -1)
        np.matmul(matrix, flat[columns], out=result.reshape(result.shape[0], -1)[rows])
    elif axis == 1:
        np.matmul(matrix, array[:, columns], out=result[:, rows])
    else:
        result[:, :, rows] = np.matmul(array[:, :, columns], matrix.T)


def spline_matrix(old: int, new: int, order: int) -> NDArray[np.float64]:
    """Return the (new, old) matrix of a spline resampling along one axis.

    Raises:
        PlanError: an order without a spline here.
    """
    coordinates = _source_coordinates(old, new)
    rows = np.arange(new)
    matrix = np.zeros((new, old))
    if order == 0:
        matrix[rows, nearest_indices(old, new)] = 1.0
    elif order == 1:
        low, high, weight = linear_taps(old, new)
        np.add.at(matrix, (rows, low), 1.0 - weight)
        np.add.at(matrix, (rows, high), weight)
    elif order == 3:
        padded = np.pad(np.eye(old), ((PADDING, PADDING), (0, 0)), mode="edge")
        coefficients = ndimage.spline_filter1d(padded, order=3, axis=0, mode="nearest")
        start = np.floor(coordinates).astype(np.intp)
        for tap, weight in enumerate(_cubic_weights(coordinates - start)):
            matrix += weight[:, None] * coefficients[start - 1 + tap + PADDING]
    else:
        raise PlanError(f"resampling order {order}: 0, 1 or 3 is needed. Change it in the plan.")
    return matrix


def linear_taps(
    old: int, new: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """Return both source indices of linear interpolation and the weight of the second."""
    coordinates = np.clip(_source_coordinates(old, new), 0.0, old - 1.0)
    low = np.floor(coordinates).astype(np.intp)
    return low, np.minimum(low + 1, old - 1), coordinates - low


def _source_coordinates(old: int, new: int) -> NDArray[np.float64]:
    centres = np.arange(new, dtype=np.float64) + 0.5
    return np.asarray(centres * (old / new) - 0.5)


def _cubic_weights(t: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Weights of the four cubic B-spline coefficients around a point, t in [0, 1)."""
    rest = 1.0 - t
    return (
        rest**3 / 6.0,
        (4.0 - 6.0 * t**2 + 3.0 * t**3) / 6.0,
        (4.0 - 6.0 * rest**2 + 3.0 * rest**3) / 6.0,
        t**3 / 6.0,
    )


def _resample_clipped(
    values: NDArray[np.floating], shape: Shape, order: int, axes: tuple[int, ...]
) -> NDArray[np.float64]:
    low, high = values.min(), values.max()
    result = values.astype(np.float64)
    # Axes that shrink go first, so that later products are smaller.
    for axis in sorted(axes, key=lambda axis: shape[axis] / values.shape[axis]):
        if shape[axis] != result.shape[axis]:
            result = spline_operator(result.shape[axis], shape[axis], order).apply(result, axis)
    return np.clip(result, low, high, out=result)


def _resample_by_slices(
    values: NDArray[np.floating], shape: Shape, recipe: ResamplingRecipe, axis: int
) -> NDArray[np.float64]:
    in_plane = tuple(other for other in range(3) if other != axis)
    low = values.min(axis=in_plane, keepdims=True)
    high = values.max(axis=in_plane, keepdims=True)
    result = values.astype(np.float64)
    for other in in_plane:
        if shape[other] != result.shape[other]:
            operator = spline_operator(result.shape[other], shape[other], recipe.order)
            result = operator.apply(result, other)
    np.clip(result, low, high, out=result)
    if shape[axis] == result.shape[axis]:
        return result
    if recipe.order_z == 0:
        return np.take(result, nearest_indices(result.shape[axis], shape[axis]), axis=axis)
    return spline_operator(result.shape[axis], shape[axis], recipe.order_z).apply(result, axis)


def _vote(labels: NDArray[np.int16], shape: Shape, order: int) -> NDArray[np.int16]:
    if labels.shape == shape:
        return labels
    if order == 0:
        nearest = [nearest_indices(o, n) for o, n in zip(labels.shape, shape, strict=True)]
        return labels[np.ix_(*nearest)]
    if order == 1:
        return _vote_linear(labels, shape)
    return _vote_spline(labels, shape, order)


def _vote_linear(labels: NDArray[np.int16], shape: Shape) -> NDArray[np.int16]:
    """Vote with the eight neighbours; a uniform neighbourhood needs no arithmetic."""
    taps = [linear_taps(old, new) for old, new in zip(labels.shape, shape, strict=True)]
    lowest, highest = labels, labels
    for axis, (low, high, _) in enumerate(taps):
        lowest = np.minimum(np.take(lowest, low, axis), np.take(lowest, high, axis))
        highest = np.maximum(np.take(highest, low, axis), np.take(highest, high, axis))
    for part in _chunks(np.flatnonzero(lowest != highest)):
        where = np.unravel_index(part, shape)
        lowest.reshape(-1)[part] = _vote_at(labels, shape, taps, where)
    return lowest


MIXED_VOXELS_AT_ONCE = 1 << 20


def _chunks(indices: NDArray[np.intp]) -> Iterator[NDArray[np.intp]]:
    for start in range(0, indices.size, MIXED_VOXELS_AT_ONCE):
        yield indices[start : start + MIXED_VOXELS_AT_ONCE]


def _vote_at(
    labels: NDArray[np.int16],
    shape: Shape,
    taps: list[tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]],
    where: tuple[NDArray[np.intp], ...],
) -> NDArray[np.int16]:
    neighbours, weights = [], []
    # The order of taps and of factors is scipy's, so that ties are the same to the last bit.
    for corner in np.ndindex(2, 2, 2):
        index, weight = [], np.ones(where[0].size)
        for (low, high, second), position, side in zip(taps, where, corner, strict=True):
            index.append((high if side else low)[position])
            fraction = second[position]
            weight = weight * (fraction if side else 1.0 - fraction)
        neighbours.append(labels[tuple(index)])
        weights.append(weight)
    nearest = labels[
        tuple(
            nearest_indices(old, new)[position]
            for old, new, position in zip(labels.shape, shape, where, strict=True)
        )
    ]
    scores = _Scores(nearest)
    for label in np.unique(np.stack(neighbours)):
        score = np.zeros(nearest.size)
        for neighbour, weight in zip(neighbours, weights, strict=True):
            score += np.where(neighbour == label, weight, 0.0)
        scores.add(label, score)
    return scores.winner


def _vote_spline(labels: NDArray[np.int16], shape: Shape, order: int) -> NDArray[np.int16]:
    scores = _Scores(_vote(labels, shape, 0))
    for label in np.unique(labels):
        indicator = (labels == label).astype(np.float64)
        scores.add(label, _resample_clipped(indicator, shape, order, axes=(0, 1, 2)))
    return scores.winner


def _overwrite_along(
    labels: NDArray[np.int16], size: int, axis: int, order: int
) -> NDArray[np.int16]:
    if labels.shape[axis] == size:
        return labels
    operator = spline_operator(labels.shape[axis], size, order)
    shape = tuple(size if other == axis else edge for other, edge in enumerate(labels.shape))
    result = np.zeros(shape, dtype=labels.dtype)
    for label in np.unique(labels):
        result[operator.apply((labels == label).astype(np.float64), axis) > 0.5] = label
    return result


class _Scores:
    """Running winner over labels given in ascending order, with the tie rule."""

    def __init__(self, nearest: NDArray[np.int16]) -> None:
        self.nearest = nearest
        self.best = np.full(nearest.shape, -np.inf)
        self.winner = np.zeros_like(nearest)

    def add(self, label: np.int16, score: NDArray[np.float64]) -> None:
        wins = (score > self.best) | ((score == self.best) & (self.nearest == label))
        self.best[wins] = score[wins]
        self.winner[wins] = label


def _is_anisotropic(spacing_mm: Spacing) -> bool:
    return max(spacing_mm) / min(spacing_mm) > ANISOTROPY_THRESHOLD


def _keeps_shape(recipe: ResamplingRecipe) -> bool:
    if recipe.method not in ("spline", "torch", "none"):
        raise PlanError(
            f"resampling method '{recipe.method}': spline, torch or none is needed. "
            "Change it in the plan."
        )
    return recipe.method == "none"
