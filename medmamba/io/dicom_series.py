"""Which images of a DICOM case are the volume: headers read, series told apart, one of them chosen.

With ``dicom``, ``dicom_pixels`` and ``dicom_seg`` the only door to pydicom. The rule: everything
that is no cross-sectional image (localizers, secondary captures, reports, documents,
segmentations) is left aside and listed; of the series that remain the one with most images is
taken; where two have equally many, the case is rejected.
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

Vector = tuple[float, float, float]

HEADER_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "Modality",
    "ImageType", "SeriesNumber", "AcquisitionNumber", "InstanceNumber", "Rows", "Columns",
    "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness",
    "RescaleSlope", "RescaleIntercept", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "TemporalPositionIdentifier", "EchoNumbers",
]  # fmt: skip

PIXEL_TAGS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
LOCALIZER_WORDS = ("LOCALIZER", "SCOUT", "TOPOGRAM", "SURVEY")
DEFLATED_SYNTAX = "1.2.840.10008.1.2.1.99"
MAX_INFLATED_BYTES = 4 * 2**30
QUIET_MODULES = r"(pydicom|highdicom|medmamba\.io\.dicom)"
"""Where warnings of pydicom and highdicom come from, whichever caller they are put down to."""
DIRECTORY_CLASS = "1.2.840.10008.1.3.10"

NO_VOLUME_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.66.4": "segmentation",
    "1.2.840.10008.5.1.4.1.1.66.5": "surface segmentation",
    "1.2.840.10008.5.1.4.1.1.66.7": "label map segmentation",
    "1.2.840.10008.5.1.4.1.1.481.2": "radiotherapy dose",
    "1.2.840.10008.5.1.4.1.1.7": "secondary capture",
    "1.2.840.10008.5.1.4.1.1.7.1": "secondary capture",
    "1.2.840.10008.5.1.4.1.1.7.2": "secondary capture",
    "1.2.840.10008.5.1.4.1.1.7.3": "secondary capture",
    "1.2.840.10008.5.1.4.1.1.7.4": "secondary capture",
}
"""Storage classes (PS3.4 B.5) whose pixels are no cross-sectional image."""


@dataclass(frozen=True, kw_only=True)
class Plane:
    """One image plane of a series: a file, or a frame of one.

    Args:
        entry: the file.
        frame: index of the frame in it.
        position: centre of the first voxel, LPS millimetres.
        along_row: direction of increasing column index, LPS.
        along_column: direction of increasing row index, LPS.
        spacing_mm: distance between rows, and between columns.
        shape: rows, columns.
        slope: of the rescaling of stored values.
        intercept: of the rescaling of stored values.
        is_rescaled: whether the file states a rescaling.
        bits: allocated per value.
        thickness_mm: of the slice; 0 when not stated.
        acquisition: its number; empty when not stated.
        phase: number of the time point; empty when not stated.
        echo: number of the echo; empty when not stated.
    """

    entry: Entry
    frame: int
    position: Vector
    along_row: Vector
    along_column: Vector
    spacing_mm: tuple[float, float]
    shape: tuple[int, int]
    slope: float
    intercept: float
    is_rescaled: bool
    bits: int
    thickness_mm: float
    acquisition: str = ""
    phase: str = ""
    echo: str = ""


@dataclass(frozen=True, kw_only=True)
class Series:
    """The images chosen from a case.

    Args:
        planes: in order of reading, not of space.
        modality: such as ``CT``.
        left_aside: one phrase per other series or kind of object, for people.
    """

    planes: tuple[Plane, ...]
    modality: str
    left_aside: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Part:
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


def find_series(path: Path) -> Series:
    """Read all headers of a case and choose its series.

    Raises:
        InputError: nothing that is a volume, more than one that could be meant, or damaged files.
        EnvironmentFault: pydicom is not installed.
    """
    groups: dict[tuple[str, str], list[_Part]] = {}
    for part in _parts(path):
        key = (part.text("SeriesInstanceUID"), _why_aside(part))
        groups.setdefault(key, []).append(part)
    volumes = [parts for (_, reason), parts in groups.items() if not reason]
    others = [_describe(parts, reason) for (_, reason), parts in groups.items() if reason]
    if not volumes:
        raise InputError(
            f"{path.name}: holds no series of cross-sectional images"
            f"{' (only ' + ', '.join(sorted(others)) + ')' if others else ''}. "
            "Give the folder of an image series.",
            code="E_DCM_NO_IMAGE",
        )
    volumes.sort(key=_size, reverse=True)
    if len(volumes) > 1 and _size(volumes[0]) == _size(volumes[1]):
        listed = ", ".join(_describe(parts, "") for parts in volumes)
        raise InputError(
            f"{path.name}: holds {len(volumes)} series that could be meant ({listed}). "
            "Give the folder of one series.",
            code="E_DCM_AMBIGUOUS",
        )
    left = [_describe(parts, "") for parts in volumes[1:]] + others
    chosen = volumes[0]
    return Series(
        planes=tuple(plane for part in chosen for plane in _planes(part)),
        modality=_modality(chosen[0]),
        left_aside=tuple(sorted(left)),
    )


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


def _parts(path: Path) -> Iterable[_Part]:
    for entry in entries(path):
        part = _read_part(entry)
        if part is not None and part.sop_class != DIRECTORY_CLASS:
            yield part


def _read_part(entry: Entry) -> _Part | None:
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


def _parse(entry: Entry, stream: BinaryIO) -> _Part | None:
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
        part = _Part(entry=entry, dataset=dataset, has_pixels=has_pixels)
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


def _why_aside(part: _Part) -> str:
    """Why a file is no image of a volume; empty when it is."""
    known = NO_VOLUME_CLASSES.get(part.sop_class)
    if known:
        return known
    if not part.has_pixels or "Rows" not in part.dataset:
        name = str(pydicom_module().uid.UID(part.sop_class).name)
        return name.removesuffix(" Storage").lower() if part.sop_class != name else "no image"
    kinds = [str(item).upper() for item in part.dataset.get("ImageType") or ()]
    if any(word in kind for kind in kinds for word in LOCALIZER_WORDS):
        return "localizer"
    if not part.text("PhotometricInterpretation").startswith("MONOCHROME"):
        return "colour pictures"
    if "PerFrameFunctionalGroupsSequence" in part.dataset:
        return ""
    if part.frames > 1:
        return "frames without positions"
    if not part.dataset.get("ImagePositionPatient") or not part.dataset.get(
        "ImageOrientationPatient"
    ):
        return "images without positions"
    return ""


def _size(parts: list[_Part]) -> int:
    return sum(part.frames for part in parts)


def _describe(parts: list[_Part], reason: str) -> str:
    """A phrase without anything that people typed in: kind, number, modality and count."""
    first = parts[0]
    number = first.text("SeriesNumber")
    series = f"series {number}" if number.lstrip("-").isdigit() else "a series"
    kind = reason or _modality(first) or "images"
    return f"{series}: {kind}, {_size(parts)} {'image' if _size(parts) == 1 else 'images'}"


def _modality(part: _Part) -> str:
    """The modality, unless something else was typed in its place."""
    modality = part.text("Modality")
    return modality if modality.isalnum() and len(modality) <= 3 else ""


def _planes(part: _Part) -> Iterable[Plane]:
    dataset = part.dataset
    if "PerFrameFunctionalGroupsSequence" not in dataset:
        yield _plane(part, 0, (dataset,))
        return
    shared = list(dataset.get("SharedFunctionalGroupsSequence") or ())
    frames = list(dataset.PerFrameFunctionalGroupsSequence)
    if len(frames) != part.frames:
        raise InputError(
            f"{part.entry.name}: describes {len(frames)} of its {part.frames} frames. "
            "Export the series again.",
            code="E_IO_CORRUPT",
        )
    for index, frame in enumerate(frames):
        groups = [item for group in (frame, *shared[:1]) for item in _group_items(group)]
        yield _plane(part, index, (*groups, dataset))


def _group_items(group: Any) -> Iterable[Any]:
    """First items of the sequences of a functional group (PS3.3 C.7.6.16)."""
    for keyword in (
        "PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence",
        "PixelValueTransformationSequence", "FrameContentSequence",
    ):  # fmt: skip
        sequence = group.get(keyword)
        if sequence:
            yield sequence[0]


def _plane(part: _Part, frame: int, places: tuple[Any, ...]) -> Plane:
    def value(keyword: str) -> Any:
        found = (place.get(keyword) for place in places)
        return next((item for item in found if item is not None and item != ""), None)

    name = part.entry.name
    position = _numbers(value("ImagePositionPatient"), 3, name, "ImagePositionPatient")
    axes = _numbers(value("ImageOrientationPatient"), 6, name, "ImageOrientationPatient")
    spacing = _numbers(value("PixelSpacing"), 2, name, "PixelSpacing")
    slope, intercept = value("RescaleSlope"), value("RescaleIntercept")
    rescaling = _numbers(
        (1.0 if slope is None else slope, 0.0 if intercept is None else intercept),
        2, name, "RescaleSlope and RescaleIntercept",
    )  # fmt: skip
    acquisition = value("FrameAcquisitionNumber") or value("AcquisitionNumber")
    phase = value("TemporalPositionIndex") or value("TemporalPositionIdentifier")
    thickness = value("SliceThickness")
    return Plane(
        entry=part.entry,
        frame=frame,
        position=(position[0], position[1], position[2]),
        along_row=(axes[0], axes[1], axes[2]),
        along_column=(axes[3], axes[4], axes[5]),
        spacing_mm=(spacing[0], spacing[1]),
        shape=(int(part.dataset.Rows), int(part.dataset.get("Columns") or 0)),
        slope=rescaling[0],
        intercept=rescaling[1],
        is_rescaled=slope is not None and intercept is not None,
        bits=int(part.dataset.get("BitsAllocated") or 0),
        thickness_mm=0.0 if thickness is None else _numbers((thickness,), 1, name, "")[0],
        acquisition=_number(acquisition),
        phase=_number(phase),
        echo=_number(value("EchoNumbers")),
    )


def _number(value: Any) -> str:
    """A whole number as text; empty for anything else, which somebody may have typed in."""
    text = "" if value is None else str(value)
    return text if text.isdecimal() and len(text) <= 12 else ""


def _numbers(value: Any, count: int, name: str, keyword: str) -> tuple[float, ...]:
    try:
        found = tuple(float(item) for item in value)
    except (TypeError, ValueError):
        found = ()
    finite = all(abs(item) < float("inf") for item in found)
    if len(found) == count and finite:
        return found
    raise InputError(
        f"{name}: {keyword} is missing or is not {count} numbers. Export the series again.",
        code="E_GEOM_SPACING" if keyword == "PixelSpacing" else "E_DCM_HEADER",
    )


def _damaged(entry: Entry, problem: Exception) -> InputError:
    short = isinstance(problem, EOFError)
    return InputError(
        f"{entry.name}: cannot be understood as DICOM ({type(problem).__name__}). Copy it again.",
        code="E_IO_TRUNCATED" if short else "E_IO_CORRUPT",
    )
