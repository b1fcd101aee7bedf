"""Proof that NRRD, MetaImage and GIPL files are whole, before SimpleITK sees them.

SimpleITK accepts damaged MetaImage streams, wrong NRRD checksums and short GIPL files. Files that
point at voxels in other files are refused: they could name any file of the machine.
"""

import math
import re
import zlib
from pathlib import Path
from typing import BinaryIO

from medmamba.errors import InputError
from medmamba.io.payload import CHUNK_BYTES, open_regular

_TEXT_HEADER_BYTES = 1 << 16
_GIPL_HEADER_BYTES = 256
_GIPL_MAGICS = (b"\xef\xff\xe9\xb0", b"\x2a\xe3\x89\xb8")
_GIPL_BITS = {1: 1, 7: 8, 8: 8, 15: 16, 16: 16, 31: 32, 32: 32, 64: 32, 65: 64}
_META_BYTES = {
    "CHAR": 1, "UCHAR": 1, "SHORT": 2, "USHORT": 2, "INT": 4, "UINT": 4, "LONG": 4, "ULONG": 4,
    "LONG_LONG": 8, "ULONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8,
}  # fmt: skip
_NRRD_BYTES = {"char": 1, "int8": 1, "short": 2, "int16": 2, "int": 4, "int32": 4, "float": 4,
               "double": 8, "int64": 8, "long": 8}  # fmt: skip
_META_DATA = re.compile(rb"ElementDataFile[ \t]*=[ \t]*(\S+)[ \t]*\r?\n", re.IGNORECASE)
_NRRD_DATA = re.compile(rb"^data ?file:", re.IGNORECASE | re.MULTILINE)
_NRRD_END = re.compile(rb"\r?\n\r?\n")


def judge_start(path: Path) -> None:
    """Refuse what is not of its suffix's format, or keeps its voxels in another file.

    Raises:
        InputError: empty, another format, or detached voxels.
    """
    with open_regular(path) as file:
        start = file.read(_TEXT_HEADER_BYTES)
    if not start:
        raise InputError(f"{path.name}: is empty (0 bytes). Copy it again.", code="E_IO_EMPTY")
    kind, detached = path.suffix.lower(), False
    if kind == ".nrrd":
        known = start.startswith(b"NRRD000")
        detached = bool(_NRRD_DATA.search(_NRRD_END.split(start, maxsplit=1)[0]))
    elif kind == ".mha":
        data = _META_DATA.search(start)
        known = b"NDims" in start and data is not None
        detached = data is not None and data[1].upper() != b"LOCAL"
    else:
        known = len(start) >= _GIPL_HEADER_BYTES and start[252:256] in _GIPL_MAGICS
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


def prove_payload(path: Path) -> None:
    """Require as many bytes of voxels as the header announces, with correct checksums.

    Raises:
        InputError: truncated or damaged.
    """
    prove = {".nrrd": _prove_nrrd, ".mha": _prove_meta}.get(path.suffix.lower(), _prove_gipl)
    with open_regular(path) as file:
        start = file.read(_TEXT_HEADER_BYTES)
        prove(file, start, path.name)


def _prove_nrrd(file: BinaryIO, start: bytes, name: str) -> None:
    end = _NRRD_END.search(start)
    if end is None:
        raise _truncated(name, 1, 0)
    pairs = re.findall(r"^([\w ]+): *(.*?)\r?$", start[: end.start()].decode("latin-1"), re.M)
    fields = {key.strip().lower(): value.strip().lower() for key, value in pairs}
    if fields.get("encoding") not in ("gzip", "gz"):
        return  # SimpleITK counts the bytes of raw voxels itself
    kind = re.sub(r"^u(?:nsigned )?|^signed |(?<=\d)_t$", "", fields.get("type", ""))
    needed = _product(fields.get("sizes", "")) * _NRRD_BYTES.get(kind, 0)
    _require_stream(file, end.end(), name, needed, window=31)


def _prove_meta(file: BinaryIO, start: bytes, name: str) -> None:
    data = _META_DATA.search(start)
    assert data is not None  # judge_start saw it
    fields = dict(
        re.findall(r"(\w+)[ \t]*=[ \t]*([^\r\n]*)", start[: data.end()].decode("latin-1"))
    )
    kind = fields.get("ElementType", "").strip().removeprefix("MET_").removesuffix("_ARRAY")
    channels = _product(fields.get("ElementNumberOfChannels", "1"))
    needed = _product(fields.get("DimSize", "")) * _META_BYTES.get(kind, 0) * channels
    if fields.get("BinaryData", "True").strip().lower() in ("false", "0"):
        return
    if fields.get("CompressedData", "False").strip().lower() in ("true", "1"):
        _require_stream(file, data.end(), name, needed, window=15)
        return
    file.seek(0, 2)
    if file.tell() - data.end() < needed:
        raise _truncated(name, needed, file.tell() - data.end())


def _prove_gipl(file: BinaryIO, start: bytes, name: str) -> None:
    # Four big-endian sizes, then the type code (format of the Guys Image Processing Lab).
    numbers = [int.from_bytes(start[at : at + 2], "big") for at in range(0, 10, 2)]
    needed = math.prod(max(1, size) for size in numbers[:4]) * _GIPL_BITS.get(numbers[4], 8) // 8
    file.seek(0, 2)
    found = file.tell() - _GIPL_HEADER_BYTES
    if found < needed:
        raise _truncated(name, needed, found)


def _product(text: str) -> int:
    numbers = re.findall(r"\d+", text)
    return math.prod(int(number) for number in numbers) if numbers else 0


def _require_stream(file: BinaryIO, offset: int, name: str, needed: int, *, window: int) -> None:
    file.seek(offset)
    found = _inflated_size(file, name, needed + 1, window)
    if needed and found != needed:
        raise _truncated(name, needed, found)


def _inflated_size(file: BinaryIO, name: str, most: int, window: int) -> int:
    inflater, total = zlib.decompressobj(window), 0
    while not inflater.eof and (total < most or most == 1):
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


def _truncated(name: str, needed: int, found: int) -> InputError:
    return InputError(
        f"{name}: voxels need {needed} bytes, {found} are there. Copy the file again.",
        code="E_IO_TRUNCATED",
    )
