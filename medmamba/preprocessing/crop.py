"""Cropping to the non-zero region: which voxels were measured, and the box that holds them.

The rule is nnU-Net's: a voxel is outside when every channel is exactly zero there and it is not
enclosed by measured voxels. Outside voxels without a label get the label -1.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medmamba.volume import Box

OUTSIDE = -1
"""Label of voxels outside the non-zero region."""


def nonzero_region(image: NDArray[np.floating]) -> tuple[Box, NDArray[np.bool_]]:
    """Find the bounding box of voxels that differ from zero, and the filled mask inside it.

    An image of zeros alone is not cropped, and all of it is outside.

    Args:
        image: (C, D, H, W).

    Returns:
        The half-open box in (D, H, W), and the mask of the measured region inside the box.
    """
    mask = np.zeros(image.shape[1:], dtype=bool)
    for channel in image:
        mask |= channel != 0
    box = _bounding_box(mask)
    return box, fill_holes(mask[box_slices(box)])


def fill_holes(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Add background that is enclosed by foreground (face neighbours connect background).

    Gives what ``scipy.ndimage.binary_fill_holes`` gives, by labelling the background once
    instead of growing it voxel by voxel. Works in place where there is something to fill.
    """
    background = ~mask
    if not background.any():
        return mask
    components, _ = ndimage.label(background)
    open_components: set[int] = {0}
    for axis in range(mask.ndim):
        for face in (0, -1):
            open_components.update(np.unique(np.take(components, face, axis=axis)).tolist())
    enclosed = np.ones(int(components.max()) + 1, dtype=bool)
    enclosed[sorted(open_components)] = False
    mask |= enclosed[components]
    return mask


def mark_outside(labels: NDArray[np.int16], mask: NDArray[np.bool_]) -> None:
    """Set unlabelled voxels outside ``mask`` to -1, in place."""
    labels[(labels == 0) & ~mask] = OUTSIDE


def box_slices(box: Box) -> tuple[slice, ...]:
    """Return the index that cuts ``box`` out of the last axes of an array."""
    return tuple(slice(start, stop) for start, stop in box)


def _bounding_box(mask: NDArray[np.bool_]) -> Box:
    box: list[tuple[int, int]] = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        occupied = np.flatnonzero(mask.any(axis=others))
        if occupied.size == 0:
            return tuple((0, size) for size in mask.shape)
        box.append((int(occupied[0]), int(occupied[-1]) + 1))
    return tuple(box)
