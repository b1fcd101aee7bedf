"""Resampling between grids of different spacing, equal to nnU-Net's to rounding.

Splines on the half-pixel grid are separable, so each axis is one banded matrix
(``resample_axis``) and the work is matrix products, in slabs (``resample_planes``).
Label maps are resampled by scores per label, computed only where a neighbourhood is mixed.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from medmamba.errors import PlanError
from medmamba.preprocessing.recipe import ResamplingRecipe
from medmamba.preprocessing.resample_axis import linear_taps, nearest_indices
from medmamba.preprocessing.resample_planes import ReadPlanes, resample_planes

ANISOTROPY_THRESHOLD = 3.0
"""Ratio of spacings above which nnU-Net resamples the coarse axis separately."""

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
    if image.shape[1:] == shape or keeps_shape(recipe):
        return image.astype(np.float32, copy=False)
    if device is not None or recipe.method == "torch":
        import torch

        from medmamba.preprocessing.resample_torch import resample_image_on

        return resample_image_on(torch.device(device or "cpu"), image, shape, recipe, axis)
    readers = [values.__getitem__ for values in image]
    return resample_channels(readers, image.shape[1:], shape, recipe, axis)


def resample_channels(
    readers: Sequence[ReadPlanes],
    old: Shape,
    shape: Shape,
    recipe: ResamplingRecipe,
    axis: int | None = None,
) -> NDArray[np.float32]:
    """Resample channels that are read a few planes at a time, as `resample_image` does on the CPU.

    Args:
        readers: give the planes of each channel.
        old: shape of a channel.
        shape: the new one.
        recipe: orders; the method is spline.
        axis: a spatial axis to resample separately, or None.
    """
    result = np.empty((len(readers), *shape), dtype=np.float32)
    for read, channel in zip(readers, result, strict=True):
        resample_planes(read, old, recipe, axis, channel)
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
    if labels.shape == shape or keeps_shape(recipe):
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
    recipe = ResamplingRecipe(order=order)
    for label in np.unique(labels):
        indicator = (labels == label).astype(np.float64)
        score = np.empty(shape)
        resample_planes(indicator.__getitem__, labels.shape, recipe, None, score)
        scores.add(label, score)
    return scores.winner


def _overwrite_along(
    labels: NDArray[np.int16], size: int, axis: int, order: int
) -> NDArray[np.int16]:
    """Write every label, ascending, where its spline along one axis exceeds one half.

    Half-way values are common in such indicators, and rounding decides them; so this is scipy's
    spline over all three axes, as nnU-Net calls it, and not the product of ``resample_axis``.
    """
    if labels.shape[axis] == size:
        return labels
    from scipy import ndimage

    shape = tuple(size if other == axis else edge for other, edge in enumerate(labels.shape))
    axes = [
        old / new * (np.arange(new) + 0.5) - 0.5
        for old, new in zip(labels.shape, shape, strict=True)
    ]
    places = np.stack(np.meshgrid(*axes, indexing="ij"))
    result = np.zeros(shape, dtype=labels.dtype)
    for label in np.unique(labels):
        indicator = (labels == label).astype(np.float64)
        score = ndimage.map_coordinates(indicator, places, order=order, mode="nearest")
        result[np.round(score) > 0.5] = label
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


def keeps_shape(recipe: ResamplingRecipe) -> bool:
    """Tell whether a recipe resamples nothing.

    Raises:
        PlanError: it names a method that does not exist.
    """
    if recipe.method not in ("spline", "torch", "none"):
        raise PlanError(
            f"resampling method '{recipe.method}': spline, torch or none is needed. "
            "Change it in the plan."
        )
    return recipe.method == "none"
