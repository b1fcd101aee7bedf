"""Where tiles lie in an image and how much each of their voxels counts. No torch.

The rules are nnU-Net's (Isensee et al. 2021, supplementary note on inference): half-overlapping
tiles, evenly spread, weighted by a Gaussian.
"""

from functools import lru_cache
from itertools import chain, combinations, product
from math import ceil

import numpy as np
from numpy.typing import NDArray

SIGMA_PER_PATCH = 1 / 8
"""Standard deviation of the importance map, in patch edges."""

IMPORTANCE_PEAK = 10.0
"""Largest importance; far above 1 so that fp16 resolves the corners."""

TRUNCATE_SIGMAS = 4.0
"""The Gaussian is cut off at this many standard deviations (scipy's default)."""


def tile_starts(size: int, patch: int, step: float) -> tuple[int, ...]:
    """Return the first index of every tile along one axis.

    Args:
        size: voxels of the image along the axis, at least ``patch``.
        patch: voxels of a tile.
        step: largest distance of two tiles, in patches.
    """
    if size < patch:
        raise ValueError(f"an axis of {size} voxels must be padded to the patch of {patch} first")
    count = ceil((size - patch) / (patch * step)) + 1
    if count == 1:
        return (0,)
    # Ties round half to even, and depend on this order of operations.
    distance = (size - patch) / (count - 1)
    return tuple(round(distance * index) for index in range(count))


def tile_origins(
    shape: tuple[int, ...], patch_size: tuple[int, ...], step: float
) -> tuple[tuple[int, ...], ...]:
    """Return the origins of all tiles, first axis slowest.

    A patch of one axis less than ``shape`` is a 2D network's: each slice of the first axis is
    tiled by itself, and origins still have one index per axis of ``shape``.
    """
    extra = len(shape) - len(patch_size)
    leading = [tuple(range(size)) for size in shape[:extra]]
    tiled = [
        tile_starts(size, patch, step)
        for size, patch in zip(shape[extra:], patch_size, strict=True)
    ]
    return tuple(product(*leading, *tiled))


@lru_cache(maxsize=8)
def importance_map(patch_size: tuple[int, ...]) -> NDArray[np.float16]:
    """Return the weight of every voxel of a tile: a Gaussian around the voxel ``patch // 2``.

    Values are fp16, and nowhere zero, so that any sum of them can be divided by.
    """
    lines = [_gaussian_line(size) for size in patch_size]
    weights = lines[0]
    for line in lines[1:]:
        weights = weights[..., None] * line
    weights = weights / (weights.max() / IMPORTANCE_PEAK)
    rounded: NDArray[np.float16] = weights.astype(np.float16)
    rounded[rounded == 0] = rounded[rounded > 0].min()
    rounded.setflags(write=False)
    return rounded


def padding_to(shape: tuple[int, ...], patch_size: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Return (before, after) per axis that centres ``shape`` in a patch, odd voxel at the end."""
    extra = len(shape) - len(patch_size)
    missing = [0] * extra + [
        max(0, patch - size) for size, patch in zip(shape[extra:], patch_size, strict=True)
    ]
    return tuple((count // 2, count - count // 2) for count in missing)


def flip_sets(mirror_axes: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return every subset of the axes, the empty one first, small ones before large ones."""
    sizes = range(len(mirror_axes) + 1)
    return tuple(chain.from_iterable(combinations(mirror_axes, size) for size in sizes))


def _gaussian_line(size: int) -> NDArray[np.float64]:
    """A sampled, truncated Gaussian of unit sum, as scipy's filter applied to a single one."""
    sigma = size * SIGMA_PER_PATCH
    radius = int(TRUNCATE_SIGMAS * sigma + 0.5)
    support = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (support / sigma) ** 2)
    kernel /= kernel.sum()
    line = np.zeros(size)
    offsets = np.arange(size) - size // 2 + radius
    inside = (offsets >= 0) & (offsets < kernel.size)
    line[inside] = kernel[offsets[inside]]
    return line
