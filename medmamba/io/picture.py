"""PNG, BMP and TIFF in and out: the only door to pillow and tifffile for voxels.

A plane becomes (C, 1, H, W) with nnU-Net's spacing of 999 x 1 x 1; colours become channels. TIFF
stacks are volumes whose spacing, if known, stands in ``<case>.json`` beside them.
"""

import io
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from medmamba.errors import InputError
from medmamba.files import read_json, write_atomic
from medmamba.io.affine import PLANE_SLICE_MM, judge_voxels
from medmamba.io.header import Finding, Gate, SourceHeader
from medmamba.io.payload import open_regular
from medmamba.volume import Geometry

PLANE_SPACING_MM = (PLANE_SLICE_MM, 1.0, 1.0)
_MAGICS = {
    ".png": (b"\x89PNG\r\n\x1a\n",),
    ".bmp": (b"BM",),
    ".tif": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
}
_GREY_MODES = ("1", "L", "I;16", "I;16B", "I", "F")
_COLOUR_MODES = {"P": "RGB", "PA": "RGBA", "RGB": "RGB", "RGBA": "RGBA", "CMYK": "RGB"}
_TIFF_SUFFIXES = (".tif", ".tiff")


def read(
    path: Path, gate: Gate, *, labels: bool = False
) -> tuple[NDArray[np.generic], SourceHeader]:
    """Return stored values as (C, D, H, W) and the header.

    Raises:
        InputError: the file cannot be trusted.
    """
    with open_regular(path) as file:
        _judge_start(file, path)
        try:
            if path.suffix.lower() in _TIFF_SUFFIXES:
                return _read_tiff(path, gate)
            return _read_picture(file, path, gate, labels=labels)
        except InputError:
            raise
        except Exception as problem:  # decoders raise errors of many classes on damaged files
            raise _damaged(path, problem) from problem


def read_header(path: Path, gate: Gate) -> SourceHeader:
    """Return the header; pictures are small, so this reads the whole file.

    Raises:
        InputError: the file cannot be trusted.
    """
    return read(path, gate)[1]


def _judge_start(file: BinaryIO, path: Path) -> None:
    start = file.read(16)
    file.seek(0)
    if not start:
        raise InputError(f"{path.name}: is empty (0 bytes). Copy it again.", code="E_IO_EMPTY")
    kind = ".tif" if path.suffix.lower() in _TIFF_SUFFIXES else path.suffix.lower()
    if not start.startswith(_MAGICS[kind]):
        raise InputError(
            f"{path.name}: is not a {kind[1:].upper()} file. Download or convert it again.",
            code="E_IO_FORMAT",
        )


def _damaged(path: Path, problem: Exception) -> InputError:
    reason = str(problem) or type(problem).__name__
    short = "truncated" in reason.lower() or isinstance(problem, EOFError | struct.error)
    return InputError(
        f"{path.name}: cannot be decoded ({reason[:160]}). Copy it again.",
        code="E_IO_TRUNCATED" if short else "E_IO_CORRUPT",
    )


def _read_picture(
    file: BinaryIO, path: Path, gate: Gate, *, labels: bool
) -> tuple[NDArray[np.generic], SourceHeader]:
    from PIL import Image

    with Image.open(file, formats=[path.suffix[1:].upper()]) as picture:
        judge_voxels(picture.width * picture.height, path.name, gate)
        mode = picture.mode
        if mode in _GREY_MODES or (labels and mode == "P"):
            values = np.asarray(picture)
        elif mode in _COLOUR_MODES:
            values = np.asarray(picture.convert(_COLOUR_MODES[mode]))
        else:
            raise InputError(
                f"{path.name}: is of colour mode {mode}. Convert it to grey or RGB.",
                code="E_HDR_DTYPE",
            )
    if values.dtype == np.bool_:
        values = values.astype(np.uint8)
    array = values[np.newaxis] if values.ndim == 2 else np.moveaxis(values, -1, 0)
    return _plane(array, path)


def _plane(array: NDArray[Any], path: Path) -> tuple[NDArray[np.generic], SourceHeader]:
    channels, height, width = array.shape
    return array[:, np.newaxis], SourceHeader(
        format="picture",
        suffix=path.suffix.lower(),
        dimension=2,
        geometry=Geometry.from_spacing((1, height, width), PLANE_SPACING_MM),
        channels=channels,
        stored_type=array.dtype.name,
    )


def _read_tiff(path: Path, gate: Gate) -> tuple[NDArray[np.generic], SourceHeader]:
    import tifffile

    with tifffile.TiffFile(path) as document:
        series = document.series[0]
        judge_voxels(int(series.size), path.name, gate)
        _prove_segments(document, path)
        array, axes = series.asarray(), series.axes
    if array.dtype.kind not in "biuf":
        raise InputError(
            f"{path.name}: voxels are of type {array.dtype}. Convert it to integers or floats.",
            code="E_HDR_DTYPE",
        )
    if array.dtype == np.bool_:
        array = array.astype(np.uint8)
    if array.ndim == 2:
        return _plane(array[np.newaxis], path)
    if array.ndim == 3 and axes.endswith("S"):
        return _plane(np.moveaxis(array, -1, 0), path)
    if array.ndim != 3:
        raise InputError(
            f"{path.name}: has axes {axes} {array.shape}; a plane, a colour plane or a stack can "
            "be read. Split it into stacks of one channel.",
            code="E_SHAPE_NDIM",
        )
    spacing, findings = _stack_spacing(path)
    return array[np.newaxis], SourceHeader(
        format="tiff",
        suffix=path.suffix.lower(),
        dimension=3,
        geometry=Geometry.from_spacing(array.shape, spacing),
        stored_type=array.dtype.name,
        warnings=tuple(str(item) for item in findings),
    )


def _prove_segments(document: Any, path: Path) -> None:
    """Require every strip and tile to lie inside the file: decoders fill gaps with zeros."""
    size = document.filehandle.size
    for page in document.series[0].pages:
        if page is None:
            raise EOFError("truncated: a page is missing")
        offsets, counts = page.dataoffsets, page.databytecounts
        if any(start + count > size for start, count in zip(offsets, counts, strict=True)):
            raise EOFError("truncated: pixel data lie beyond the end of the file")


def _stack_spacing(path: Path) -> tuple[tuple[float, float, float], list[Finding]]:
    """Spacing (z, y, x) from the JSON file of the case, shared by its channels and labels."""
    stem = path.name[: -len(path.suffix)]
    for name in dict.fromkeys((re.sub(r"_\d{4}$", "", stem), stem)):
        sidecar = path.with_name(f"{name}.json")
        if sidecar.is_file():
            value = read_json(sidecar, what=sidecar.name, error=InputError)
            spacing = value.get("spacing") if isinstance(value, dict) else None
            return _as_spacing(spacing, sidecar), []
    message = f"no {stem}.json with 'spacing' beside it; 1 x 1 x 1 mm is assumed."
    return (1.0, 1.0, 1.0), [Finding(code="W_GEOM_UNCODED", message=message)]


def _as_spacing(value: object, sidecar: Path) -> tuple[float, float, float]:
    numbers = value if isinstance(value, list) and len(value) == 3 else []
    if not numbers or not all(
        isinstance(item, int | float) and 0 < item < float("inf") for item in numbers
    ):
        raise InputError(
            f"{sidecar.name}: 'spacing' is {value!r}; three positive numbers (z, y, x) are needed.",
            code="E_GEOM_SPACING",
        )
    depth, height, width = (float(item) for item in numbers)
    return (depth, height, width)


def write(
    path: Path,
    labels: NDArray[np.integer[Any]],
    source: SourceHeader,
    *,
    label_text: str | None = None,
) -> None:
    """Write labels (D, H, W) as grey values: a plane, or a TIFF stack."""
    suffix = path.suffix.lower()
    if suffix in _TIFF_SUFFIXES:
        write_atomic(path, _tiff_bytes(labels if source.dimension == 3 else labels[0]))
        return
    if labels.shape[0] != 1:
        raise InputError(
            f"{path.name}: a {suffix} file holds one plane, the labels have {labels.shape[0]}. "
            "Write .nii.gz or .tif.",
            code="E_SHAPE_NDIM",
        )
    if suffix == ".bmp" and labels.dtype != np.uint8:
        raise InputError(
            f"{path.name}: BMP holds values up to 255. Write .png instead.", code="E_VAL_LABELS"
        )
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(labels[0]).save(buffer, format=suffix[1:].upper())
    write_atomic(path, buffer.getvalue())


def _tiff_bytes(labels: NDArray[np.integer[Any]]) -> bytes:
    import tifffile

    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer, labels, photometric="minisblack", compression="zlib", metadata=None, software=""
    )
    return buffer.getvalue()
