"""A DICOM series as one volume: a folder, a zip archive, or a multi-frame file.

Every file of the case is looked at; which of them are the volume, where it lies and what its
values are is decided by ``dicom_series``, ``dicom_geometry`` and ``dicom_pixels``.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medmamba.io.dicom_geometry import place_planes
from medmamba.io.dicom_pixels import read_planes
from medmamba.io.dicom_series import Plane, Series, find_series
from medmamba.io.dicom_split import part_of, parts_of
from medmamba.io.header import Finding, Gate, SourceHeader

FORMAT = "dicom"
MASK_SUFFIX = ".nii.gz"


def read(path: Path, gate: Gate) -> tuple[NDArray[np.generic], SourceHeader]:
    """Return values as (1, D, H, W), rescaled as each slice says, and the header.

    Raises:
        InputError: the case cannot be trusted.
        EnvironmentFault: pydicom is not installed.
    """
    planes, header = _located(path, gate)
    return read_planes(planes)[None], header


def read_header(path: Path, gate: Gate) -> SourceHeader:
    """Return the header alone, judged; pixels are not read.

    Raises:
        InputError: the case cannot be trusted.
        EnvironmentFault: pydicom is not installed.
    """
    return _located(path, gate)[1]


def ordered_planes(path: Path, gate: Gate) -> tuple[Plane, ...]:
    """The planes of the volume, in the order of its slices.

    Raises:
        InputError: the case cannot be trusted.
    """
    return _located(path, gate)[0]


def acquisitions(path: Path, gate: Gate) -> tuple[str, ...]:
    """Names of the acquisitions in a series whose images are no volume together; else none.

    Raises:
        InputError: there is no series to judge.
    """
    return tuple(parts_of(find_series(path).planes, path.name, gate))


def _located(path: Path, gate: Gate) -> tuple[tuple[Plane, ...], SourceHeader]:
    series = find_series(path)
    chosen = part_of(series.planes, path.name, gate)
    planes, geometry, findings = place_planes(chosen, path.name, gate)
    findings += _noticed(series)
    if len(chosen) < len(series.planes):
        text = f"{len(chosen)} of the series' {len(series.planes)} images: {gate.acquisition}."
        findings.append(Finding(code="W_DCM_SPLIT", message=text))
    header = SourceHeader(
        format=FORMAT,
        suffix=MASK_SUFFIX,
        dimension=3,
        geometry=geometry,
        stored_type=f"int{max(plane.bits for plane in planes)}",
        warnings=tuple(str(finding) for finding in findings),
    )
    return planes, header


def _noticed(series: Series) -> list[Finding]:
    findings = []
    if series.left_aside:
        chosen = f"{series.modality or 'images'}, {len(series.planes)} images"
        findings.append(
            Finding(
                code="W_DCM_SERIES",
                message=f"took the series of {chosen}; left aside {'; '.join(series.left_aside)}.",
            )
        )
    if series.modality == "CT" and not all(plane.is_rescaled for plane in series.planes):
        findings.append(
            Finding(
                code="W_DCM_RESCALE",
                message="CT without rescale slope and intercept; stored values are taken as HU.",
            )
        )
    return findings
