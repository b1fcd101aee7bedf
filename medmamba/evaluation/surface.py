"""How far two surfaces are apart, in millimetres: HD95 and the normalised surface Dice (NSD).

Definitions of Nikolov et al. 2021 (J Med Internet Res 23:e26151): a surface passes through every
2x2x2 cell whose voxels differ, at the cell's centre, and counts by the area that marching cubes
gives it. So large flat faces weigh as much as they are large, on anisotropic grids too. A single
slice is scored by its contours, with lengths in place of areas.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from medmamba.volume import Box

HD_PERCENTILE = 95.0

Point = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class SurfaceScores:
    """Distances of one label's surfaces.

    Args:
        hd95_mm: 95th percentile Hausdorff distance; infinite if only one mask is empty.
        nsd: share of both surfaces that lies within the tolerance of the other.
    """

    hd95_mm: float
    nsd: float


def score_surfaces(
    reference: NDArray[np.bool_],
    prediction: NDArray[np.bool_],
    *,
    spacing_mm: tuple[float, ...],
    tolerance_mm: float,
) -> SurfaceScores:
    """Compare the surfaces of two masks; both scores are NaN if both masks are empty.

    Args:
        reference: (D, H, W).
        prediction: the same grid.
        spacing_mm: along (D, H, W).
        tolerance_mm: surface points closer than this count as right for the NSD.
    """
    if not reference.any() or not prediction.any():
        both_empty = not reference.any() and not prediction.any()
        undefined = float("nan")
        if both_empty:
            return SurfaceScores(hd95_mm=undefined, nsd=undefined)
        return SurfaceScores(hd95_mm=float("inf"), nsd=0.0)
    if reference.shape[0] == 1:
        reference, prediction, spacing_mm = reference[0], prediction[0], spacing_mm[1:]
    box = tuple(slice(*pair) for pair in union_box(reference, prediction))
    surfaces = [_elements(mask[box], spacing_mm) for mask in (reference, prediction)]
    there = _distances(surfaces[0], surfaces[1], spacing_mm)
    back = _distances(surfaces[1], surfaces[0], spacing_mm)
    return SurfaceScores(
        hd95_mm=max(_percentile(*there), _percentile(*back)),
        nsd=_share_within(there, back, tolerance_mm),
    )


def union_box(*masks: NDArray[np.bool_]) -> Box:
    """Return the smallest box that holds every true voxel of all masks (empty if none)."""
    joined = masks[0]
    for mask in masks[1:]:
        joined = joined | mask
    box = []
    for axis in range(joined.ndim):
        others = tuple(other for other in range(joined.ndim) if other != axis)
        found = np.flatnonzero(joined.any(axis=others))
        box.append((int(found[0]), int(found[-1]) + 1) if found.size else (0, 0))
    return tuple(box)


def _elements(
    mask: NDArray[np.bool_], spacing_mm: tuple[float, ...]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return which cells the surface crosses, and the area in each of them, in cell order."""
    padded = np.pad(mask, 1).astype(np.uint8)
    codes = np.zeros([size - 1 for size in padded.shape], dtype=np.uint8)
    for bit, corner in enumerate(product((0, 1), repeat=mask.ndim)):
        window = tuple(
            slice(offset, offset + size) for offset, size in zip(corner, codes.shape, strict=True)
        )
        codes |= padded[window] << bit
    crossed = (codes != 0) & (codes != 2 ** (2**mask.ndim) - 1)
    return crossed, element_sizes(spacing_mm)[codes[crossed]]


def _distances(
    source: tuple[NDArray[np.bool_], NDArray[np.float64]],
    target: tuple[NDArray[np.bool_], NDArray[np.float64]],
    spacing_mm: tuple[float, ...],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return each source element's distance to the target surface, ascending, and its area."""
    distance = distance_transform_edt(~target[0], sampling=spacing_mm)[source[0]]
    order = np.argsort(distance, kind="stable")
    return distance[order], source[1][order]


def _percentile(distances: NDArray[np.float64], areas: NDArray[np.float64]) -> float:
    share = np.cumsum(areas) / areas.sum()
    index = int(np.searchsorted(share, HD_PERCENTILE / 100))
    return float(distances[min(index, len(distances) - 1)])


def _share_within(
    there: tuple[NDArray[np.float64], NDArray[np.float64]],
    back: tuple[NDArray[np.float64], NDArray[np.float64]],
    tolerance_mm: float,
) -> float:
    near = sum(float(areas[distances <= tolerance_mm].sum()) for distances, areas in (there, back))
    return near / float(there[1].sum() + back[1].sum())


@lru_cache(maxsize=32)
def element_sizes(spacing_mm: tuple[float, ...]) -> NDArray[np.float64]:
    """Return the area (length in 2D) of the surface in a cell, by the code of its corners.

    Bit i of a code tells whether the i-th corner, last axis fastest, is inside. The surface joins
    the middles of crossed edges (Lorensen and Cline 1987); a code and its complement share it.
    """
    dimension = len(spacing_mm)
    count = 2**dimension
    spacing = np.array(spacing_mm)
    sizes = np.zeros(2**count)
    for code in range(1, 2**count - 1):
        inside = code if code.bit_count() <= count // 2 else 2**count - 1 - code
        segments = _cell_segments(inside, dimension)
        if dimension == 2:
            sizes[code] = sum(
                float(np.linalg.norm((np.array(start) - stop) * spacing))
                for start, stop in segments
            )
        else:
            sizes[code] = sum(_polygon_area(loop, spacing) for loop in _loops(segments))
    sizes.setflags(write=False)
    return sizes


def _cell_segments(code: int, dimension: int) -> list[tuple[Point, Point]]:
    """Lines in which the surface cuts the faces of a cell (of the one face of a 2D cell)."""
    corners = list(product((0, 1), repeat=dimension))
    inside = {corner: bool(code >> bit & 1) for bit, corner in enumerate(corners)}
    segments: list[tuple[Point, Point]] = []
    for axis, side in [(0, 0)] if dimension == 2 else product(range(3), (0, 1)):
        ring = [list(corner) for corner in ((0, 0), (0, 1), (1, 1), (1, 0))]
        if dimension == 3:
            for corner in ring:
                corner.insert(axis, side)
        segments += _face_segments([tuple(corner) for corner in ring], inside)
    return segments


def _face_segments(
    ring: list[tuple[int, ...]], inside: dict[tuple[int, ...], bool]
) -> list[tuple[Point, Point]]:
    """Cut one face, given by its corners in ring order; diagonal corners are cut off singly."""
    middles = [
        tuple((a + b) / 2 for a, b in zip(ring[i], ring[(i + 1) % 4], strict=True))
        for i in range(4)
    ]
    crossed = [i for i in range(4) if inside[ring[i]] != inside[ring[(i + 1) % 4]]]
    if len(crossed) == 4:
        return [(middles[i - 1], middles[i]) for i in range(4) if inside[ring[i]]]
    return [(middles[crossed[0]], middles[crossed[1]])] if crossed else []


def _loops(segments: list[tuple[Point, Point]]) -> list[NDArray[np.float64]]:
    """Join segments end to end into closed polygons."""
    neighbours: dict[Point, list[Point]] = {}
    for start, stop in segments:
        neighbours.setdefault(start, []).append(stop)
        neighbours.setdefault(stop, []).append(start)
    loops = []
    while neighbours:
        point = next(iter(neighbours))
        loop = []
        while point in neighbours:
            loop.append(point)
            ahead = [other for other in neighbours.pop(point) if other in neighbours]
            point = ahead[0] if ahead else point
        loops.append(np.array(loop))
    return loops


def _polygon_area(loop: NDArray[np.float64], spacing: NDArray[np.float64]) -> float:
    """Area of the triangle fan whose apex makes it largest on the unit cell (as in Nikolov)."""
    fans = [np.roll(loop, -apex, axis=0) for apex in range(len(loop))]
    unit = [_fan_area(fan) for fan in fans]
    return _fan_area(fans[int(np.argmax(np.round(unit, 9)))] * spacing)


def _fan_area(fan: NDArray[np.float64]) -> float:
    edges = fan[1:] - fan[0]
    return float(np.linalg.norm(np.cross(edges[:-1], edges[1:]), axis=1).sum() / 2)
