"""NIfTI files in and out: the only door to nibabel.

Reading passes the gate first: own header parser, whole payload with checksums, geometry rules. Only
then are voxels interpreted. Labels go out on the bits of the input's own grid.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba.errors import InputError
from medmamba.files import write_atomic
from medmamba.io.affine import SHEAR_NOISE, shear_of
from medmamba.io.header import Finding, Gate, SourceHeader
from medmamba.io.nifti_geometry import read_transform
from medmamba.io.nifti_header import (
    NIFTI1_BYTES,
    NIFTI2_BYTES,
    NiftiHeader,
    judge_header,
    parse_header,
    portable_header,
    recognise,
)
from medmamba.io.payload import PayloadReader, compress_gzip
from medmamba.volume import Geometry

_SLAB_VALUES = 1 << 20
_EXTENSION_TEXT_CODE = 6
_DESCRIPTION = b"medmamba"


def read(
    path: Path, gate: Gate, *, labels: bool = False
) -> tuple[NDArray[np.generic], SourceHeader]:
    """Return stored values as (C, D, H, W), scaled where the header says so, and the header.

    Integers without scaling keep their type; everything scaled is float32, rounded once from
    double precision as ITK does.

    Raises:
        InputError: the file cannot be trusted.
    """
    with PayloadReader(path) as reader:
        header, block, geometry, findings = _read_header(reader, path.name, gate)
        values = _read_values(reader, header, path.name)
        reader.finish()
        findings = [*reader.findings, *findings, *_odd_name(path, reader)]
    array = _as_channels(values, header)
    return array, SourceHeader(
        format="nifti",
        suffix=".nii.gz" if path.name.lower().endswith(".gz") else ".nii",
        dimension=min(3, len(header.shape)),
        geometry=geometry,
        channels=array.shape[0],
        stored_type=np.dtype(header.dtype).name,
        nifti_header=portable_header(block, header).hex(),
        warnings=tuple(str(finding) for finding in findings),
    )


def read_header(path: Path, gate: Gate) -> SourceHeader:
    """Return the header alone, judged; voxels are not read, so truncation may go unnoticed.

    Raises:
        InputError: the header cannot be trusted.
    """
    with PayloadReader(path) as reader:
        header, block, geometry, findings = _read_header(reader, path.name, gate)
        findings = [*findings, *_odd_name(path, reader)]
    return SourceHeader(
        format="nifti",
        suffix=".nii.gz" if path.name.lower().endswith(".gz") else ".nii",
        dimension=min(3, len(header.shape)),
        geometry=geometry,
        channels=_channel_count(header),
        stored_type=np.dtype(header.dtype).name,
        nifti_header=portable_header(block, header).hex(),
        warnings=tuple(str(finding) for finding in findings),
    )


def _read_header(
    reader: PayloadReader, name: str, gate: Gate
) -> tuple[NiftiHeader, bytes, Geometry, list[Finding]]:
    """Read up to the first voxel and judge everything the header says."""
    try:
        block = reader.read(NIFTI1_BYTES)
        if recognise(block, name)[0] == 2:
            block += reader.read(NIFTI2_BYTES - NIFTI1_BYTES)
        header = parse_header(block, name)
        findings = judge_header(header, name, gate)
        _require_room(reader, header, name)
        geometry, noticed = read_transform(header, name, gate)
    except InputError:
        reader.prove_rest()
        raise
    before = int(header.offset) - len(block)
    if reader.skip(before) < before:
        raise _offset_beyond(name, int(header.offset))
    return header, block, geometry, [*findings, *noticed]


def _require_room(reader: PayloadReader, header: NiftiHeader, name: str) -> None:
    """Refuse, before memory is taken, what a file of this size cannot hold."""
    offset = int(header.offset)
    if not reader.is_gzip and offset > max(reader.file_bytes, header.header_bytes + 4):
        raise _offset_beyond(name, offset)
    if reader.most_bytes < offset + header.data_bytes:
        raise _truncated(name, reader.file_bytes, header)


def _read_values(reader: PayloadReader, header: NiftiHeader, name: str) -> NDArray[np.generic]:
    try:
        buffer = np.empty(header.data_bytes, dtype=np.uint8)
    except MemoryError as problem:
        raise InputError(
            f"{name}: needs {header.data_bytes} bytes, more than there is memory. "
            "Crop the image or use a larger machine.",
            code="E_LIMIT_RAM",
        ) from problem
    filled = reader.read_into(buffer.data)
    if filled < header.data_bytes:
        raise _truncated(name, filled, header)
    values = buffer.view(header.dtype)
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    return native if header.scaling is None else _scaled(native, header.scaling)


def _scaled(values: NDArray[np.generic], scaling: tuple[float, float]) -> NDArray[np.float32]:
    slope, intercept = scaling
    result = np.empty(values.shape, dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, values.size, _SLAB_VALUES):
            part = values[start : start + _SLAB_VALUES].astype(np.float32).astype(np.float64)
            result[start : start + _SLAB_VALUES] = part * slope + intercept
    return result


def _channel_count(header: NiftiHeader) -> int:
    return header.shape[3] if len(header.shape) > 3 else 1


def _as_channels(values: NDArray[np.generic], header: NiftiHeader) -> NDArray[np.generic]:
    x, y, *rest = header.shape
    depth = rest[0] if rest else 1
    # The first NIfTI axis runs fastest, so the reversed shape in C order needs no copy.
    return values.reshape(_channel_count(header), depth, y, x)


def _odd_name(path: Path, reader: PayloadReader) -> list[Finding]:
    named_gzip = path.name.lower().endswith(".gz")
    if named_gzip and not reader.is_gzip:
        return [Finding(code="W_IO_NOT_GZIP", message="is named .gz but is not compressed.")]
    if reader.is_gzip and not named_gzip:
        return [Finding(code="W_IO_GZIP", message="is compressed but not named .gz.")]
    return []


def _truncated(name: str, found: int, header: NiftiHeader) -> InputError:
    return InputError(
        f"{name}: voxels need {header.data_bytes} bytes of data, only {found} bytes are there. "
        "Copy the file again.",
        code="E_IO_TRUNCATED",
    )


def _offset_beyond(name: str, offset: int) -> InputError:
    return InputError(
        f"{name}: voxels are said to begin at byte {offset}, beyond the end of the file. "
        "Write the file again from its source.",
        code="E_HDR_OFFSET",
    )


def write(
    path: Path,
    labels: NDArray[np.integer[Any]],
    source: SourceHeader,
    *,
    label_text: str | None = None,
) -> None:
    """Write labels (D, H, W) of the final type with the source's transforms, codes and units."""
    compressed = path.name.lower().endswith(".gz")
    parts = _encoded(labels, source, label_text)
    write_atomic(path, compress_gzip(parts) if compressed else b"".join(parts))


def encode(values: NDArray[np.generic], geometry: Geometry) -> bytes:
    """Values (D, H, W) of the final type on their grid as the bytes of a ``.nii.gz``."""
    source = SourceHeader(format="", suffix=".nii.gz", dimension=3, geometry=geometry)
    return compress_gzip(_encoded(values, source))


def _encoded(
    values: NDArray[np.generic], source: SourceHeader, label_text: str | None = None
) -> list[bytes | memoryview]:
    header = _output_header(source, values)
    extension = _extension(label_text)
    header["vox_offset"] = header.sizeof_hdr + len(extension)
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    return [header.binaryblock, extension, np.ascontiguousarray(little).data.cast("B")]


def _output_header(source: SourceHeader, labels: NDArray[np.generic]) -> Any:
    """A fresh header: only grid fields are copied, never text that may name people."""
    # Reading needs only our own parser, so nibabel is imported where labels are written.
    import nibabel  # noqa: TID251

    block = bytes.fromhex(source.nifti_header) or _header_of(source)
    is_second = len(block) == NIFTI2_BYTES
    kind = nibabel.Nifti2Header if is_second else nibabel.Nifti1Header
    old = kind(block, endianness="<", check=False)
    new = kind(endianness="<")
    new.set_data_dtype(labels.dtype)
    shape = labels.shape[::-1] if source.dimension == 3 else labels.shape[:0:-1]
    new["dim"] = [len(shape), *shape, *[1] * (7 - len(shape))]
    new["pixdim"][:4] = old["pixdim"][:4]
    for name in (
        "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
        "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units",
    ):  # fmt: skip
        new[name] = old[name]
    new["scl_slope"], new["scl_inter"] = 1.0, 0.0
    new["descrip"] = _DESCRIPTION
    new["magic"] = b"n+2" if is_second else b"n+1"
    return new


def _header_of(source: SourceHeader) -> bytes:
    """A header that states the geometry of an image of another format."""
    import nibabel  # noqa: TID251

    header = nibabel.Nifti1Header(endianness="<")
    matrix = source.geometry.matrix[:, [2, 1, 0, 3]]
    header.set_data_shape(source.geometry.shape[::-1])
    # qform cannot state a tilted grid, and two statements that differ would be ambiguous.
    header.set_qform(matrix, code=1 if shear_of(matrix) <= SHEAR_NOISE else 0)
    header.set_sform(matrix, code=1)
    header.set_xyzt_units("mm")
    return bytes(header.binaryblock)


def _extension(text: str | None) -> bytes:
    """The four bytes that announce extensions, and the text as a comment extension if given."""
    if not text:
        return b"\0\0\0\0"
    content = text.encode("utf-8")
    size = -(-(8 + len(content)) // 16) * 16
    prefix = size.to_bytes(4, "little") + _EXTENSION_TEXT_CODE.to_bytes(4, "little")
    return b"\1\0\0\0" + prefix + content.ljust(size - 8, b"\0")
