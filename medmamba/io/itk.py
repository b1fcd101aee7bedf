"""NRRD, MetaImage and GIPL files in and out: the only door to SimpleITK.

``itk_payload`` proves each file first, because SimpleITK accepts some damaged ones.
"""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813, TID251
from numpy.typing import NDArray

from medmamba.errors import InputError
from medmamba.files import replace_atomic
from medmamba.io.affine import (
    PLANE_SLICE_MM,
    Matrix,
    column_of_length,
    judge_shear,
    judge_spacing,
    judge_voxels,
    numbers,
    to_geometry,
)
from medmamba.io.header import Gate, ItkFields, SourceHeader
from medmamba.io.itk_payload import judge_start, prove_payload
from medmamba.volume import Geometry

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read(
    path: Path, gate: Gate, *, labels: bool = False
) -> tuple[NDArray[np.generic], SourceHeader]:
    """Return stored values as (C, D, H, W) and the header.

    Raises:
        InputError: the file cannot be trusted.
    """
    header = read_header(path, gate)
    prove_payload(path)
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as problem:
        raise _unreadable(path, problem) from problem
    values = sitk.GetArrayFromImage(image)
    depth, height, width = header.geometry.shape
    if image.GetNumberOfComponentsPerPixel() > 1:
        values = np.moveaxis(values, -1, 0)
    return values.reshape(header.channels, depth, height, width), header


def read_header(path: Path, gate: Gate) -> SourceHeader:
    """Return the header alone, judged.

    Raises:
        InputError: the header cannot be trusted.
    """
    judge_start(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as problem:
        raise _unreadable(path, problem) from problem
    size, pixel = reader.GetSize(), reader.GetPixelID()
    components = reader.GetNumberOfComponents()
    judge_voxels(math.prod(size) * components, path.name, gate)
    if not 2 <= len(size) <= 4 or (len(size) == 4 and components > 1):
        raise InputError(
            f"{path.name}: has {len(size)} dimensions of {components} values; 2, 3 or 4 can be "
            "read. Split it into images of three dimensions.",
            code="E_SHAPE_NDIM",
        )
    if "complex" in sitk.GetPixelIDValueAsString(pixel):
        raise InputError(
            f"{path.name}: voxels are complex numbers. Convert it to integers or floats.",
            code="E_HDR_DTYPE",
        )
    fields = _spatial_fields(reader, len(size))
    geometry, findings = _geometry(fields, size, path.name, gate)
    return SourceHeader(
        format="itk",
        suffix=path.suffix.lower(),
        dimension=min(3, len(size)),
        geometry=geometry,
        channels=components * (size[3] if len(size) == 4 else 1),
        stored_type=sitk.GetPixelIDValueAsString(pixel),
        itk=fields,
        warnings=tuple(str(item) for item in findings),
    )


def _spatial_fields(reader: Any, dimensions: int) -> ItkFields:
    axes = min(3, dimensions)
    direction = np.array(reader.GetDirection()).reshape(dimensions, dimensions)[:axes, :axes]
    return ItkFields(
        spacing=tuple(float(value) for value in reader.GetSpacing()[:axes]),
        origin=tuple(float(value) for value in reader.GetOrigin()[:axes]),
        direction=tuple(float(value) for value in direction.ravel()),
    )


def _geometry(
    fields: ItkFields, size: tuple[int, ...], name: str, gate: Gate
) -> tuple[Geometry, list[Any]]:
    axes = len(fields.spacing)
    spacing = [abs(value) for value in fields.spacing]
    direction = np.eye(3)
    direction[:axes, :axes] = np.array(fields.direction).reshape(axes, axes)
    _require_directions(direction, spacing, name)
    if axes == 2:
        spacing.append(PLANE_SLICE_MM * max(spacing))
    matrix: Matrix = np.eye(4)
    for axis in range(3):
        matrix[:3, axis] = column_of_length(direction[:, axis], spacing[axis])
    matrix[:axes, 3] = fields.origin
    judge_spacing(matrix, axes, name, gate)
    findings = judge_shear(matrix, name, gate)
    shape = (size[2] if len(size) > 2 else 1, size[1], size[0])
    return to_geometry(LPS_TO_RAS @ matrix, shape, name), findings


def _require_directions(direction: Matrix, spacing: list[float], name: str) -> None:
    if not all(math.isfinite(value) and value > 0 for value in spacing):
        raise InputError(
            f"{name}: voxel spacing is {numbers(spacing)}; positive numbers are needed. "
            "Repair the header from the source of the image.",
            code="E_GEOM_SPACING",
        )
    lengths = np.linalg.norm(direction, axis=0)
    # Some writers put lengths into the directions; only the angle between axes matters here.
    if (
        not np.isfinite(lengths).all()
        or lengths.min() < 1e-6
        or (abs(np.linalg.det(direction / lengths)) < 1e-6)
    ):
        raise InputError(
            f"{name}: axes point {numbers(direction)}, which is singular or not finite. "
            "Repair the header from the source of the image.",
            code="E_GEOM_SINGULAR",
        )


def _unreadable(path: Path, problem: RuntimeError) -> InputError:
    # Folders may name people, so they stay out of messages.
    text = str(problem).replace(f"{path.parent}{os.sep}", "")
    reason = text.strip().splitlines()[-1].strip()
    short = "but received" in reason or "got only" in reason or "not read completely" in reason
    return InputError(
        f"{path.name}: cannot be read ({reason[:160]}). Copy or convert it again.",
        code="E_IO_TRUNCATED" if short or "No such file" in reason else "E_IO_CORRUPT",
    )


def write(
    path: Path,
    labels: NDArray[np.integer[Any]],
    source: SourceHeader,
    *,
    label_text: str | None = None,
) -> None:
    """Write labels (D, H, W) compressed, with the geometry of the source."""
    fields = source.itk or fields_of(source.geometry, source.dimension)
    image = sitk.GetImageFromArray(labels if source.dimension == 3 else labels[0])
    image.SetSpacing(fields.spacing)
    image.SetOrigin(fields.origin)
    image.SetDirection(fields.direction)
    replace_atomic(path, lambda temporary: sitk.WriteImage(image, str(temporary), True))


def fields_of(geometry: Geometry, dimension: int) -> ItkFields:
    """State a geometry in ITK's terms, for images that came from another format."""
    matrix = LPS_TO_RAS @ geometry.matrix[:, [2, 1, 0, 3]]
    spacing = geometry.spacing_mm[::-1][:dimension]
    direction = matrix[:dimension, :dimension] / np.array(spacing)
    return ItkFields(
        spacing=spacing,
        origin=tuple(float(value) for value in matrix[:dimension, 3]),
        direction=tuple(float(value) for value in direction.ravel()),
    )
