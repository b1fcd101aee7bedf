"""Headers of DICOM files: what is read of them, and what is refused of damaged ones.

With ``dicom_series``, ``dicom_pixels``, ``dicom_seg`` and ``dicom_rtstruct`` the only door to
pydicom; it is imported here.
"""

import logging
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from medmamba.errors import EnvironmentFault, InputError
from medmamba.io.dicom_files import DICOM_SUFFIXES, MAGIC, PREAMBLE_BYTES, Entry, entries

HEADER_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "Modality",
    "ImageType", "SeriesNumber", "AcquisitionNumber", "InstanceNumber", "Rows", "Columns",
    "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness",
    "RescaleSlope", "RescaleIntercept", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "TemporalPositionIdentifier", "EchoNumbers",
]  # fmt: skip

PIXEL_TAGS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
DEFLATED_SYNTAX = "1.2.840.10008.1.2.1.99"
MAX_INFLATED_BYTES = 4 * 2**30
QUIET_MODULES = r"(pydicom|highdicom|medmamba\.io\.dicom)"
"""Where warnings of pydicom and highdicom come from, whichever caller they are put down to."""
DIRECTORY_CLASS = "1.2.840.10008.1.3.10"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A DICOM file's header."""

    entry: Entry
    dataset: Any
    has_pixels: bool

    def text(self, keyword: str) -> str:
        """A header value as text, empty when absent."""
        value = self.dataset.get(keyword)
        return "" if value is None else str(value)

    @property
    def sop_class(self) -> str:
        """Storage class: of the data set, or of the file's own header where that is empty."""
        own = self.text("SOPClassUID")
        meta = getattr(self.dataset, "file_meta", None)
        return own or str(getattr(meta, "MediaStorageSOPClassUID", "") or "")

    @property
    def frames(self) -> int:
        """Number of frames."""
        return int(self.dataset.get("NumberOfFrames") or 1)


def pydicom_module() -> Any:
    """Import pydicom, silent about odd but readable values.

    Raises:
        EnvironmentFault: it is not installed.
    """
    silence()
    return _import_pydicom()


def silence() -> None:
    """Keep libraries from printing values of files: what they complain of may name people."""
    warnings.filterwarnings("ignore", category=UserWarning, module=QUIET_MODULES)
    for name in ("pydicom", "highdicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@cache
def _import_pydicom() -> Any:
    try:
        import pydicom  # noqa: TID251
        import pydicom.config  # noqa: TID251
    except ImportError as problem:
        raise EnvironmentFault(
            f"DICOM: reading needs packages that are not installed ({problem.name}). "
            "Install them with: pip install 'medmamba[dicom]'.",
            code="E_DICOM_MISSING",
        ) from problem
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    return pydicom


def open_dataset(entry: Entry) -> Any:
    """Read a whole DICOM file.

    Raises:
        InputError: it is damaged.
    """
    data = entry.content()
    _judge_inflation(entry, data)
    try:
        return pydicom_module().dcmread(BytesIO(data), force=True)
    except Exception as problem:
        raise _damaged(entry, problem) from problem


def read_parts(path: Path) -> Iterable[Part]:
    """Read the headers of a case; files that are no DICOM are passed over.

    Raises:
        InputError: a file is damaged or cannot be read.
        EnvironmentFault: pydicom is not installed.
    """
    for entry in entries(path):
        part = _read_part(entry)
        if part is not None and part.sop_class != DIRECTORY_CLASS:
            yield part


def _read_part(entry: Entry) -> Part | None:
    """Read a header; None for a file that is no DICOM."""
    if entry.member is not None:
        return _parse(entry, entry.stream())
    try:
        with entry.path.open("rb") as stream:
            return _parse(entry, stream)
    except PermissionError as problem:
        raise InputError(
            f"{entry.name}: cannot be read ({problem.strerror}). Change its permissions.",
            code="E_IO_PERMISSION",
        ) from problem


def _parse(entry: Entry, stream: BinaryIO) -> Part | None:
    marked = stream.read(PREAMBLE_BYTES)[-4:] == MAGIC
    named = entry.name.lower().endswith(DICOM_SUFFIXES)
    if not marked and not named:
        return None
    if entry.size_bytes == 0:
        raise InputError(f"{entry.name}: is empty. Copy it again.", code="E_IO_EMPTY")
    stream.seek(0)
    dicom = pydicom_module()
    try:
        dataset = dicom.dcmread(
            stream, stop_before_pixels=True, force=True, specific_tags=HEADER_TAGS
        )
        if str(getattr(dataset.file_meta, "TransferSyntaxUID", "")) == DEFLATED_SYNTAX:
            # The stream was read to its end, inflated; whether pixels follow shows when reading.
            has_pixels = True
        else:
            has_pixels = _next_tag(stream) in PIXEL_TAGS
        part = Part(entry=entry, dataset=dataset, has_pixels=has_pixels)
        is_image = "Image Storage" in dicom.uid.UID(part.sop_class).name
    except Exception as problem:
        raise _damaged(entry, problem) from problem
    if not part.sop_class and "Rows" not in dataset:
        raise InputError(
            f"{entry.name}: is named like a DICOM file and is none. Remove it or copy it again.",
            code="E_IO_FORMAT",
        )
    if not has_pixels and (is_image or "Rows" in dataset):
        raise InputError(
            f"{entry.name}: ends before its pixels. Copy it again.", code="E_IO_TRUNCATED"
        )
    return part


def _next_tag(stream: BinaryIO) -> int:
    """The tag that follows in the stream, in either byte order if it is one of pixels."""
    raw = stream.read(4)
    if len(raw) < 4:
        return 0
    little = int.from_bytes(raw[:2], "little") << 16 | int.from_bytes(raw[2:], "little")
    return little if little in PIXEL_TAGS else int.from_bytes(raw, "big")


def _judge_inflation(entry: Entry, data: bytes) -> None:
    """Refuse a deflated file that would fill the memory, before pydicom inflates it whole."""
    head = data[:4096]
    if DEFLATED_SYNTAX.encode() not in head:
        return
    # After preamble and magic comes the length of the file's own header (PS3.10, 7.1).
    length_at = PREAMBLE_BYTES + 8
    start = length_at + 4 + int.from_bytes(data[length_at : length_at + 4], "little")
    try:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        total, rest = 0, data[start:]
        while rest and not inflater.eof:
            total += len(inflater.decompress(rest, 1 << 24))
            rest = inflater.unconsumed_tail
            if total > MAX_INFLATED_BYTES:
                raise InputError(
                    f"{entry.name}: inflates to over {MAX_INFLATED_BYTES} bytes. Do not trust it.",
                    code="E_LIMIT_ZIP",
                )
    except zlib.error as problem:
        raise _damaged(entry, problem) from problem
    if not inflater.eof:
        raise InputError(
            f"{entry.name}: the deflated data ends too early. Copy it again.",
            code="E_IO_TRUNCATED",
        )


def _damaged(entry: Entry, problem: Exception) -> InputError:
    short = isinstance(problem, EOFError)
    return InputError(
        f"{entry.name}: cannot be understood as DICOM ({type(problem).__name__}). Copy it again.",
        code="E_IO_TRUNCATED" if short else "E_IO_CORRUPT",
    )
