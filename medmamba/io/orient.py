"""Which way stored axes point, and turning images by whole axes without touching a value.

A network learns the orientation its training images are stored in; images stored another way are
turned on the way in and their labels turned back on the way out. Exact: only axes swap and flip.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba.errors import UsageError
from medmamba.io.header import SourceHeader
from medmamba.volume import Geometry, Volume

_LETTERS = ("RL", "AP", "SI")
AXES = (0, 1, 2)


def orientation_code(geometry: Geometry) -> str:
    """Where the stored axes (x, y, z) point: one letter each of R/L, A/P, S/I, such as RAS."""
    letters = [_LETTERS[row][0 if positive else 1] for row, positive in _directions(geometry)]
    return "".join(reversed(letters))


def _directions(geometry: Geometry) -> list[tuple[int, bool]]:
    """For each axis (D, H, W): the world axis it follows best, and whether in its direction."""
    columns = geometry.matrix[:3, :3] / np.array(geometry.spacing_mm)
    free, found = [0, 1, 2], [(0, True)] * 3
    # Each world axis goes to one stored axis only, the best aligned first.
    for axis in np.argsort(-np.abs(columns).max(axis=0), kind="stable"):
        row = free[int(np.abs(columns[free, axis]).argmax())]
        free.remove(row)
        found[axis] = (row, bool(columns[row, axis] > 0))
    return found


def turn(volume: Volume, header: SourceHeader, code: str) -> tuple[Volume, SourceHeader]:
    """Swap and flip axes so that they point as ``code`` says; planes are left alone.

    Args:
        volume: image or labels.
        header: of the image; the returned one lets ``write_labels`` turn labels back.
        code: one letter each of R/L, A/P, S/I for the stored axes (x, y, z).

    Raises:
        UsageError: ``code`` is no orientation.
    """
    wanted = _parse(code)
    found = _directions(volume.geometry)
    order = tuple([row for row, _ in found].index(row) for row, _ in wanted)
    flips = tuple(found[axis] != want for axis, want in zip(order, wanted, strict=True))
    if header.dimension == 2 or (order == AXES and not any(flips)):
        return volume, header
    array = volume.array.transpose(0, *(axis + 1 for axis in order))
    turned = np.ascontiguousarray(array[(slice(None), *_slices(flips))])
    geometry = turned_geometry(volume.geometry, order, flips)
    result = Volume(array=turned, geometry=geometry, kind=volume.kind)
    return result, replace(header, axis_order=order, axis_flips=flips)


def turned_geometry(
    geometry: Geometry, order: tuple[int, ...], flips: tuple[bool, ...]
) -> Geometry:
    """Describe the grid after axes were reordered and then flipped."""
    matrix = geometry.matrix[:, [*order, 3]]
    shape = tuple(geometry.shape[axis] for axis in order)
    for axis, flip in enumerate(flips):
        if flip:
            matrix[:3, 3] += matrix[:3, axis] * (shape[axis] - 1)
            matrix[:3, axis] *= -1
    return Geometry.from_matrix(shape, matrix)


def turn_back(array: NDArray[Any], header: SourceHeader) -> NDArray[Any]:
    """Bring an array (D, H, W) from the turned axes back to the stored ones."""
    inverse = np.argsort(header.axis_order)
    return array[_slices(header.axis_flips)].transpose(*inverse)


def box_turned_back(
    box: tuple[slice, ...], array: NDArray[Any], shape: tuple[int, ...], header: SourceHeader
) -> tuple[tuple[slice, ...], NDArray[Any]]:
    """Bring a box (D, H, W) of a turned grid, and what is in it (K, d, h, w), to the stored axes.

    Args:
        box: where the array lies.
        array: with one axis before those of the grid.
        shape: of the turned grid.
        header: of the image.
    """
    placed = [
        slice(size - part.stop, size - part.start) if flip else part
        for part, size, flip in zip(box, shape, header.axis_flips, strict=True)
    ]
    inverse = np.argsort(header.axis_order)
    turned = array[(slice(None), *_slices(header.axis_flips))]
    return tuple(placed[axis] for axis in inverse), turned.transpose(0, *(inverse + 1))


def _slices(flips: tuple[bool, ...]) -> tuple[slice, ...]:
    return tuple(slice(None, None, -1 if flip else None) for flip in flips)


def _parse(code: str) -> list[tuple[int, bool]]:
    """Read a code as directions of the axes (D, H, W)."""
    found = []
    for letter in reversed(code.upper()):
        rows = [row for row, pair in enumerate(_LETTERS) if letter in pair]
        found += [(row, letter == _LETTERS[row][0]) for row in rows]
    if len(code) != 3 or sorted(row for row, _ in found) != [0, 1, 2]:
        raise UsageError(
            f"orientation {code!r}: one letter each of R/L, A/P and S/I is needed, such as RAS."
        )
    return found
