"""Cropping to the non-zero region: which voxels were measured, and the box that holds them.

The rule is nnU-Net's: a voxel is outside when every channel is exactly zero there and it is not
enclosed by measured voxels. Outside voxels without a label get the label -1.
"""

import numpy as np
from numpy.typing import NDArray

from medmamba.volume import Box

OUTSIDE = -1
"""Label of voxels outside the non-zero region."""

SLAB_VOXELS = 1 << 24
"""Voxels whose background is labelled at once."""


def nonzero_box(image: NDArray[np.floating]) -> Box:
    """Find the half-open box (D, H, W) of voxels of (C, D, H, W) that differ from zero.

    An image of zeros alone is not cropped.
    """
    shape = image.shape[1:]
    occupied = [np.zeros(size, dtype=bool) for size in shape]
    for plane in range(shape[0]):
        found = (image[:, plane] != 0).any(axis=0)
        occupied[0][plane] = found.any()
        occupied[1] |= found.any(axis=1)
        occupied[2] |= found.any(axis=0)
    if not occupied[0].any():
        return tuple((0, size) for size in shape)
    ends = [np.flatnonzero(line)[[0, -1]].tolist() for line in occupied]
    return tuple((first, last + 1) for first, last in ends)


def nonzero_region(image: NDArray[np.floating]) -> tuple[Box, NDArray[np.bool_]]:
    """Find the bounding box of voxels that differ from zero, and the filled mask inside it.

    An image of zeros alone is not cropped, and all of it is outside.

    Args:
        image: (C, D, H, W).

    Returns:
        The half-open box in (D, H, W), and the mask of the measured region inside the box.
    """
    box = nonzero_box(image)
    inside = image[(slice(None), *box_slices(box))]
    mask = np.empty(inside.shape[1:], dtype=bool)
    for plane in range(len(mask)):
        (inside[:, plane] != 0).any(axis=0, out=mask[plane])
    return box, fill_holes(mask)


def fill_holes(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Add background that is enclosed by foreground (face neighbours connect background).

    Gives what ``scipy.ndimage.binary_fill_holes`` gives, by labelling the background, in slabs so
    that the labels take little memory, instead of growing it voxel by voxel. Works in place.
    """
    from scipy import ndimage  # takes a fifth of a second, and every command comes by this module

    thickness = max(1, SLAB_VOXELS // max(1, mask[0].size))
    slabs = [mask[first : first + thickness] for first in range(0, len(mask), thickness)]
    offset = 0
    open_labels: list[NDArray[np.intp]] = [np.zeros(1, np.intp)]
    touching: list[NDArray[np.intp]] = [np.zeros((0, 2), np.intp)]
    above: NDArray[np.intp] | None = None
    for number, slab in enumerate(slabs):
        components, count = ndimage.label(~slab)
        sides = [components[:, [0, -1]], components[:, :, [0, -1]]]
        sides += [components[0]] if number == 0 else []
        sides += [components[-1]] if number == len(slabs) - 1 else []
        open_labels += [_global(np.unique(side), offset) for side in sides]
        if above is not None:
            pairs = np.stack([above, _global(components[0], offset)], axis=-1).reshape(-1, 2)
            touching.append(np.unique(pairs[(pairs > 0).all(axis=1)], axis=0))
        above = _global(components[-1], offset)
        offset += count
    enclosed = _enclosed(offset, np.concatenate(open_labels), np.concatenate(touching))
    if not enclosed.any():
        return mask
    offset = 0
    for slab in slabs:
        components, count = ndimage.label(~slab)
        inside = np.concatenate([[False], enclosed[offset + 1 : offset + count + 1]])
        slab |= inside[components]
        offset += count
    return mask


def _global(labels: NDArray[np.integer], offset: int) -> NDArray[np.intp]:
    """Labels of one slab as labels of all; 0 stays 0."""
    return np.where(labels > 0, labels.astype(np.intp) + offset, 0)


def _enclosed(
    count: int, open_labels: NDArray[np.intp], touching: NDArray[np.intp]
) -> NDArray[np.bool_]:
    """Which of the labels 0 to ``count`` have no way out, going from slab to slab."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = coo_array((np.ones(len(touching), bool), tuple(touching.T)), (count + 1, count + 1))
    _, group = connected_components(links, directed=False)
    is_open = np.zeros(count + 1, dtype=bool)
    is_open[group[open_labels]] = True
    found: NDArray[np.bool_] = ~is_open[group]
    found[0] = False
    return found


def mark_outside(labels: NDArray[np.int16], mask: NDArray[np.bool_]) -> None:
    """Set unlabelled voxels outside ``mask`` to -1, in place."""
    labels[(labels == 0) & ~mask] = OUTSIDE


def box_slices(box: Box) -> tuple[slice, ...]:
    """Return the index that cuts ``box`` out of the last axes of an array."""
    return tuple(slice(start, stop) for start, stop in box)
