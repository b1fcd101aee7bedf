"""The NIfTI-1 and NIfTI-2 header, parsed and judged without trusting it.

Sizes, types, offsets and scaling (nifti1.h and nifti2.h of the standard). ``nifti_geometry`` judges
where the voxels lie in space; nothing here opens files or allocates voxels.
"""

import math
import struct
from dataclasses import dataclass
from typing import Literal

from medmamba.errors import InputError
from medmamba.io.affine import judge_voxels
from medmamba.io.header import Finding, Gate

NIFTI1_BYTES = 348
NIFTI2_BYTES = 540
MAX_OFFSET_BYTES = 64 << 20
"""Largest header extension area that is believed; real ones hold kilobytes."""

Version = Literal[1, 2]

DATA_TYPES: dict[int, str] = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8",
    256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
"""Data type codes that are read, as numpy type strings without byte order."""

_OTHER_TYPES = {
    1: "single bits", 32: "complex numbers", 128: "RGB colours", 1536: "128-bit floats",
    1792: "complex numbers", 2048: "complex numbers", 2304: "RGBA colours",
}  # fmt: skip

# Field layouts in file order, without byte order; text fields are skipped by "x" where unused.
_LAYOUT1 = "i10s18sihcb8h3f4h8f3fhbb4f2i80s24s2h6f12f16s4s"
_LAYOUT2 = "i8s2h8q3d8dq2d2d2d2q80s24s2i6d12d3i16sb15s"
_MAGIC1 = b"n+1\0"
_MAGIC2 = b"n+2\0\r\n\x1a\n"
_PAIR_MAGICS = (b"ni1\0", b"ni2\0")


@dataclass(frozen=True, kw_only=True)
class NiftiHeader:
    """The fields of a single-file NIfTI header that decide how its voxels are read.

    Args:
        version: 1 or 2.
        byte_order: ``<`` or ``>``.
        shape: sizes along (x, y, z, t, ...), as many as the file declares.
        type_code: NIfTI data type.
        bits: bits per value as declared.
        offset: first byte of the voxels.
        slope: factor applied to stored values; 0 or NaN means none.
        intercept: added after scaling.
        pixdim: all eight grid spacings; the first holds the handedness of the quaternion.
        qform_code: meaning of the quaternion transform, 0 when there is none.
        sform_code: meaning of the affine transform, 0 when there is none.
        quaternion: b, c, d of a unit quaternion.
        quaternion_offset: translation belonging to the quaternion.
        sform: three rows of four.
        units: code of spatial and temporal units.
    """

    version: Version
    byte_order: str
    shape: tuple[int, ...]
    type_code: int
    bits: int
    offset: float
    slope: float
    intercept: float
    pixdim: tuple[float, ...]
    qform_code: int
    sform_code: int
    quaternion: tuple[float, float, float]
    quaternion_offset: tuple[float, float, float]
    sform: tuple[tuple[float, float, float, float], ...]
    units: int

    @property
    def header_bytes(self) -> int:
        """Size of the fixed header."""
        return NIFTI1_BYTES if self.version == 1 else NIFTI2_BYTES

    @property
    def dtype(self) -> str:
        """Numpy type string of the stored values, with byte order."""
        return self.byte_order + DATA_TYPES[self.type_code]

    @property
    def voxels(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def data_bytes(self) -> int:
        """Size of the values in the file."""
        return self.voxels * int(DATA_TYPES[self.type_code][1:])

    @property
    def scaling(self) -> tuple[float, float] | None:
        """Slope and intercept, or None where stored values are the values (slope 0 or NaN)."""
        if self.slope == 0 or math.isnan(self.slope):
            return None
        intercept = 0.0 if math.isnan(self.intercept) else self.intercept
        return None if (self.slope, intercept) == (1.0, 0.0) else (self.slope, intercept)


def recognise(start: bytes, name: str) -> tuple[Version, str]:
    """Tell version and byte order from the first bytes of a decoded file.

    Raises:
        InputError: it is not a NIfTI file (E_IO_FORMAT) or too short to be one (E_HDR_SHORT).
    """
    for order in "<>":
        size = struct.unpack(order + "i", start[:4])[0] if len(start) >= 4 else 0
        if size == NIFTI1_BYTES:
            return 1, order
        if size == NIFTI2_BYTES:
            return 2, order
    if len(start) < NIFTI1_BYTES and not _looks_like_text(start):
        raise _too_short(name, len(start), NIFTI1_BYTES)
    hint = "it begins like a text or web page" if _looks_like_text(start) else "unknown contents"
    raise InputError(
        f"{name}: is not a NIfTI file ({hint}). Download or convert it again.", code="E_IO_FORMAT"
    )


def parse_header(block: bytes, name: str) -> NiftiHeader:
    """Read the fields of a header; ``judge_header`` decides whether they can be used.

    Raises:
        InputError: too short, not NIfTI, of the ANALYZE format, or one half of a file pair.
    """
    version, order = recognise(block, name)
    needed = NIFTI1_BYTES if version == 1 else NIFTI2_BYTES
    if len(block) < needed:
        raise _too_short(name, len(block), needed)
    magic = block[344:348] if version == 1 else block[4:12]
    if magic[:4] in _PAIR_MAGICS:
        raise InputError(
            f"{name}: is the header of a .hdr/.img pair. Convert the pair to one .nii.gz file.",
            code="E_IO_FORMAT",
        )
    if magic != (_MAGIC1 if version == 1 else _MAGIC2):
        raise InputError(
            f"{name}: has no NIfTI mark in its header (found {magic!r}; ANALYZE 7.5 says nothing "
            "of left and right). Convert it to NIfTI from its source.",
            code="E_HDR_MAGIC",
        )
    return _parse1(block, order) if version == 1 else _parse2(block, order)


def _parse1(block: bytes, order: str) -> NiftiHeader:
    at = struct.Struct(order + _LAYOUT1).unpack(block[:NIFTI1_BYTES])
    # 0 size, 1-6 unused, 7-14 dim, 15-17 intent, 18 intent code, 19 type, 20 bits, 21 slice,
    # 22-29 pixdim, 30 offset, 31 slope, 32 inter, 33 slice end, 34 slice code, 35 units, ...
    return NiftiHeader(
        version=1, byte_order=order,
        shape=_declared_shape(at[7:15]), type_code=at[19], bits=at[20],
        offset=at[30], slope=at[31], intercept=at[32],
        pixdim=at[22:30], units=at[35] & 0xFF,
        qform_code=at[44], sform_code=at[45], quaternion=at[46:49],
        quaternion_offset=at[49:52], sform=(at[52:56], at[56:60], at[60:64]),
    )  # fmt: skip


def _parse2(block: bytes, order: str) -> NiftiHeader:
    at = struct.Struct(order + _LAYOUT2).unpack(block[:NIFTI2_BYTES])
    # 0 size, 1 magic, 2 type, 3 bits, 4-11 dim, 12-14 intent, 15-22 pixdim, 23 offset, 24 slope,
    # 25 inter, 26-27 cal, 28-29 slice times, 30-31 slice range, 32-33 text, 34-35 codes,
    # 36-38 quaternion, 39-41 its offset, 42-53 sform, 54 slice code, 55 units, ...
    return NiftiHeader(
        version=2, byte_order=order,
        shape=_declared_shape(at[4:12]), type_code=at[2], bits=at[3],
        offset=float(at[23]), slope=at[24], intercept=at[25],
        pixdim=at[15:23], units=at[55] & 0xFF,
        qform_code=at[34], sform_code=at[35], quaternion=at[36:39],
        quaternion_offset=at[39:42], sform=(at[42:46], at[46:50], at[50:54]),
    )  # fmt: skip


def _declared_shape(dim: tuple[int, ...]) -> tuple[int, ...]:
    # A count outside 1..7 is kept as an impossible shape, so that judging finds it.
    return dim[1 : dim[0] + 1] if 1 <= dim[0] <= 7 else (0,)


def judge_header(header: NiftiHeader, name: str, gate: Gate) -> list[Finding]:
    """Refuse a header that cannot be right; return what is odd about one that can.

    Raises:
        InputError: impossible sizes, unsupported types, bad offsets or scaling, or over the limit.
    """
    _judge_shape(header, name)
    _judge_type(header, name)
    _judge_offset(header, name)
    judge_voxels(header.voxels, name, gate)
    if gate.max_bytes is not None and header.data_bytes > gate.max_bytes:
        raise InputError(
            f"{name}: needs {header.data_bytes} bytes; {gate.max_bytes} are allowed. "
            "Use a machine with more memory, or raise the limit.",
            code="E_LIMIT_RAM",
        )
    return _judge_scaling(header, name)


def _judge_shape(header: NiftiHeader, name: str) -> None:
    if min(header.shape) < 1:
        raise InputError(
            f"{name}: declares sizes {header.shape}; each of 1 to 7 must be positive. "
            "Write the file again from its source.",
            code="E_HDR_DIM",
        )
    meaningful = len(header.shape)
    while meaningful > 4 and header.shape[meaningful - 1] == 1:
        meaningful -= 1
    if not 2 <= meaningful <= 4:
        raise InputError(
            f"{name}: has {meaningful} dimensions {header.shape}; 2, 3 or 4 can be read. "
            "Split it into images of three dimensions.",
            code="E_SHAPE_NDIM",
        )


def _judge_type(header: NiftiHeader, name: str) -> None:
    code = header.type_code
    if code not in DATA_TYPES:
        kind = _OTHER_TYPES.get(code, "an unknown type")
        raise InputError(
            f"{name}: voxels are of data type {code} ({kind}). Convert it to integers or floats.",
            code="E_HDR_DTYPE",
        )
    expected = 8 * int(DATA_TYPES[code][1:])
    if header.bits != expected:
        raise InputError(
            f"{name}: header says {header.bits} bits a voxel, but data type {code} has "
            f"{expected}. Write the file again from its source.",
            code="E_HDR_DTYPE",
        )


def _judge_offset(header: NiftiHeader, name: str) -> None:
    offset = header.offset
    # 4 bytes after the fixed header announce extensions, hence 352 and 544.
    least = header.header_bytes + 4
    whole = math.isfinite(offset) and offset == int(offset)
    if not whole or not least <= offset <= MAX_OFFSET_BYTES:
        raise InputError(
            f"{name}: voxels are said to begin at byte {offset:g}; {least} to {MAX_OFFSET_BYTES} "
            "are possible. Write the file again from its source.",
            code="E_HDR_OFFSET",
        )


def _judge_scaling(header: NiftiHeader, name: str) -> list[Finding]:
    if math.isinf(header.slope) or (header.slope != 0 and math.isinf(header.intercept)):
        raise InputError(
            f"{name}: intensity scaling is {header.slope:g} and {header.intercept:g}; "
            "finite numbers are needed. Write the file again from its source.",
            code="E_HDR_SCALE",
        )
    return []


def _looks_like_text(start: bytes) -> bool:
    sample = start[:256]
    return bool(sample) and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in sample)


def _too_short(name: str, found: int, needed: int) -> InputError:
    return InputError(
        f"{name}: has {found} bytes; a NIfTI header alone needs {needed}. Copy it again.",
        code="E_HDR_SHORT",
    )


def portable_header(block: bytes, header: NiftiHeader) -> bytes:
    """Return the fixed header in little-endian order with every free-text field emptied.

    Bits of numbers are kept; text may hold names of people, so none is passed on.
    """
    layout = _LAYOUT1 if header.version == 1 else _LAYOUT2
    fields = list(struct.unpack(header.byte_order + layout, block[: header.header_bytes]))
    # data_type, db_name, descrip, aux_file, intent_name; and descrip, aux_file, intent_name.
    text = (1, 2, 42, 43, 64) if header.version == 1 else (32, 33, 57, 59)
    for index in text:
        fields[index] = b""
    return struct.pack("<" + layout, *fields)
