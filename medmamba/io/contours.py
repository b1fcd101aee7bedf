"""Outlines of a mask, plane by plane: the only door to plastimatch.

plastimatch draws closed curves along the edges of voxels. Programs that read a structure set differ
in what they make of a curve within another, so holes are joined to the curve around them by a
channel of no width ("keyhole"): whichever way such a curve is filled, it gives the mask.
"""

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medmamba.errors import EnvironmentFault
from medmamba.io.dicom_headers import pydicom_module
from medmamba.io.nifti import encode
from medmamba.volume import Geometry

COMMAND = "from plastimatch import plastimatch; plastimatch()"
TIMEOUT_S = 3600

Points = NDArray[np.float64]
"""(n, 2) of column and row, in voxels, whole numbers at their centres; the last joins the first."""


@dataclass(frozen=True, kw_only=True)
class Contour:
    """One closed curve.

    Args:
        plane: index along D.
        points: where it runs.
    """

    plane: int
    points: Points


def draw_contours(mask: NDArray[np.bool_]) -> tuple[Contour, ...]:
    """Outline a mask (D, H, W): one curve per part of a plane, its holes joined to it.

    Raises:
        EnvironmentFault: plastimatch is not installed, or fails.
    """
    if importlib.util.find_spec("plastimatch") is None:
        raise EnvironmentFault(
            "RTSTRUCT: contours are drawn by plastimatch, which is not installed. "
            "Install it with: pip install 'medmamba[rtstruct]'.",
            code="E_DICOM_MISSING",
        )
    if not mask.any():
        return ()
    curves = _outlines(mask)
    return tuple(
        Contour(plane=plane, points=points)
        for plane in range(len(mask))
        for points in join_holes(curve.points for curve in curves if curve.plane == plane)
    )


def _outlines(mask: NDArray[np.bool_]) -> list[Contour]:
    """All curves, those around holes by themselves, in an order that follows from the mask."""
    # A border of one voxel, since a curve needs both sides of an edge.
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1))).astype(np.uint8)
    unit = Geometry.from_matrix(padded.shape, np.diag([-1.0, -1.0, 1.0, 1.0])[:, [2, 1, 0, 3]])
    with tempfile.TemporaryDirectory(prefix="medmamba-") as scratch:
        images, drawn = Path(scratch) / "in", Path(scratch) / "out"
        images.mkdir()
        (images / "mask.nii.gz").write_bytes(encode(padded, unit))
        _run_plastimatch("convert", "--input-prefix", images, "--output-dicom", drawn,
                         "--filenames-without-uids")  # fmt: skip
        [written] = drawn.glob("*.dcm")
        [structure] = pydicom_module().dcmread(written).ROIContourSequence
    found = [np.array(item.ContourData, float).reshape(-1, 3) for item in structure.ContourSequence]
    return [
        Contour(plane=round(points[0, 2]), points=points[:, :2] - 1.0)
        for points in sorted(found, key=lambda points: tuple(points[0][::-1]))
    ]


def _run_plastimatch(*arguments: object) -> None:
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    try:
        done = subprocess.run(  # noqa: S603 a fixed program, paths that were made here
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as problem:
        raise EnvironmentFault(f"RTSTRUCT: plastimatch took over {TIMEOUT_S} s.") from problem
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise EnvironmentFault(
            f"RTSTRUCT: plastimatch ended with code {done.returncode} ({''.join(said)[:200]}). "
            "Try 'plastimatch --version'; free memory or disk space."
        )


def join_holes(curves: Iterable[Points]) -> list[Points]:
    """Join the curves around holes of a plane to the curves around them.

    A curve within an odd number of others is a hole of the innermost of these.
    """
    by_size = sorted(curves, key=lambda points: -abs(_signed_area(points)))
    around = [
        [outer for outer in range(index) if _encloses(by_size[outer], points[0])]
        for index, points in enumerate(by_size)
    ]
    joined = {index: points for index, points in enumerate(by_size) if len(around[index]) % 2 == 0}
    for index, points in enumerate(by_size):
        if index not in joined:
            owner = around[index][-1]
            joined[owner] = _keyhole(joined[owner], points)
    return list(joined.values())


def _keyhole(outer: Points, hole: Points) -> Points:
    """One curve: along ``outer``, through a channel, around ``hole`` the other way, and back.

    The channel runs midway between the centres of voxels, so no centre lies on it.
    """
    from scipy.spatial import cKDTree

    if _signed_area(outer) * _signed_area(hole) > 0:
        hole = hole[::-1]
    distances, nearest = cKDTree(outer).query(hole)
    start = int(np.argmin(distances))
    stop = int(nearest[start])
    here, there = outer[stop], hole[start]
    first, last = np.floor(here) + 0.5, np.floor(there) + 0.5
    channel = np.array([first, (last[0], first[1]), last])
    around = np.concatenate([hole[start:], hole[: start + 1]])
    return np.concatenate([outer[: stop + 1], channel, around, channel[::-1], outer[stop:]])


def _signed_area(points: Points) -> float:
    x, y = points.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def _encloses(points: Points, place: NDArray[np.float64]) -> bool:
    """Whether a ray from ``place`` crosses the curve an odd number of times."""
    x, y = points.T
    next_x, next_y = np.roll(x, -1), np.roll(y, -1)
    crosses = (y > place[1]) != (next_y > place[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        at = x + (place[1] - y) * (next_x - x) / (next_y - y)
    return bool(np.count_nonzero(crosses & (at > place[0])) % 2)
