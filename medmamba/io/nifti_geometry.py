"""Which of a NIfTI header's transforms says where the voxels are, and whether it can be believed.

The choice is between sform and qform (nifti1.h, methods 2 and 3); the result is a Geometry with
axes (D, H, W) whose spacing equals the header's to the last bit where the two agree.
"""

import itertools
import math

import numpy as np

from medmamba.errors import InputError
from medmamba.io.affine import (
    PLANE_SLICE_MM,
    Matrix,
    column_of_length,
    judge_shear,
    judge_spacing,
    numbers,
    to_geometry,
)
from medmamba.io.header import Finding, Gate
from medmamba.io.nifti_header import NiftiHeader
from medmamba.volume import Geometry

SCANNER_CODE = 1
UNIT_MILLIMETRES = {1: 1000.0, 2: 1.0, 3: 0.001}
_UNIT_NAMES = {1: "metres", 2: "millimetres", 3: "micrometres"}
SPATIAL_UNITS_MASK = 0x07
AMBIGUITY_VOXELS = 0.1
"""Transforms that differ by less than this at every corner say the same."""
PIXDIM_AGREEMENT = 1e-4
"""Relative difference up to which pixdim is the more exact statement of the same spacing."""
QUATERNION_NOISE = 1e-5
"""How far above one b^2 + c^2 + d^2 may lie in a rounded half turn."""


def read_transform(header: NiftiHeader, name: str, gate: Gate) -> tuple[Geometry, list[Finding]]:
    """Decide where the voxels of a header are.

    Raises:
        InputError: no transform, contradicting transforms, or one that cannot be.
    """
    findings: list[Finding] = []
    _judge_pixdim(header, name)
    matrix = _choose(header, name, gate, findings)
    factor = _unit_factor(header, findings)
    pixdim = np.abs(np.array(header.pixdim[1:4], dtype=np.float64))
    if _axes(header) == 2:
        matrix, pixdim = _with_slice_axis(matrix, pixdim)
    _judge_pixdim_agreement(matrix, pixdim, _axes(header), findings)
    matrix = _settle_spacing(matrix, pixdim, factor)
    judge_spacing(matrix, _axes(header), name, gate)
    findings += judge_shear(matrix, name, gate)
    return to_geometry(matrix, spatial_shape(header), name), findings


def spatial_shape(header: NiftiHeader) -> tuple[int, int, int]:
    """Sizes along (D, H, W)."""
    x, y, *rest = header.shape
    return (rest[0] if rest else 1, y, x)


def _axes(header: NiftiHeader) -> int:
    return min(3, len(header.shape))


def _judge_pixdim(header: NiftiHeader, name: str) -> None:
    stated = header.pixdim[1 : _axes(header) + 1]
    unusable = [value for value in stated if not math.isfinite(value) or value == 0]
    if any(value < 0 for value in stated) or (unusable and header.sform_code <= 0):
        raise InputError(
            f"{name}: voxel spacing (pixdim) is {numbers(stated)}; positive numbers are needed. "
            "Repair the header from the source of the image.",
            code="E_GEOM_SPACING",
        )


def _choose(header: NiftiHeader, name: str, gate: Gate, findings: list[Finding]) -> Matrix:
    qform = _qform(header, name) if header.qform_code > 0 else None
    sform = _sform(header) if header.sform_code > 0 else None
    if header.sform_code > 0 and sform is None:
        if qform is None:
            raise InputError(
                f"{name}: the only transform (sform) is {numbers(header.sform[0])}, ...; it is "
                "singular or not finite. Repair the header from the source of the image.",
                code="E_GEOM_SINGULAR",
            )
        findings.append(
            Finding(code="W_GEOM_SFORM", message="sform is singular or not finite; qform is used.")
        )
    if sform is None and qform is None:
        return _uncoded(header, name, gate, findings)
    if sform is not None and qform is not None:
        return _reconcile(header, sform, qform, name, findings)
    chosen = sform if sform is not None else qform
    assert chosen is not None
    return chosen


def _uncoded(header: NiftiHeader, name: str, gate: Gate, findings: list[Finding]) -> Matrix:
    if not gate.assume_identity:
        raise InputError(
            f"{name}: does not say where its voxels are (qform and sform codes are 0). Repair the "
            "header, or allow an axis-aligned grid with --assume-identity.",
            code="E_GEOM_UNCODED",
        )
    findings.append(
        Finding(
            code="W_GEOM_UNCODED", message="no transform is coded; an axis-aligned grid is assumed."
        )
    )
    return np.diag([*(abs(value) for value in header.pixdim[1:4]), 1.0])


def _reconcile(
    header: NiftiHeader, sform: Matrix, qform: Matrix, name: str, findings: list[Finding]
) -> Matrix:
    distance = _corner_distance(header, sform, qform)
    if distance <= AMBIGUITY_VOXELS:
        return sform
    scanner = [header.sform_code == SCANNER_CODE, header.qform_code == SCANNER_CODE]
    if sum(scanner) != 1:
        raise InputError(
            f"{name}: sform and qform (codes {header.sform_code}, {header.qform_code}) differ by "
            f"{distance:.3g} voxels. Delete the wrong one from the header.",
            code="E_GEOM_AMBIGUOUS",
        )
    kept = "sform" if scanner[0] else "qform"
    findings.append(
        Finding(
            code="W_GEOM_SCANNER",
            message=f"sform and qform differ by {distance:.3g} voxels; {kept} (scanner) is used.",
        )
    )
    return sform if scanner[0] else qform


def _corner_distance(header: NiftiHeader, first: Matrix, second: Matrix) -> float:
    extent = [size - 1.0 for size in reversed(spatial_shape(header))]
    corners = np.array(list(itertools.product(*((0.0, size) for size in extent)))).T
    points = np.concatenate([corners, np.ones((1, 8))])
    with np.errstate(all="ignore"):
        try:
            moved = np.linalg.solve(first, second @ points)
        except np.linalg.LinAlgError:
            return math.inf
        distance = float(np.abs(moved[:3] - corners).max())
    return distance if math.isfinite(distance) else math.inf


def _sform(header: NiftiHeader) -> Matrix | None:
    matrix = np.eye(4)
    matrix[:3] = np.array(header.sform, dtype=np.float64)
    if not np.isfinite(matrix).all() or np.abs(matrix[:3]).max() > 1e12:
        return None
    axes = matrix[:3, : _axes(header)]
    lengths = np.linalg.norm(axes, axis=0)
    if lengths.min() < 1e-12:
        return None
    unit = axes / lengths
    # Volume of the unit cell, or area for a plane: zero when axes coincide.
    if math.sqrt(max(0.0, float(np.linalg.det(unit.T @ unit)))) < 1e-6:
        return None
    if _axes(header) == 2:
        matrix[:3, 2] = np.cross(unit[:, 0], unit[:, 1])
    return matrix


def _qform(header: NiftiHeader, name: str) -> Matrix:
    b, c, d = header.quaternion
    rest = 1.0 - (b * b + c * c + d * d)
    if not math.isfinite(rest) or rest < -QUATERNION_NOISE:
        raise InputError(
            f"{name}: the rotation of qform, {numbers(header.quaternion)}, is no unit quaternion. "
            "Repair the header from the source of the image.",
            code="E_GEOM_QUATERN",
        )
    if rest < 1e-7:
        # A half turn whose a is rounding noise: scale b, c, d to unit length (nifti1_io).
        length = math.sqrt(b * b + c * c + d * d)
        a, b, c, d = 0.0, b / length, c / length, d / length
    else:
        a = math.sqrt(rest)
    rotation = np.array([
        [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
    ])  # fmt: skip
    spacing = [_usable_spacing(value) for value in header.pixdim[1:4]]
    handedness = -1.0 if header.pixdim[0] < 0 else 1.0
    matrix = np.eye(4)
    matrix[:3, :3] = rotation * (np.array([1.0, 1.0, handedness]) * spacing)
    matrix[:3, 3] = header.quaternion_offset
    if not np.isfinite(matrix).all():
        raise InputError(
            f"{name}: the position of qform is {numbers(header.quaternion_offset)}; finite "
            "numbers are needed. Repair the header from the source of the image.",
            code="E_GEOM_SINGULAR",
        )
    return matrix


def _usable_spacing(value: float) -> float:
    return abs(value) if math.isfinite(value) and value != 0 else 1.0


def _unit_factor(header: NiftiHeader, findings: list[Finding]) -> float:
    code = header.units & SPATIAL_UNITS_MASK
    if code == 0:
        findings.append(Finding(code="N_GEOM_UNITS", message="no unit is given; mm is assumed."))
    elif code not in UNIT_MILLIMETRES:
        findings.append(
            Finding(code="W_GEOM_UNITS", message=f"unit code {code} is unknown; mm is assumed.")
        )
    elif code != 2:
        findings.append(
            Finding(code="W_GEOM_UNITS", message=f"converted from {_UNIT_NAMES[code]} to mm.")
        )
    return UNIT_MILLIMETRES.get(code, 1.0)


def _with_slice_axis(matrix: Matrix, pixdim: Matrix) -> tuple[Matrix, Matrix]:
    """Give a plane a slice axis so long that no planner mistakes it for a volume."""
    extended, spacing = matrix.copy(), pixdim.copy()
    lengths = np.linalg.norm(matrix[:3, :2], axis=0)
    normal = np.cross(matrix[:3, 0] / lengths[0], matrix[:3, 1] / lengths[1])
    in_plane = np.where(np.isfinite(pixdim[:2]) & (pixdim[:2] > 0), pixdim[:2], lengths)
    spacing[2] = PLANE_SLICE_MM * in_plane.max()
    extended[:3, 2] = normal / np.linalg.norm(normal) * spacing[2]
    return extended, spacing


def _judge_pixdim_agreement(
    matrix: Matrix, pixdim: Matrix, axes: int, findings: list[Finding]
) -> None:
    lengths = np.linalg.norm(matrix[:3, :axes], axis=0)
    with np.errstate(invalid="ignore"):
        differs = ~(np.abs(lengths - pixdim[:axes]) <= 1e-2 * lengths)
    if differs.any():
        findings.append(
            Finding(
                code="W_GEOM_PIXDIM",
                message=f"pixdim {numbers(pixdim[:axes])} is not the spacing of the transform, "
                f"{numbers(lengths)}; the transform is used.",
            )
        )


def _settle_spacing(matrix: Matrix, pixdim: Matrix, factor: float) -> Matrix:
    """Scale to millimetres with columns whose lengths are pixdim exactly, where pixdim agrees.

    Single-precision rounding of a rotation would otherwise change the spacing in its last digits,
    and with it every number that planning derives from it.
    """
    settled = matrix.copy()
    settled[:3] *= factor
    for axis in range(3):
        length = float(np.linalg.norm(matrix[:3, axis]))
        if abs(length - pixdim[axis]) <= PIXDIM_AGREEMENT * length:
            settled[:3, axis] = column_of_length(matrix[:3, axis], float(pixdim[axis]) * factor)
    return settled
