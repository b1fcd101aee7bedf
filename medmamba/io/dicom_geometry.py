"""Where the voxels of a DICOM series are: planes sorted in space, proven parallel and even.

PS3.3 C.7.6.2 gives each plane a position and two directions. The slice axis is the step from one
position to the next, so a tilted gantry shows as a sheared grid and is judged as in any other file.
"""

import numpy as np
from numpy.typing import NDArray

from medmamba.errors import InputError
from medmamba.io.affine import Matrix, judge_shear, judge_spacing, judge_voxels, to_geometry
from medmamba.io.dicom_series import Plane
from medmamba.io.header import Finding, Gate
from medmamba.volume import Geometry

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
SPACING_TOLERANCE = 0.01
"""Slice distances may differ by this part of their median."""
ROUNDING_MM = 0.011
"""Positions are decimal text; scanners that write two digits move each by up to 0.005 mm."""
SAME_POSITION_MM = 1e-3
DIRECTION_TOLERANCE = 1e-3
LISTED_GAPS = 5


def place_planes(
    planes: tuple[Plane, ...], name: str, gate: Gate
) -> tuple[tuple[Plane, ...], Geometry, list[Finding]]:
    """Return the planes in order of space, their grid (D, H, W), and what was noticed.

    Raises:
        InputError: planes are missing, doubled, not parallel, or of different sizes.
    """
    _require_alike(planes, name)
    rows, columns = planes[0].shape
    judge_voxels(len(planes) * rows * columns, name, gate)
    along_row, along_column = _directions(planes[0], name)
    normal = np.cross(along_row, along_column)
    heights = np.array([np.dot(normal, plane.position) for plane in planes])
    order = np.argsort(heights, kind="stable")
    ordered = tuple(planes[index] for index in order)
    step = _slice_step(ordered, heights[order], normal, name)
    matrix: Matrix = np.eye(4)
    matrix[:3, 0] = along_row * planes[0].spacing_mm[1]
    matrix[:3, 1] = along_column * planes[0].spacing_mm[0]
    matrix[:3, 2] = step
    matrix[:3, 3] = ordered[0].position
    judge_spacing(matrix, 3, name, gate)
    findings = judge_shear(matrix, name, gate)
    geometry = to_geometry(LPS_TO_RAS @ matrix, (len(planes), rows, columns), name)
    return ordered, geometry, findings


def _require_alike(planes: tuple[Plane, ...], name: str) -> None:
    first = planes[0]
    axes = np.array([*first.along_row, *first.along_column])
    for plane in planes:
        different = ""
        if plane.shape != first.shape:
            different = f"{plane.shape[0]}x{plane.shape[1]} and {first.shape[0]}x{first.shape[1]}"
        elif not np.allclose(plane.spacing_mm, first.spacing_mm, rtol=1e-3):
            different = "different pixel spacings"
        elif not np.allclose(
            [*plane.along_row, *plane.along_column], axes, atol=DIRECTION_TOLERANCE
        ):
            different = "different orientations"
        if different:
            raise InputError(
                f"{name}: the series mixes images of {different}{_acquisitions(planes)}. "
                "Separate them into folders of their own.",
                code="E_DCM_MIXED",
            )
    if min(first.shape) < 1:
        raise InputError(f"{name}: images have no pixels. Export it again.", code="E_HDR_DIM")
    if min(first.spacing_mm) <= 0:
        raise InputError(
            f"{name}: pixel spacing is {first.spacing_mm[0]:g} and {first.spacing_mm[1]:g} mm; "
            "positive numbers are needed. Export the series again.",
            code="E_GEOM_SPACING",
        )


def _directions(plane: Plane, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    row, column = np.array(plane.along_row), np.array(plane.along_column)
    lengths = np.array([np.linalg.norm(row), np.linalg.norm(column)])
    if np.abs(lengths - 1.0).max() > 0.01 or abs(row @ column) > 0.01:
        raise InputError(
            f"{name}: the directions of its rows and columns (ImageOrientationPatient) are not "
            "two perpendicular unit vectors. Export the series again.",
            code="E_GEOM_SINGULAR",
        )
    row = row / lengths[0]
    # Decimal text is rounded; planes are square by definition.
    column = column - (column @ row) * row
    return row, column / np.linalg.norm(column)


def _slice_step(
    planes: tuple[Plane, ...], heights: NDArray[np.float64], normal: NDArray[np.float64], name: str
) -> NDArray[np.float64]:
    if len(planes) == 1:
        thickness = planes[0].thickness_mm
        if thickness <= 0:
            raise InputError(
                f"{name}: is a single slice without a thickness. Give the whole series.",
                code="E_GEOM_SPACING",
            )
        return normal * thickness
    distances = np.diff(heights)
    if (distances < SAME_POSITION_MM).any():
        doubled = int((distances < SAME_POSITION_MM).sum())
        raise InputError(
            f"{name}: {doubled} of its {len(planes)} images lie where another one already is"
            f"{_acquisitions(planes)}. Separate the acquisitions into folders of their own, or let "
            "`predict --split-acquisitions` make each a case.",
            code="E_DCM_MIXED",
        )
    _require_even(distances, heights, name)
    positions = np.array([plane.position for plane in planes])
    step: NDArray[np.float64] = (positions[-1] - positions[0]) / (len(planes) - 1)
    expected = positions[0] + np.arange(len(planes))[:, None] * step
    off = float(np.abs(positions - expected).max())
    if off > 0.1 * min(*planes[0].spacing_mm, float(np.linalg.norm(step))) + ROUNDING_MM:
        raise InputError(
            f"{name}: its images do not lie on one line; one is {off:.3g} mm beside it. "
            "Export the series again.",
            code="E_DCM_MIXED",
        )
    return step


def _require_even(distances: NDArray[np.float64], heights: NDArray[np.float64], name: str) -> None:
    usual = float(np.median(distances))
    # Where slices are missing at every other place, the median itself would be wrong.
    smallest = float(distances.min())
    if usual - smallest > max(SPACING_TOLERANCE * usual, ROUNDING_MM):
        usual = smallest
    allowed = max(SPACING_TOLERANCE * usual, ROUNDING_MM)
    wide = np.flatnonzero(np.abs(distances - usual) > allowed)
    if not len(wide):
        return
    gaps = [
        f"{heights[at]:.6g} to {heights[at + 1]:.6g} mm{_missing(distances[at] / usual)}"
        for at in wide[:LISTED_GAPS]
    ]
    more = f" and {len(wide) - LISTED_GAPS} more" if len(wide) > LISTED_GAPS else ""
    raise InputError(
        f"{name}: slices are {usual:.6g} mm apart but for {len(wide)} "
        f"{'gap' if len(wide) == 1 else 'gaps'}: {'; '.join(gaps)}{more}. "
        "Export the series again with every slice.",
        code="E_DCM_GAP",
    )


def _missing(ratio: float) -> str:
    count = round(ratio) - 1
    if count < 1 or abs(ratio - round(ratio)) > 0.1:
        return ""
    return f" ({count} missing)"


def _acquisitions(planes: tuple[Plane, ...]) -> str:
    found = sorted({plane.acquisition for plane in planes} - {""}, key=int)
    return f" (acquisitions {', '.join(found[:6])})" if len(found) > 1 else ""
