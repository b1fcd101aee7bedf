"""Labels of a DICOM series as a DICOM segmentation object: the only door to highdicom.

The object refers to the series' own images and lies on their planes. Of patient and study it
carries what the standard requires of a derived object and nothing else. Identifiers follow from the
contents, so that the same work gives the same bytes whoever does it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medmamba import __version__
from medmamba.errors import EnvironmentFault, GeometryError, UsageError
from medmamba.files import replace_atomic
from medmamba.io.dicom import ordered_planes
from medmamba.io.dicom_headers import open_dataset, pydicom_module
from medmamba.io.dicom_identity import derived_uid, make_citable
from medmamba.io.dicom_series import Plane
from medmamba.io.header import DEFAULT_GATE, Gate

MANUFACTURER = "medmamba"
SERIES_DESCRIPTION = "Segmentation (research use only)"
SERIES_NUMBER = 900
"""High, so that it stands behind the images in a viewer's list."""
UNKNOWN_DATE, UNKNOWN_TIME = "19000101", "000000"
TISSUE = ("85756007", "Tissue")
ANATOMICAL = ("123037004", "Anatomical Structure")


Kind = Literal["BINARY", "LABELMAP"]


@dataclass(frozen=True, kw_only=True)
class SegmentLabel:
    """One segment.

    Args:
        name: as people call it.
        values: label values it consists of.
        color: ``#rrggbb``.
        snomed: SNOMED CT code, where one is known.
    """

    name: str
    values: tuple[int, ...]
    color: str = ""
    snomed: str | None = None


def write_segmentation(
    path: Path,
    labels: NDArray[np.integer[Any]],
    series: Path,
    segments: Sequence[SegmentLabel],
    *,
    algorithm: str = MANUFACTURER,
    kind: Kind = "BINARY",
    gate: Gate = DEFAULT_GATE,
) -> None:
    """Write labels (D, H, W), which lie on the grid of ``series``, atomically.

    ``LABELMAP`` objects are smaller and newer in the standard: few programs know them yet.

    Segments without a voxel are described too, so that "looked for and not found" can be told from
    "not looked for"; where no voxel has any label there is one empty frame.

    Raises:
        GeometryError: labels do not fit the series.
        InputError: the series cannot be trusted.
        UsageError: segments overlap, which a label map cannot hold.
        EnvironmentFault: highdicom is not installed, or the folder cannot be written.
    """
    planes = planes_under(labels, series, gate)
    sources = sources_of([plane.entry for plane in planes])
    stored = _segment_array(labels, segments)
    if kind == "LABELMAP" and stored.ndim > labels.ndim:
        raise UsageError("a label map holds one label a voxel, and these overlap. Write segments.")
    if len(sources) != len(stored):
        stored = _as_frames(stored, sources[0])
    dataset = _segmentation(sources, stored, segments, algorithm, kind)
    replace_atomic(path, lambda temporary: dataset.save_as(temporary, enforce_file_format=True))


def planes_under(labels: NDArray[np.integer[Any]], series: Path, gate: Gate) -> tuple[Plane, ...]:
    """The planes of a series on which labels (D, H, W) lie.

    Raises:
        GeometryError: labels do not fit the series.
        InputError: the series cannot be trusted.
    """
    planes = ordered_planes(series, gate)
    if labels.shape != (len(planes), *planes[0].shape):
        raise GeometryError(
            f"{series.name}: labels of shape {labels.shape} do not fit a series of {len(planes)} "
            f"images of {planes[0].shape}. Give the mask of this series."
        )
    return planes


def sources_of(entries: Sequence[Any]) -> list[Any]:
    """The images' data sets without pixels; a multi-frame file once."""
    sources = []
    for entry in dict.fromkeys(entries):
        dataset = open_dataset(entry)
        dataset.pop("PixelData", None)
        make_citable(dataset)
        sources.append(dataset)
    return sources


def _segment_array(
    labels: NDArray[np.integer[Any]], segments: Sequence[SegmentLabel]
) -> NDArray[np.unsignedinteger[Any]]:
    """(D, H, W) of segment numbers; (D, H, W, segments) of 0 and 1 where segments overlap."""
    members = [value for segment in segments for value in segment.values]
    if len(set(members)) < len(members):
        return np.stack(
            [np.isin(labels, segment.values).astype(np.uint8) for segment in segments], axis=-1
        )
    highest = max(*members, int(labels.max()), 0)
    numbers = np.zeros(highest + 1, np.uint8 if len(segments) < 256 else np.uint16)
    for number, segment in enumerate(segments, 1):
        numbers[list(segment.values)] = number
    stored: NDArray[np.unsignedinteger[Any]] = numbers[labels]
    return stored


def _segmentation(
    sources: list[Any],
    stored: NDArray[np.unsignedinteger[Any]],
    segments: Sequence[SegmentLabel],
    algorithm: str,
    kind: Kind,
) -> Any:
    highdicom = _highdicom()
    # Two forms of the same labels are two objects.
    form = b"" if kind == "BINARY" else kind.encode()
    digest = hashlib.sha256(stored.tobytes() + form).hexdigest()
    first = sources[0]
    dataset = highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=stored,
        segmentation_type=kind,
        segment_descriptions=[
            _description(highdicom, number, segment, algorithm)
            for number, segment in enumerate(segments, 1)
        ],
        series_instance_uid=derived_uid("series", str(first.SeriesInstanceUID), algorithm, digest),
        series_number=SERIES_NUMBER,
        sop_instance_uid=derived_uid("instance", str(first.SeriesInstanceUID), algorithm, digest),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=MANUFACTURER,
        software_versions=__version__,
        device_serial_number=__version__,
        series_description=SERIES_DESCRIPTION,
        content_label="SEGMENTATION",
        omit_empty_frames=bool(stored.any()),
    )
    _settle(dataset, first)
    return dataset


def _as_frames(
    stored: NDArray[np.unsignedinteger[Any]], source: Any
) -> NDArray[np.unsignedinteger[Any]]:
    """Order of a multi-frame file's own frames, which need not be that of space."""
    groups = source.PerFrameFunctionalGroupsSequence
    shared = source.SharedFunctionalGroupsSequence[0]
    place = groups[0] if "PlaneOrientationSequence" in groups[0] else shared
    axes = np.array(place.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=float)
    normal = np.cross(axes[:3], axes[3:])
    heights = [
        float(normal @ np.array(group.PlanePositionSequence[0].ImagePositionPatient, dtype=float))
        for group in groups
    ]
    ranks = np.argsort(np.argsort(heights, kind="stable"))
    return stored[ranks]


def _description(highdicom: Any, number: int, segment: SegmentLabel, algorithm: str) -> Any:
    code = highdicom.sr.CodedConcept
    known = segment.snomed
    # A code without its official meaning would be wrong; the name stands for it.
    kind = (known, segment.name) if known else TISSUE
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=segment.name[:64],
        segmented_property_category=code(ANATOMICAL[0], "SCT", ANATOMICAL[1]),
        segmented_property_type=code(kind[0], "SCT", kind[1][:64]),
        algorithm_type="AUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=algorithm[:64],
            version=__version__,
            family=code("123110", "DCM", "Artificial Intelligence"),
        ),
        display_color=_color(highdicom, segment.color) if segment.color else None,
    )


def _color(highdicom: Any, color: str) -> Any:
    return highdicom.color.CIELabColor.from_rgb(*bytes.fromhex(color.removeprefix("#")))


def _settle(dataset: Any, source: Any) -> None:
    """State the study's time in place of now, and no random identifier.

    The same work must give the same bytes, or two workers at one case would disagree.
    """
    date = str(source.get("StudyDate") or UNKNOWN_DATE)
    time = str(source.get("StudyTime") or UNKNOWN_TIME)
    for stem in ("Content", "Series", "InstanceCreation", "StructureSet"):
        if f"{stem}Date" in dataset:
            setattr(dataset, f"{stem}Date", date)
        if f"{stem}Time" in dataset:
            setattr(dataset, f"{stem}Time", time)
    for element in dataset.iterall():
        if element.keyword == "DimensionOrganizationUID":
            element.value = derived_uid("dimensions", str(dataset.SOPInstanceUID))
        elif element.keyword == "ContributionDateTime":
            element.value = f"{date}{time}"


def _highdicom() -> Any:
    pydicom_module()
    try:
        import highdicom  # noqa: TID251
        import highdicom.color  # noqa: TID251
    except ImportError as problem:
        raise EnvironmentFault(
            f"DICOM: writing needs packages that are not installed ({problem.name}). "
            "Install them with: pip install 'medmamba[dicom]'.",
            code="E_DICOM_MISSING",
        ) from problem
    return highdicom
