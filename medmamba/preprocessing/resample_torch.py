"""Resampling in PyTorch, on any device: the splines of ``resample`` and nnU-Net's linear resampler.

Splines are products with the same matrices in float64, and label scores are summed in the same
order, so a GPU gives the CPU's numbers (1e-12 before rounding to float32) and the same labels.
nnU-Net's ``resample_torch_fornnunet`` is linear interpolation in float32 with label scores rounded
to float16; its plans name it, and then this is what runs, wherever it runs.

Shapes: images (C, D, H, W), labels (D, H, W).
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from medmamba.preprocessing.recipe import ResamplingRecipe
from medmamba.preprocessing.resample_axis import linear_taps, nearest_indices, spline_matrix

Shape = tuple[int, ...]

SCORE_SCALE = 1000.0
CERTAIN = 700.0
"""nnU-Net's linear label scores: float16 of a thousandth, decided at once above 0.7."""

MIXED_VOXELS_AT_ONCE = 1 << 22


def resample_image_on(
    device: torch.device,
    image: NDArray[np.floating],
    shape: Shape,
    recipe: ResamplingRecipe,
    axis: int | None,
) -> NDArray[np.float32]:
    """Resample every channel as ``resample.resample_image`` does."""
    result = np.empty((image.shape[0], *shape), dtype=np.float32)
    for channel, values in enumerate(image):
        source = torch.from_numpy(np.ascontiguousarray(values)).to(device)
        if recipe.method == "torch":
            made = interpolate(source[None].float(), shape, axis)[0]
        elif axis is None:
            made = _spline(source, shape, recipe.order)
        else:
            made = _spline_by_slices(source, shape, recipe, axis)
        result[channel] = made.float().cpu().numpy()
    return result


def resample_labels_on(
    device: torch.device,
    labels: NDArray[np.int16],
    shape: Shape,
    recipe: ResamplingRecipe,
    axis: int | None,
) -> NDArray[np.int16]:
    """Resample a label map as ``resample.resample_labels`` does, order 1 or nnU-Net's linear."""
    source = torch.from_numpy(np.ascontiguousarray(labels)).to(device)
    in_plane = shape if axis is None else _replaced(shape, axis, labels.shape[axis])
    if recipe.method == "torch":
        made = _vote_interpolated(source, in_plane, axis)
    else:
        made = _vote_linear(source, in_plane)
    if axis is not None:
        made = made.index_select(axis, _indices(labels.shape[axis], shape[axis], device))
    return made.cpu().numpy()


def interpolate(volumes: Tensor, shape: Shape, axis: int | None) -> Tensor:
    """Interpolate (C, D, H, W) linearly; along ``axis``, if there is one, take the nearest."""
    if tuple(volumes.shape[1:]) == tuple(shape):
        return volumes
    if axis is None:
        return functional.interpolate(volumes[None], shape, mode="trilinear")[0]
    slices = volumes.movedim(axis + 1, 1)
    channels, count = slices.shape[:2]
    plane = [size for position, size in enumerate(shape) if position != axis]
    if list(slices.shape[2:]) != plane:
        flat = slices.reshape(1, channels * count, *slices.shape[2:])
        flat = functional.interpolate(flat, plane, mode="bilinear")
        slices = flat.reshape(channels, count, *plane)
    if count != shape[axis]:
        slices = slices.index_select(1, _indices(count, shape[axis], volumes.device))
    return slices.movedim(1, axis + 1)


def _spline(values: Tensor, shape: Shape, order: int) -> Tensor:
    result = _along(values.double(), shape, order, axes=(0, 1, 2))
    return result.clamp_(values.min().double(), values.max().double())


def _spline_by_slices(values: Tensor, shape: Shape, recipe: ResamplingRecipe, axis: int) -> Tensor:
    in_plane = tuple(other for other in range(3) if other != axis)
    low = values.amin(dim=in_plane, keepdim=True).double()
    high = values.amax(dim=in_plane, keepdim=True).double()
    result = _along(values.double(), shape, recipe.order, axes=in_plane)
    result = torch.minimum(torch.maximum(result, low), high)
    if shape[axis] == result.shape[axis]:
        return result
    if recipe.order_z == 0:
        nearest = _indices(result.shape[axis], shape[axis], values.device)
        return result.index_select(axis, nearest)
    return _along(result, shape, recipe.order_z, axes=(axis,))


def _along(values: Tensor, shape: Shape, order: int, *, axes: Sequence[int]) -> Tensor:
    # Axes that shrink go first, so that later products are smaller.
    for axis in sorted(axes, key=lambda axis: shape[axis] / values.shape[axis]):
        old, new = values.shape[axis], shape[axis]
        if old != new:
            matrix = torch.tensor(spline_matrix(old, new, order), device=values.device)
            values = torch.tensordot(values, matrix, dims=([axis], [1])).movedim(-1, axis)
    return values


def _vote_linear(labels: Tensor, shape: Shape) -> Tensor:
    """Vote with the eight neighbours, where they differ (see ``resample``)."""
    if tuple(labels.shape) == tuple(shape):
        return labels
    device = labels.device
    taps = [
        tuple(torch.from_numpy(part).to(device) for part in linear_taps(old, new))
        for old, new in zip(labels.shape, shape, strict=True)
    ]
    lowest, highest = labels, labels
    for axis, (low, high, _) in enumerate(taps):
        below, above = lowest.index_select(axis, low), lowest.index_select(axis, high)
        lowest = torch.minimum(below, above)
        below, above = highest.index_select(axis, low), highest.index_select(axis, high)
        highest = torch.maximum(below, above)
    nearest = [_indices(o, n, device) for o, n in zip(labels.shape, shape, strict=True)]
    result = lowest.contiguous()
    flat = result.view(-1)
    mixed = torch.nonzero((lowest != highest).view(-1))[:, 0]
    for part in torch.split(mixed, MIXED_VOXELS_AT_ONCE):
        where = torch.unravel_index(part, tuple(shape))
        flat[part] = _vote_at(labels, taps, nearest, where)
    return result


def _vote_at(
    labels: Tensor,
    taps: Sequence[tuple[Tensor, ...]],
    nearest: Sequence[Tensor],
    where: tuple[Tensor, ...],
) -> Tensor:
    neighbours, weights = [], []
    # The same order of taps, factors and sums as on the CPU, so that ties are the same.
    for corner in product((0, 1), repeat=3):
        index, weight = [], torch.ones(len(where[0]), dtype=torch.float64, device=labels.device)
        for (low, high, second), position, side in zip(taps, where, corner, strict=True):
            index.append((high if side else low)[position])
            fraction = second[position]
            weight = weight * (fraction if side else 1.0 - fraction)
        neighbours.append(labels[tuple(index)])
        weights.append(weight)
    own = labels[tuple(axis[position] for axis, position in zip(nearest, where, strict=True))]
    best = torch.full_like(weights[0], -torch.inf)
    winner = torch.zeros_like(own)
    for label in torch.unique(torch.stack(neighbours)):
        score = torch.zeros_like(best)
        for neighbour, weight in zip(neighbours, weights, strict=True):
            score = score + torch.where(neighbour == label, weight, 0.0)
        wins = (score > best) | ((score == best) & (own == label))
        best = torch.where(wins, score, best)
        winner = torch.where(wins, label, winner)
    return winner


def _vote_interpolated(labels: Tensor, shape: Shape, axis: int | None) -> Tensor:
    """Vote as nnU-Net's linear resampler: a score above 0.7 decides, else the first largest."""
    if tuple(labels.shape) == tuple(shape):
        return labels
    values = torch.unique(labels)
    best = torch.full(shape, -torch.inf, dtype=torch.float16, device=labels.device)
    winner = torch.zeros(shape, dtype=labels.dtype, device=labels.device)
    decided = torch.zeros(shape, dtype=torch.bool, device=labels.device)
    for value in values:
        indicator = (labels == value).float()[None] * SCORE_SCALE
        score = interpolate(indicator, shape, axis)[0].half()
        certain = score > CERTAIN
        wins = certain | (~decided & (score > best))
        best = torch.where(wins, score, best)
        winner = torch.where(wins, value, winner)
        decided |= certain
    return winner


def _indices(old: int, new: int, device: torch.device) -> Tensor:
    return torch.from_numpy(nearest_indices(old, new)).to(device)


def _replaced(shape: Shape, axis: int, size: int) -> Shape:
    return tuple(size if position == axis else edge for position, edge in enumerate(shape))
