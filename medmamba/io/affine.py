"""Small facts about affines that every reader shares: exact lengths, plausibility, right angles."""

import itertools

import numpy as np
from numpy.typing import NDArray

from medmamba.errors import GeometryError, InputError
from medmamba.io.header import Finding, Gate
from medmamba.volume import Geometry

SHEAR_NOISE = 1e-3
"""Largest deviation from right angles that rounding of a header explains."""
SHEAR_LIMIT = 0.5
"""Cosine of the flattest angle between axes (60 degrees) that straightening is offered for."""
PLANE_SLICE_MM = 999.0
"""Slice distance given to a 2D image, in units of its coarser spacing: nnU-Net's convention."""
_ULP_STEPS = (0, 1, -1, 2, -2, 3, -3, 4, -4)

Matrix = NDArray[np.float64]


def to_geometry(matrix: Matrix, shape: tuple[int, int, int], name: str) -> Geometry:
    """Turn an affine over voxels (x, y, z) into a Geometry over (D, H, W).

    Raises:
        InputError: the affine is singular or not finite.
    """
    try:
        return Geometry.from_matrix(shape, matrix[:, [2, 1, 0, 3]])
    except GeometryError as problem:
        raise InputError(f"{name}: {problem.message}", code="E_GEOM_SINGULAR") from problem


def column_of_length(direction: Matrix, length: float) -> Matrix:
    """Scale ``direction`` so that its norm, as numpy computes it, is exactly ``length``.

    The two largest components are moved by single units in the last place until it is.
    """
    column = np.asarray(direction / np.linalg.norm(direction) * length)
    middle, largest = np.argsort(np.abs(column))[1:]
    for small, large in itertools.product(_ULP_STEPS, repeat=2):
        trial = column.copy()
        trial[largest] += large * np.spacing(trial[largest])
        trial[middle] += small * np.spacing(trial[middle])
        if float(np.linalg.norm(trial)) == length:
            return trial
    return column


def judge_spacing(matrix: Matrix, axes: int, name: str, gate: Gate) -> None:
    """Refuse voxel sizes that no scanner makes.

    Raises:
        InputError: outside the gate's range, or not finite.
    """
    spacing = np.linalg.norm(matrix[:3, :axes], axis=0)
    if not (
        np.isfinite(spacing).all()
        and spacing.min() >= gate.min_spacing_mm
        and spacing.max() <= gate.max_spacing_mm
    ):
        raise InputError(
            f"{name}: voxels measure {numbers(spacing)} mm; {gate.min_spacing_mm:g} to "
            f"{gate.max_spacing_mm:g} are plausible. Check spacing and unit in the header.",
            code="E_GEOM_SPACING",
        )


def shear_of(matrix: Matrix) -> float:
    """Largest absolute row sum of D'D - I, where D holds the unit directions of the axes."""
    columns = matrix[:3, :3]
    unit = columns / np.linalg.norm(columns, axis=0)
    return float(np.abs(unit.T @ unit - np.eye(3)).sum(axis=1).max())


def judge_shear(matrix: Matrix, name: str, gate: Gate) -> list[Finding]:
    """Refuse grids whose axes are far from right angles; report those that are tilted.

    Raises:
        InputError: tilted by more than can be straightened, or at all when the gate is strict.
    """
    shear = shear_of(matrix)
    if shear <= SHEAR_NOISE:
        return []
    if shear > SHEAR_LIMIT or gate.strict:
        raise InputError(
            f"{name}: axes are not at right angles (deviation {shear:.3g}, at most "
            f"{SHEAR_NOISE if gate.strict else SHEAR_LIMIT:g}). Resample it to a regular grid.",
            code="E_GEOM_SHEAR",
        )
    message = f"axes deviate from right angles by {shear:.3g} (tilted gantry?)."
    return [
        Finding(code="W_GEOM_RESAMPLED" if gate.straighten else "W_GEOM_SHEAR", message=message)
    ]


def judge_voxels(count: int, name: str, gate: Gate) -> None:
    """Refuse files over the gate's limit before anything is allocated.

    Raises:
        InputError: too many values.
    """
    if count > gate.max_voxels:
        raise InputError(
            f"{name}: declares {count} values; the limit is {gate.max_voxels}. "
            "Crop or split the image, or raise the limit.",
            code="E_LIMIT_VOXELS",
        )


def numbers(values: object) -> str:
    """Render a few numbers for a message."""
    return "(" + ", ".join(f"{float(value):.6g}" for value in np.ravel(np.asarray(values))) + ")"
