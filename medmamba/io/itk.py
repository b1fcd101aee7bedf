"""NRRD, MetaImage and GIPL files in and out: the only door to SimpleITK.

SimpleITK accepts damaged MetaImage streams and short GIPL files, so sizes and checksums of those
are proved here first. Files that point at voxels in other files are refused.
"""

import math
import re
import zlib
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
    to_geometry,
)
from medmamba.io.header import Gate, ItkFields, SourceHeader
from medmamba.io.payload import CHUNK_BYTES, open_regular
from medmamba.volume import Geometry

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_TEXT_HEADER_BYTES = 1 << 16
_GIPL_HEADER_BYTES = 256
_GIPL_MAGICS = (b"\xef\xff\xe9\xb0", b"\x2a\xe3\x89\xb8")
_META_BYTES = {
    "CHAR": 1, "UCHAR": 1, "SHORT": 2, "USHORT": 2, "INT": 4, "UINT": 4, "LONG": 4, "ULONG": 4,
    "LONG_LONG": 8, "ULONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8,
}  # fmt: skip


def read(
    path: Path, gate: Gate, *, labels: bool = False
) -> tuple[NDArray[np.generic], SourceHeader]:
    """Return stored values as (C, D, H, W) and the header.

    Raises:
        InputError: the file cannot be trusted.
    """
    header = read_header(path, gate)
    _prove_payload(path)
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
    _judge_start(path)
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
    if axes == 2:
        spacing.append(PLANE_SLICE_MM * max(spacing))
    matrix: Matrix = np.eye(4)
    for axis in range(3):
        matrix[:3, axis] = column_of_length(direction[:, axis], spacing[axis])
    matrix[:axes, 3] = fields.origin
    judge_spacing(matrix, axes, name, gate)
    findings = judge_shear(matrix, name, gate)
    shape = (size[2] if len(size) > 2 else 1, size[1], size[0])
    return to_geometry(LPS_TO_RAS @ matrix, shape), findings


def _judge_start(path: Path) -> None:
    """Refuse what is not of its suffix's format, or keeps its voxels in another file."""
    with open_regular(path) as file:
        start = file.read(_TEXT_HEADER_BYTES)
    if not start:
        raise InputError(f"{path.name}: is empty (0 bytes). Copy it again.", code="E_IO_EMPTY")
    kind = path.suffix.lower()
    if kind == ".nrrd":
        known = start.startswith(b"NRRD000")
        detached = re.search(rb"^data ?file:", start.split(b"\n\n")[0], re.MULTILINE | re.I)
    elif kind == ".mha":
        known = b"NDims" in start and b"ElementDataFile" in start
        detached = re.search(rb"ElementDataFile\s*=\s*(?!LOCAL\s*[\r\n])", start, re.I)
    else:
        known = len(start) >= _GIPL_HEADER_BYTES and start[252:256] in _GIPL_MAGICS
        detached = None
    if not known:
        raise InputError(
            f"{path.name}: is not a {kind[1:].upper()} file. Download or convert it again.",
            code="E_IO_FORMAT",
        )
    if detached:
        raise InputError(
            f"{path.name}: keeps its voxels in another file. Convert it to a single file.",
            code="E_IO_FORMAT",
        )


def _prove_payload(path: Path) -> None:
    kind = path.suffix.lower()
    if kind == ".mha":
        _prove_meta(path)
    elif kind == ".gipl":
        _prove_gipl(path)


def _prove_meta(path: Path) -> None:
    with open_regular(path) as file:
        start = file.read(_TEXT_HEADER_BYTES)
        last = re.search(rb"ElementDataFile\s*=\s*LOCAL\s*?\r?\n", start, re.I)
        assert last is not None  # _judge_start saw it
        fields = dict(re.findall(r"(\w+)\s*=\s*([^\r\n]*)", start[: last.end()].decode("latin-1")))
        sizes = [int(value) for value in fields.get("DimSize", "0").split()]
        kind = fields.get("ElementType", "").strip().removeprefix("MET_").removesuffix("_ARRAY")
        channels = int(fields.get("ElementNumberOfChannels", "1") or 1)
        needed = math.prod(sizes) * _META_BYTES.get(kind, 0) * channels
        compressed = fields.get("CompressedData", "False").strip().lower() in ("true", "1")
        if not compressed or fields.get("BinaryData", "True").strip().lower() == "false":
            return
        file.seek(last.end())
        found = _inflated_size(file, path.name, needed + 1)
    if needed and found != needed:
        raise InputError(
            f"{path.name}: voxels need {needed} bytes, {found} are there. Copy the file again.",
            code="E_IO_TRUNCATED",
        )


def _inflated_size(file: Any, name: str, most: int) -> int:
    inflater, total = zlib.decompressobj(), 0
    while not inflater.eof and total < most:
        part = inflater.unconsumed_tail or file.read(CHUNK_BYTES)
        if not part:
            raise InputError(
                f"{name}: the compressed data ends too early. Copy it again.",
                code="E_IO_TRUNCATED",
            )
        try:
            total += len(inflater.decompress(part, CHUNK_BYTES))
        except zlib.error as problem:
            raise InputError(
                f"{name}: the compressed data is damaged ({problem}). Copy it again.",
                code="E_IO_CORRUPT",
            ) from problem
    return total


def _prove_gipl(path: Path) -> None:
    # Header: four big-endian sizes, then the type code (gipl format, Guys Image Processing Lab).
    with open_regular(path) as file:
        start = file.read(_GIPL_HEADER_BYTES)
        file.seek(0, 2)
        found = file.tell() - _GIPL_HEADER_BYTES
    *sizes, kind = np.frombuffer(start, dtype=">u2", count=5)
    bits = {1: 1, 7: 8, 8: 8, 15: 16, 16: 16, 31: 32, 32: 32, 64: 32, 65: 64}.get(int(kind), 8)
    needed = math.prod(max(1, int(size)) for size in sizes) * bits // 8
    if found < needed:
        raise InputError(
            f"{path.name}: voxels need {needed} bytes, {found} are there. Copy the file again.",
            code="E_IO_TRUNCATED",
        )


def _unreadable(path: Path, problem: RuntimeError) -> InputError:
    reason = str(problem).strip().splitlines()[-1].strip()
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
