"""Where a patch comes from: the box to read for it, and rotation and scaling in one resampling.

Legend: C channels, P patch size, N size of the box that was read. Boxes are half open and may
reach outside the image; outside is data 0 and label -1.
"""

from collections.abc import Sequence
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


def resample(
    data: Tensor,
    labels: Tensor,
    *,
    box: Box,
    inner: Box,
    matrix: NDArray[np.float64],
    in_plane: bool,
) -> tuple[Tensor, Tensor]:
    """Rotate and scale: data linearly, labels by the largest linear score.

    Args:
        data: (C, *N), as read.
        labels: (L, *N), maps that are resampled apart.
        box: what was read.
        inner: box of the patch before the transform, whose centre stays where it is.
        matrix: takes offsets from the patch's centre to offsets in the source.
        in_plane: the first axis is untouched; it is folded into the channels.

    Returns:
        data (C, *P) and labels (L, *P).
    """
    values = [_present_values(one) for one in labels]
    members = [
        (one == value).to(data.dtype)[None]
        for one, found in zip(labels, values, strict=True)
        for value in found
    ]
    stacked = torch.cat([data, *members])
    if in_plane:
        folded = _sample(
            stacked.flatten(0, 1), _theta(box[1:], inner[1:], matrix[1:, 1:]), _size(inner[1:])
        )
        sampled = folded.reshape(*stacked.shape[:2], *folded.shape[1:])
    else:
        sampled = _sample(stacked, _theta(box, inner, matrix), _size(inner))
    sizes = [data.shape[0], *(len(found) for found in values)]
    moved, *scores = torch.split(sampled, sizes)
    picked = [
        _pick_labels(score, found, labels.dtype)
        for score, found in zip(scores, values, strict=True)
    ]
    return moved, torch.cat(picked)


def _present_values(labels: Tensor) -> list[int]:
    # Only labels that occur are sampled; counting is much faster than sorting for torch.unique.
    present = torch.bincount(labels.flatten().long() - OUTSIDE).nonzero().flatten() + OUTSIDE
    return [value for value in present.tolist() if value != OUTSIDE]


def _pick_labels(scores: Tensor, values: list[int], dtype: torch.dtype) -> Tensor:
    # Weights of linear sampling sum to 1, so what no label claims is the share of the outside.
    # A running maximum, because argmax along the slowest axis is slow on CPUs.
    best = 1 - scores.sum(0)
    labels = torch.full_like(best, OUTSIDE, dtype=dtype)
    for value, score in zip(values, scores, strict=True):
        labels.masked_fill_(score >= best, value)
        best = torch.maximum(best, score)
    return labels[None]


def _size(box: Box) -> list[int]:
    return [stop - start for start, stop in box]


def _theta(box: Box, inner: Box, matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    # Normalised coordinates g of torch: voxel = ((g + 1) * size - 1) / 2, axes reversed.
    read, patch = np.array(_size(box), dtype=np.float64), np.array(_size(inner), dtype=np.float64)
    centre = np.array([(start + stop - 1) / 2 for start, stop in inner])
    offset = centre - np.array([start for start, _ in box])
    linear = matrix * patch[None, :] / read[:, None]
    return np.concatenate([linear[::-1, ::-1], ((2 * offset + 1) / read - 1)[::-1, None]], axis=1)


def _sample(stacked: Tensor, theta: NDArray[np.float64], size: list[int]) -> Tensor:
    matrix = torch.from_numpy(theta).to(stacked)
    grid = matrix[:, -1]
    for axis, count in enumerate(size):
        # Sums of lines: several times faster than torch's affine_grid on CPUs.
        line = (2 * torch.arange(count, device=stacked.device, dtype=stacked.dtype) + 1) / count - 1
        shape = [1] * len(size)
        shape[axis] = count
        grid = grid + line.reshape(*shape, 1) * matrix[:, len(size) - 1 - axis]
    return functional.grid_sample(
        stacked[None], grid[None], mode="bilinear", padding_mode="zeros", align_corners=False
    )[0]
