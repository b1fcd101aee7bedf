"""Where a patch comes from: the box to read for it, and rotation and scaling in one resampling.

All samples of a batch that move are resampled at once, on the device where the batch will be. MONAI
resamples labels by the nearest voxel and not by the largest score, so this is ours.
Legend: B batch, n samples that move, C channels, L label maps, P patch size, N size of a box.
Boxes are half open and may reach outside the image; outside is data 0 and label -1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, pi

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from medmamba.training.draws import Rotations, rotation_matrix
from medmamba.volume import Box

OUTSIDE = -1
"""The label of voxels that are not in the image."""

LOADER_SHRINK = 0.85
"""Scale the loader's margin allows for (nnU-Net; smaller scales see zeros at the corners)."""

LABELS_AT_ONCE = 4
"""Labels whose scores are sampled in one call."""


def loader_patch_size(patch_size: tuple[int, ...], rotations: Rotations | None) -> tuple[int, ...]:
    """Return the region around a patch that rotation and scaling may draw from (nnU-Net's rule).

    Args:
        patch_size: of the network.
        rotations: None when nothing is rotated or scaled.
    """
    if rotations is None:
        return patch_size
    if rotations.in_plane:
        return (patch_size[0], *_rotated_extent(patch_size[1:], rotations.limit))
    return _rotated_extent(patch_size, rotations.limit)


def _rotated_extent(patch_size: tuple[int, ...], limit: float) -> tuple[int, ...]:
    dimension, angle = len(patch_size), min(limit, pi / 2)
    corner = np.array(patch_size, dtype=np.float64)
    extent = corner.copy()
    for about in range(3 if dimension == 3 else 1):
        angles = np.zeros(3 if dimension == 3 else 1)
        # The sign about axis 1 is nnU-Net's; it decides which axis of the corner grows.
        angles[about] = -angle if about == 1 else angle
        turned = np.abs(corner @ rotation_matrix(angles, dimension))
        extent = np.maximum(extent, turned)
    return tuple(int(size) for size in extent / LOADER_SHRINK)


def inner_box(outer_start: Sequence[int], outer: Sequence[int], patch: Sequence[int]) -> Box:
    """Return the box of the patch in the middle of the loader's region."""
    starts = [a + b // 2 - p // 2 for a, b, p in zip(outer_start, outer, patch, strict=True)]
    return tuple((start, start + size) for start, size in zip(starts, patch, strict=True))


def source_box(
    inner: Box, outer_start: Sequence[int], outer: Sequence[int], matrix: NDArray[np.float64]
) -> Box:
    """Return the smallest box that holds all voxels the resampled patch needs.

    It never leaves the loader's region, so that a smaller read changes nothing.
    """
    half = np.abs(matrix) @ np.array([(stop - start - 1) / 2 for start, stop in inner])
    box = []
    for (start, stop), reach, first, size in zip(inner, half, outer_start, outer, strict=True):
        centre = (start + stop - 1) / 2
        low = max(first, floor(centre - reach))
        high = min(first + size, ceil(centre + reach) + 1)
        box.append((low, high))
    return tuple(box)


@dataclass(frozen=True, kw_only=True)
class Region:
    """What was read for one patch.

    Args:
        data, labels: (C, *N) and (L, *N), on the CPU; label maps are resampled apart.
        box: what was read.
        inner: box of the patch before the transform, whose centre stays where it is.
        matrix: takes offsets from the patch's centre to offsets in the source; None where the
            patch is what was read.
    """

    data: Tensor
    labels: Tensor
    box: Box
    inner: Box
    matrix: NDArray[np.float64] | None


def make_patches(
    regions: Sequence[Region], outer: Sequence[int], *, in_plane: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Make the patches of a batch on a device; those that were drawn to move in one resampling.

    Args:
        regions: of the samples.
        outer: size of the loader's region, which every box fits into.
        in_plane: the first axis is untouched; it is folded into the channels.
        device: where the patches will be.

    Returns:
        data (B, C, *P) and labels (B, L, *P).
    """
    moving = [place for place, region in enumerate(regions) if region.matrix is not None]
    still = [place for place, region in enumerate(regions) if region.matrix is None]
    parts = []
    if still:
        parts.append(_stack([regions[place] for place in still], device))
    if moving:
        parts.append(_resample([regions[place] for place in moving], outer, in_plane, device))
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor(still + moving, device=device).argsort()
    data, labels = (torch.cat(both).index_select(0, order) for both in zip(*parts, strict=True))
    return data, labels


def _stack(regions: Sequence[Region], device: torch.device) -> tuple[Tensor, Tensor]:
    data = torch.stack([region.data for region in regions])
    labels = torch.stack([region.labels for region in regions])
    return data.to(device), labels.to(device)


def _resample(
    regions: Sequence[Region], outer: Sequence[int], in_plane: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rotate and scale: data linearly, labels by the largest linear score.

    All are sampled from boxes of one size, with nothing in what was not read. It is always the
    same size, so that a patch does not depend on its neighbours.
    """
    apart = int(in_plane)
    size = _size(regions[0].inner)[apart:]
    grid = _grid([_theta(region, outer, apart) for region in regions], size).to(device)

    def sample(arrays: Sequence[Tensor]) -> Tensor:
        boxes = _spread(arrays, outer)
        folded = boxes.flatten(1, 1 + apart)
        found = functional.grid_sample(
            folded, grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )
        return found.reshape(*boxes.shape[: 2 + apart], *size)

    moved = sample([region.data.to(device) for region in regions])
    maps = [region.labels.to(device) for region in regions]
    picked = [_largest_score(one, sample, moved[:, 0]) for one in zip(*maps, strict=True)]
    return moved, torch.stack(picked, 1)


def _spread(arrays: Sequence[Tensor], outer: Sequence[int]) -> Tensor:
    """Lay arrays (C, *N) into the low corners of boxes (n, C, *outer) of zeros, as float32."""
    shape = (len(arrays), len(arrays[0]), *outer)
    boxes = torch.zeros(shape, dtype=torch.float32, device=arrays[0].device)
    for box, array in zip(boxes, arrays, strict=True):
        box[(slice(None), *(slice(size) for size in array.shape[1:]))] = array
    return boxes


def _largest_score(
    labels: Sequence[Tensor], sample: Callable[[Sequence[Tensor]], Tensor], like: Tensor
) -> Tensor:
    """Sample n labels (*N) and return the winners, shaped as ``like`` (n, *P).

    Weights of linear sampling sum to 1, so what no label claims is the share of the outside.
    A running maximum, because argmax along the slowest axis is slow on CPUs, and few labels at
    once, because each takes as much memory as the image.
    """
    best, claimed = torch.zeros_like(like), torch.zeros_like(like)
    winners = torch.full_like(like, OUTSIDE, dtype=labels[0].dtype)
    values = sorted(set().union(*map(_present_values, labels)))
    for first in range(0, len(values), LABELS_AT_ONCE):
        some = values[first : first + LABELS_AT_ONCE]
        scores = sample([torch.stack([one == value for value in some]) for one in labels])
        for value, score in zip(some, scores.unbind(1), strict=True):
            winners.masked_fill_(score >= best, value)
            best = torch.maximum(best, score)
            claimed += score
    return winners.masked_fill_(best < 1 - claimed, OUTSIDE)


def _present_values(labels: Tensor) -> set[int]:
    # Only labels that occur are sampled; counting is much faster than sorting for torch.unique.
    present = torch.bincount(labels.flatten().int() - OUTSIDE).nonzero().flatten() + OUTSIDE
    return set(present.tolist()) - {OUTSIDE}


def _size(box: Box) -> list[int]:
    return [stop - start for start, stop in box]


def _theta(region: Region, outer: Sequence[int], apart: int) -> NDArray[np.float64]:
    """Matrix (axes, axes + 1) without the first ``apart`` axes, in torch's coordinates g.

    In these voxel = ((g + 1) * size - 1) / 2, and axes are reversed.
    """
    matrix = region.matrix
    assert matrix is not None
    box, inner = region.box[apart:], region.inner[apart:]
    read, patch = np.array(outer[apart:], dtype=np.float64), np.array(_size(inner))
    centre = np.array([(start + stop - 1) / 2 for start, stop in inner])
    offset = centre - np.array([start for start, _ in box])
    linear = matrix[apart:, apart:] * patch[None, :] / read[:, None]
    return np.concatenate([linear[::-1, ::-1], ((2 * offset + 1) / read - 1)[::-1, None]], axis=1)


def _grid(thetas: Sequence[NDArray[np.float64]], size: Sequence[int]) -> Tensor:
    """Where the voxels of patches come from, (n, *size, axes) float32 in torch's coordinates."""
    matrices = torch.from_numpy(np.stack(thetas)).to(torch.float32)
    matrices = matrices.reshape(len(thetas), *[1] * len(size), *matrices.shape[1:])
    grid = matrices[..., -1]
    for axis, count in enumerate(size):
        # Sums of lines: several times faster than torch's affine_grid on CPUs.
        line = (2 * torch.arange(count, dtype=torch.float32) + 1) / count - 1
        shape = [1] * (len(size) + 1)
        shape[axis] = count
        grid = grid + line.reshape(shape) * matrices[..., len(size) - 1 - axis]
    return grid
