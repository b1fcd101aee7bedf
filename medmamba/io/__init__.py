"""The only door for files of voxels: read images and labels, write labels, judge files.

Which module reads a file follows from its suffix; a folder or an archive is a DICOM series. Readers
are imported when first used. Arrays are
(C, D, H, W) and affines RAS+ millimetres from here on inwards.
"""

import importlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba.errors import GeometryError, InputError
from medmamba.io.dicom_files import ZIP_SUFFIX, content_hash, holds_dicom, is_dicom
from medmamba.io.header import (
    DEFAULT_GATE,
    TRAINING_GATE,
    Finding,
    Gate,
    ItkFields,
    SourceHeader,
)
from medmamba.io.orient import box_turned_back, orientation_code, turn, turn_back, turned_geometry
from medmamba.io.straighten import labels_on_source, straighten
from medmamba.io.values import as_image, as_labels, judge_image, judge_modality
from medmamba.volume import Geometry, Volume, VolumeKind

__all__ = [
    "DEFAULT_GATE",
    "FORMATS",
    "TRAINING_GATE",
    "ZIP_SUFFIX",
    "Finding",
    "Gate",
    "ItkFields",
    "SourceHeader",
    "box_turned_back",
    "check_file",
    "content_hash",
    "encode_image",
    "holds_dicom",
    "is_dicom",
    "judge_image",
    "judge_modality",
    "labels_on_file_grid",
    "orientation_code",
    "read_geometry",
    "read_header",
    "read_image",
    "read_labels",
    "read_stored_image",
    "suffix_of",
    "turn",
    "working_geometry",
    "write_image",
    "write_labels",
]

FORMATS: dict[str, str] = {
    ".nii.gz": "medmamba.io.nifti",
    ".nii": "medmamba.io.nifti",
    ".nrrd": "medmamba.io.itk",
    ".mha": "medmamba.io.itk",
    ".gipl": "medmamba.io.itk",
    ".png": "medmamba.io.picture",
    ".bmp": "medmamba.io.picture",
    ".tif": "medmamba.io.picture",
    ".tiff": "medmamba.io.picture",
}
"""File suffix -> module with ``read``, ``read_header`` and ``write``."""


def suffix_of(path: Path | str) -> str:
    """Return the suffix by which ``path`` is read, in lower case.

    Raises:
        InputError: no reader knows the suffix.
    """
    name = Path(path).name.lower()
    for suffix in FORMATS:
        if name.endswith(suffix):
            return suffix
    raise InputError(
        f"{Path(path).name}: unknown file ending. Files of voxels end in {', '.join(FORMATS)}.",
        code="E_IO_FORMAT",
    )


def read_image(path: Path | str, *, gate: Gate = DEFAULT_GATE) -> tuple[Volume, SourceHeader]:
    """Read an image as float32 (C, D, H, W); more than one channel for colour and 4D files.

    An image with tilted axes is straightened, if the gate allows: the volume then lies on
    ``header.straightened``, and ``write_labels`` carries labels back to the file's own grid.

    Raises:
        InputError: the file cannot be trusted; the code says why.
    """
    path = Path(path)
    stored, header = _read_stored(path, gate)
    array, findings = as_image(stored, path.name)
    header = with_findings(header, findings)
    geometry = header.geometry
    if "W_GEOM_RESAMPLED" in header.warning_codes:
        array, geometry = straighten(array, geometry, path.name, gate)
        header = replace(header, straightened=geometry)
    return Volume(array=array, geometry=geometry, kind=VolumeKind.IMAGE), header


def read_stored_image(
    path: Path | str, *, gate: Gate = DEFAULT_GATE
) -> tuple[NDArray[np.generic], SourceHeader]:
    """Read an image in its own number type (C, D, H, W), on its own grid even if that is tilted.

    Raises:
        InputError: the file cannot be trusted.
    """
    return _read_stored(Path(path), gate)


def read_labels(path: Path | str, *, gate: Gate = DEFAULT_GATE) -> tuple[Volume, SourceHeader]:
    """Read labels as int16 (1, D, H, W), or int32 where values need it.

    Raises:
        InputError: the file cannot be trusted, has several channels, or values that are not whole.
    """
    path = Path(path)
    # Labels are compared voxel by voxel with what they belong to, so they stay on their grid.
    stored, header = _read_stored(path, replace(gate, straighten=False), labels=True)
    if stored.shape[0] != 1:
        raise InputError(
            f"{path.name}: has {stored.shape[0]} values per voxel; labels have one. "
            "Give a file of labels in one channel.",
            code="E_SHAPE_4D",
        )
    array, findings = as_labels(stored, path.name)
    header = with_findings(header, findings)
    return Volume(array=array, geometry=header.geometry, kind=VolumeKind.LABELS), header


def read_header(path: Path | str, *, gate: Gate = DEFAULT_GATE) -> SourceHeader:
    """Read what is known of a file without decoding its voxels, where the format allows.

    Raises:
        InputError: the header cannot be trusted.
    """
    path = Path(path)
    header: SourceHeader = _module(path).read_header(path, gate)
    return header


def read_geometry(path: Path | str, *, gate: Gate = DEFAULT_GATE) -> Geometry:
    """Read the grid of a file without decoding its voxels, where the format allows.

    Raises:
        InputError: the header cannot be trusted.
    """
    return read_header(path, gate=gate).geometry


def check_file(path: Path | str, *, gate: Gate = DEFAULT_GATE) -> tuple[Finding, ...]:
    """Judge an image file completely: every finding, errors included, none raised."""
    try:
        volume, header = read_image(path, gate=gate)
    except InputError as problem:
        return (Finding(code=problem.code, message=problem.message),)
    noticed = [Finding(code=code, message=text) for code, text in map(_parted, header.warnings)]
    return (*noticed, *judge_image(volume.array))  # type: ignore[arg-type]


def write_labels(
    path: Path | str,
    labels: NDArray[Any],
    source: SourceHeader,
    *,
    label_names: Mapping[str, Any] | None = None,
) -> None:
    """Write labels (D, H, W) on the grid of ``source``, atomically and byte-reproducibly.

    Values are stored as uint8, or uint16 where one exceeds 255. Labels of a straightened image
    lie on ``source.straightened`` and are carried to the file's own grid.

    Args:
        path: where to; its suffix names the format, which must be of the source's family.
        labels: whole numbers from 0 to 65535.
        source: header of the image that the labels belong to.
        label_names: stored in the file as JSON text where the format has a place for it (NIfTI).

    Raises:
        GeometryError: labels do not fit the source's grid.
        EnvironmentFault: the folder cannot be written.
    """
    path = Path(path)
    stored = _as_stored_labels(labels, source)
    module = importlib.import_module(FORMATS[suffix_of(path)])
    text = None
    if label_names is not None:
        text = json.dumps({"labels": dict(label_names)}, ensure_ascii=False, sort_keys=True)
    module.write(path, stored, source, label_text=text)


def working_geometry(header: SourceHeader) -> Geometry:
    """The grid on which an image was handed over, and on which its labels are expected back.

    It is the file's own grid unless the image was straightened or turned.
    """
    return turned_geometry(
        header.straightened or header.geometry, header.axis_order, header.axis_flips
    )


def write_image(path: Path | str, values: NDArray[Any], geometry: Geometry) -> None:
    """Write one channel (D, H, W) in its own number type, atomically and byte-reproducibly.

    Args:
        path: where to; its suffix names the format.
        values: integers of up to 32 bits, or floats, which are stored in single precision.
        geometry: the grid of ``values``.

    Raises:
        GeometryError: values do not fit the grid.
        EnvironmentFault: the folder cannot be written.
    """
    path = Path(path)
    if tuple(values.shape) != geometry.shape:
        raise GeometryError(
            f"values of shape {tuple(values.shape)} do not fit a grid of {geometry.shape}."
        )
    kind = np.float32 if np.issubdtype(values.dtype, np.floating) else values.dtype
    suffix = suffix_of(path)
    plane = FORMATS[suffix].endswith("picture") and geometry.shape[0] == 1
    source = SourceHeader(format="", suffix=suffix, dimension=2 if plane else 3, geometry=geometry)
    _module(path).write(path, np.ascontiguousarray(values, dtype=kind), source)


def encode_image(values: NDArray[np.generic], geometry: Geometry) -> bytes:
    """One channel (D, H, W) of integers as the bytes of a ``.nii.gz`` without a name."""
    from medmamba.io.nifti import encode

    return encode(values, geometry)


def _as_stored_labels(labels: NDArray[Any], source: SourceHeader) -> NDArray[np.integer[Any]]:
    grid = working_geometry(source)
    if tuple(labels.shape) != grid.shape:
        raise GeometryError(
            f"labels of shape {tuple(labels.shape)} do not fit the image's grid "
            f"{grid.shape}. Restore them to the input's grid first."
        )
    if not np.issubdtype(labels.dtype, np.integer) and labels.dtype != np.bool_:
        raise GeometryError(f"labels are of type {labels.dtype}; whole numbers are needed.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > np.iinfo(np.uint16).max:
        raise GeometryError(f"label values reach from {low} to {high}; 0 to 65535 can be stored.")
    stored: NDArray[np.integer[Any]]
    stored = np.ascontiguousarray(labels, dtype=np.uint8 if high <= 255 else np.uint16)
    return labels_on_file_grid(stored, source)


def labels_on_file_grid(
    labels: NDArray[np.integer[Any]], source: SourceHeader
) -> NDArray[np.integer[Any]]:
    """Carry labels (D, H, W) from the working grid to the file's own, as ``write_labels`` does.

    A copy only where the image was straightened or turned.
    """
    stored = np.ascontiguousarray(turn_back(labels, source))
    if source.straightened is not None:
        stored = labels_on_source(stored, source.straightened, source.geometry)
    return stored


def with_findings(header: SourceHeader, findings: list[Finding]) -> SourceHeader:
    """Return ``header`` with more warnings."""
    if not findings:
        return header
    return replace(header, warnings=(*header.warnings, *(str(item) for item in findings)))


def _read_stored(
    path: Path, gate: Gate, *, labels: bool = False
) -> tuple[NDArray[np.generic], SourceHeader]:
    module = _module(path)
    stored: tuple[NDArray[np.generic], SourceHeader]
    stored = module.read(path, gate, labels=labels) if labels else module.read(path, gate)
    return stored


def _module(path: Path) -> Any:
    # A folder that is named like an image file is no series, but somebody's mistake.
    if is_dicom(path) and not path.name.lower().endswith(tuple(FORMATS)):
        return importlib.import_module("medmamba.io.dicom")
    return importlib.import_module(FORMATS[suffix_of(path)])


def _parted(warning: str) -> tuple[str, str]:
    code, _, text = warning.partition(": ")
    return code, text
