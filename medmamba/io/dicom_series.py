"""Which images of a DICOM case are the volume: series told apart, one of them chosen.

The rule: everything that is no cross-sectional image (localizers, secondary captures, reports,
documents, segmentations) is left aside and listed; of the series that remain the one with most
images is taken; where two have equally many, the case is rejected.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmamba.errors import InputError
from medmamba.io.dicom_files import Entry
from medmamba.io.dicom_headers import Part, pydicom_module, read_parts

Vector = tuple[float, float, float]

LOCALIZER_WORDS = ("LOCALIZER", "SCOUT", "TOPOGRAM", "SURVEY")
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


def find_series(path: Path) -> Series:
    """Read all headers of a case and choose its series.

    Raises:
        InputError: nothing that is a volume, more than one that could be meant, or damaged files.
        EnvironmentFault: pydicom is not installed.
    """
    groups: dict[tuple[str, str], list[Part]] = {}
    for part in read_parts(path):
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


def _why_aside(part: Part) -> str:
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


def _size(parts: list[Part]) -> int:
    return sum(part.frames for part in parts)


def _describe(parts: list[Part], reason: str) -> str:
    """A phrase without anything that people typed in: kind, number, modality and count."""
    first = parts[0]
    number = first.text("SeriesNumber")
    series = f"series {number}" if number.lstrip("-").isdigit() else "a series"
    kind = reason or _modality(first) or "images"
    return f"{series}: {kind}, {_size(parts)} {'image' if _size(parts) == 1 else 'images'}"


def _modality(part: Part) -> str:
    """The modality, unless something else was typed in its place."""
    modality = part.text("Modality")
    return modality if modality.isalnum() and len(modality) <= 3 else ""


def _planes(part: Part) -> Iterable[Plane]:
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


def _plane(part: Part, frame: int, places: tuple[Any, ...]) -> Plane:
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
