"""The table: files a hospital may send, and what must become of each (rows A to D)."""

import gzip
import os
import zlib
from pathlib import Path

import numpy as np

from .phantom import AFFINE, Row, file, good, nifti, packed, spoiled, voxels

PLAIN = nifti()
PACKED = packed(PLAIN)
NAN, INF = float("nan"), float("inf")


def _flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :]


def _sheared(amount: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[0, 2] = amount * 2.0
    return affine


def _rotated(degrees: float) -> np.ndarray:
    angle = np.deg2rad(degrees)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn @ AFFINE


def _with_nan(fraction: float) -> np.ndarray:
    array = voxels().astype(np.float32)
    array.reshape(-1)[: int(fraction * array.size)] = np.nan
    return array


def _fifo(folder: Path, case: str) -> None:
    os.mkfifo(folder / f"{case}_0000.nii.gz")


def _directory(folder: Path, case: str) -> None:
    (folder / f"{case}_0000.nii.gz").mkdir()


def _second_channel(folder: Path, case: str) -> None:
    for channel in range(2):
        (folder / f"{case}_{channel:04d}.nii.gz").write_bytes(PACKED)


def _loop(folder: Path, case: str) -> None:
    path = folder / f"{case}_0000.nii.gz"
    path.symlink_to(path.name)


def _escape(folder: Path, case: str) -> None:
    outside = folder.parent / "outside.nii.gz"
    outside.write_bytes(PACKED)
    (folder / f"{case}_0000.nii.gz").symlink_to(outside)


def _pair(folder: Path, case: str) -> None:
    header = bytearray(nifti()[:352])
    header[344:348] = b"ni1\0"
    (folder / f"{case}_0000.hdr").write_bytes(bytes(header))
    (folder / f"{case}_0000.img").write_bytes(PLAIN[352:])


def _big_endian() -> bytes:
    import nibabel

    header = nibabel.Nifti1Header(endianness=">")
    image = nibabel.Nifti1Image(voxels(), AFFINE, header)
    image.set_sform(AFFINE, 1)
    image.set_qform(AFFINE, 1)
    image.header.set_xyzt_units("mm")
    return bytes(image.to_bytes())


FILES = [
    Row("A01", file(PACKED[: len(PACKED) // 2]), code="E_IO_TRUNCATED"),
    Row("A02", file(packed(PLAIN[: len(PLAIN) // 2])), code="E_IO_TRUNCATED"),
    Row("A03", file(packed(PLAIN[:352])), code="E_IO_TRUNCATED"),
    Row("A04", file(packed(PLAIN[:200])), code="E_HDR_SHORT"),
    Row("A05", file(b""), code="E_IO_EMPTY"),
    Row("A06", file(_flipped(PACKED, len(PACKED) // 2)), code="E_IO_CORRUPT"),
    Row("A07", file(_flipped(PACKED, len(PACKED) - 8)), code="E_IO_CORRUPT"),
    Row("A08", file(PLAIN), "ok_with_warnings", "W_IO_NOT_GZIP"),
    Row("A09", file(PACKED, ".nii"), "ok_with_warnings", "W_IO_GZIP"),
    Row("A10", file(b"<html><body>502 Bad Gateway</body></html>" * 20), code="E_IO_FORMAT"),
    Row("A11", file(PACKED + b"\0" * 64), "ok_with_warnings", "W_IO_TRAILING"),
    Row("A12", file(gzip.compress(PLAIN[:5000]) + gzip.compress(PLAIN[5000:])), "ok"),
    Row("A14", file(packed(PLAIN + b"\0" * 200_000_000)), code="E_IO_TRAILING"),
    Row("A15", good(spoiled(PLAIN, dim1=32767, dim3=32767)), code="E_LIMIT_VOXELS"),
    Row("A16", _fifo, code="E_PATH_NOTFILE"),
    Row("A16b", _directory, code="E_PATH_NOTFILE"),
]

HEADERS = [
    Row("B01", good(spoiled(PLAIN, magic=b"\0\0\0\0")), code="E_HDR_MAGIC"),
    Row("B02", good(spoiled(PLAIN, datatype=9999)), code="E_HDR_DTYPE"),
    Row("B02b", good(spoiled(PLAIN, bitpix=32)), code="E_HDR_DTYPE"),
    Row("B03", good(spoiled(PLAIN, dim0=0)), code="E_HDR_DIM"),
    Row("B03b", good(spoiled(PLAIN, dim0=9)), code="E_HDR_DIM"),
    Row("B03c", good(spoiled(PLAIN, dim1=-20)), code="E_HDR_DIM"),
    Row("B03d", good(spoiled(PLAIN, dim3=0)), code="E_HDR_DIM"),
    Row("B04", good(spoiled(PLAIN, vox_offset=-1.0)), code="E_HDR_OFFSET"),
    Row("B04b", good(spoiled(PLAIN, vox_offset=NAN)), code="E_HDR_OFFSET"),
    Row("B04c", good(spoiled(PLAIN, vox_offset=1e9)), code="E_HDR_OFFSET"),
    Row("B05", _pair, code="E_IO_FORMAT"),
    Row("B06", good(_big_endian()), "ok"),
    Row("B07", good(nifti(version=2)), "ok"),
    Row("B08", good(spoiled(PLAIN, scl_slope=0.0)), "ok"),
    Row("B08b", good(spoiled(PLAIN, scl_slope=NAN)), "ok"),
    Row("B08c", good(spoiled(PLAIN, scl_slope=INF)), code="E_HDR_SCALE"),
    Row("B09", good(spoiled(PLAIN, sform_code=0, pixdim1=0.0)), code="E_GEOM_SPACING"),
    Row("B09b", good(spoiled(PLAIN, sform_code=0, pixdim2=NAN)), code="E_GEOM_SPACING"),
    Row("B10", good(spoiled(PLAIN, sform_code=0, pixdim1=-1.0)), code="E_GEOM_SPACING"),
    Row(
        "B11",
        good(spoiled(PLAIN, sform_code=0, quatern_b=0.9, quatern_c=0.9)),
        code="E_GEOM_QUATERN",
    ),
    Row(
        "B12",
        good(spoiled(PLAIN, qform_code=0, srow_x=(0.0,) * 4, srow_y=(0.0,) * 4)),
        code="E_GEOM_SINGULAR",
    ),
    Row("B12b", good(spoiled(PLAIN, qform_code=0, srow_x=(NAN,) * 4)), code="E_GEOM_SINGULAR"),
    Row(
        "B12c",
        good(spoiled(PLAIN, srow_x=(0.0,) * 4, srow_y=(0.0,) * 4)),
        "ok_with_warnings",
        "W_GEOM_SFORM",
    ),
    Row("B13", good(nifti(affine=_sheared(0.8), codes=(1, 0))), code="E_GEOM_SHEAR"),
    Row(
        "B14",
        good(nifti(affine=_sheared(0.3), codes=(1, 0))),
        "ok_with_warnings",
        "W_GEOM_RESAMPLED",
    ),
    Row("B15", good(nifti(affine=_sheared(1e-4), codes=(1, 0))), "ok"),
    Row("B16", good(nifti(qform=_rotated(20))), code="E_GEOM_AMBIGUOUS"),
    Row("B17", good(nifti(qform=_rotated(20), codes=(4, 1))), "ok_with_warnings"),
    Row("B18", good(nifti(codes=(0, 0))), code="E_GEOM_UNCODED"),
    Row("B19", good(spoiled(PLAIN, xyzt_units=1)), code="E_GEOM_SPACING"),
    Row(
        "B19b",
        good(nifti(affine=np.diag([1e-3, 1e-3, 1e-3, 1.0]) @ AFFINE, xyzt_units=1)),
        "ok_with_warnings",
    ),
    Row(
        "B19c",
        good(nifti(affine=np.diag([1e3, 1e3, 1e3, 1.0]) @ AFFINE, xyzt_units=3)),
        "ok_with_warnings",
    ),
    Row("B20", good(spoiled(PLAIN, xyzt_units=0)), "ok"),
    Row("B21", good(nifti(affine=AFFINE @ np.diag([-1.0, 1, -1, 1]))), "ok"),
    Row("B22", good(nifti(affine=_rotated(30))), "ok"),
    Row("B23", good(nifti(affine=np.diag([-1.0, 1, 1, 1]) @ AFFINE)), "ok"),
]

CONTENTS = [
    Row("C01", good(nifti(voxels()[..., None])), "ok"),
    Row("C02", good(nifti(np.stack([voxels()] * 3, axis=-1))), code="E_SHAPE_4D"),
    Row("C03", good(nifti(voxels()[:, :, 0])), code="E_SHAPE_NDIM"),
    Row("C03b", good(nifti(np.zeros((4, 4, 4, 1, 2), np.int16))), code="E_SHAPE_NDIM"),
    Row("C04", good(nifti(voxels().astype(np.complex64))), code="E_HDR_DTYPE"),
    Row("C05", good(nifti(voxels().astype(np.float64))), "ok"),
    Row("C06", good(nifti(_with_nan(0.1))), "ok_with_warnings", "W_VAL_NONFINITE"),
    Row("C07", good(nifti(_with_nan(0.6))), code="E_VAL_NONFINITE"),
    Row("C07b", good(nifti(_with_nan(1.0))), code="E_VAL_NONFINITE"),
    Row("C08", good(nifti(np.full((20, 24, 16), 3, np.int16))), code="E_VAL_CONSTANT"),
    Row("C09", good(nifti(voxels()[:, :, :1])), "ok_with_warnings", "W_SHAPE_SMALL"),
    Row("C09b", good(nifti(voxels()[8:11, 10:13, 7:9])), "ok_with_warnings", "W_SHAPE_SMALL"),
    Row("C13", _second_channel, code="E_CHAN_COUNT"),
    Row(
        "C15",
        good(nifti((voxels() > 250).astype(np.uint8))),
        "ok_with_warnings",
        "W_VAL_FEWLEVELS",
    ),
]

PATHS = [
    Row("D02", _escape, code="E_PATH_ESCAPE"),
    Row("D03", _loop, code="E_PATH_LOOP"),
]

ROWS = [*FILES, *HEADERS, *CONTENTS, *PATHS]

assert zlib.crc32(PLAIN) == zlib.crc32(nifti()), "the phantom must not change between calls"
