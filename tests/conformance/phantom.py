"""A 20 x 24 x 16 phantom as NIfTI bytes, and the means to spoil single fields of its header."""

import gzip
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray

AFFINE = np.array(
    [[1.0, 0, 0, -10], [0, 1.25, 0, 20.5], [0, 0, 2.0, 30.25], [0, 0, 0, 1.0]], dtype=np.float64
)

OFFSETS = {
    "sizeof_hdr": (0, "i"),
    "dim0": (40, "h"),
    "dim1": (42, "h"),
    "dim3": (46, "h"),
    "datatype": (70, "h"),
    "bitpix": (72, "h"),
    "pixdim1": (80, "f"),
    "pixdim2": (84, "f"),
    "vox_offset": (108, "f"),
    "scl_slope": (112, "f"),
    "scl_inter": (116, "f"),
    "xyzt_units": (123, "b"),
    "qform_code": (252, "h"),
    "sform_code": (254, "h"),
    "quatern_b": (256, "f"),
    "quatern_c": (260, "f"),
    "srow_x": (280, "4f"),
    "srow_y": (296, "4f"),
    "srow_z": (312, "4f"),
    "magic": (344, "4s"),
}
"""Byte offsets of NIfTI-1 fields (nifti1.h)."""


def voxels(seed: int = 7) -> NDArray[np.int16]:
    """Noise with a bright ellipsoid, (x, y, z)."""
    x, y, z = np.ogrid[:20, :24, :16]
    inside = ((x - 9) / 7) ** 2 + ((y - 12) / 9) ** 2 + ((z - 8) / 5) ** 2 < 1
    noise = np.random.default_rng(seed).integers(-40, 40, (20, 24, 16))
    return (noise + 500 * inside).astype(np.int16)


def nifti(
    array: NDArray[np.generic] | None = None,
    affine: NDArray[np.float64] = AFFINE,
    *,
    version: int = 1,
    qform: NDArray[np.float64] | None = None,
    codes: tuple[int, int] = (1, 1),
    **fields: object,
) -> bytes:
    """The phantom as an uncompressed file; ``fields`` are overwritten in the header afterwards."""
    kind = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
    image = kind(voxels() if array is None else array, affine)
    image.set_sform(affine, codes[0])
    image.set_qform(affine if qform is None else qform, codes[1])
    image.header.set_xyzt_units("mm")
    return spoiled(bytes(image.to_bytes()), **fields)


def spoiled(raw: bytes, **fields: object) -> bytes:
    """Overwrite header fields of a NIfTI-1 file."""
    data = bytearray(raw)
    for name, value in fields.items():
        offset, kind = OFFSETS[name]
        values = value if isinstance(value, tuple) else (value,)
        struct.pack_into("<" + kind, data, offset, *values)
    return bytes(data)


def packed(raw: bytes) -> bytes:
    """The same, compressed."""
    return gzip.compress(raw, 6, mtime=0)


@dataclass(frozen=True)
class Row:
    """One row of the table: an input, and what must become of it.

    Args:
        name: of the row; also the case.
        make: writes the case's files into a folder.
        status: ``ok``, ``ok_with_warnings`` or ``rejected``.
        code: of the error, or of a warning that must be there.
    """

    name: str
    make: Callable[[Path, str], None]
    status: str = "rejected"
    code: str = ""


def file(content: bytes, ending: str = ".nii.gz") -> Callable[[Path, str], None]:
    """A case of one channel file with these bytes."""

    def make(folder: Path, case: str) -> None:
        (folder / f"{case}_0000{ending}").write_bytes(content)

    return make


def good(raw: bytes) -> Callable[[Path, str], None]:
    """A case whose file is compressed as usual."""
    return file(packed(raw))
