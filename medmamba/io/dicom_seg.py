"""Labels of a DICOM series as a DICOM segmentation object (BINARY): the only door to highdicom.

The object refers to the series' own images and lies on their planes. Of patient and study it
carries what the standard requires of a derived object and nothing else. Identifiers follow from the
contents, so that the same work gives the same bytes whoever does it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba import __version__
from medmamba.errors import EnvironmentFault, GeometryError
from medmamba.files import replace_atomic
from medmamba.io.dicom import ordered_planes
from medmamba.io.dicom_series import open_dataset, pydicom_module
from medmamba.io.header import DEFAULT_GATE, Gate

MANUFACTURER = "medmamba"
SERIES_DESCRIPTION = "Segmentation (research use only)"
SERIES_NUMBER = 900
"""High, so that it stands behind the images in a viewer's list."""
UID_BITS = 120
UNKNOWN_DATE, UNKNOWN_TIME = "19000101", "000000"
TISSUE = ("85756007", "Tissue")
ANATOMICAL = ("123037004", "Anatomical Structure")
OPTIONAL_KEYWORDS = (
    "PatientAge", "PatientSize", "PatientWeight", "OtherPatientIDs", "StudyDescription",
    "PatientComments", "AdditionalPatientHistory", "NameOfPhysiciansReadingStudy",
    "PhysiciansOfRecord", "EthnicGroup", "Occupation", "IssuerOfPatientID",
    "ReferencedStudySequence", "ProcedureCodeSequence", "OtherPatientIDsSequence",
    "AdmittingDiagnosesDescription", "ReasonForPerformedProcedureCodeSequence",
)  # fmt: skip
"""Of type 3 in the patient and study modules: not required, so not copied."""
COPIED_ALWAYS = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime",
    "StudyID", "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
"""Of type 2: must be there, if only empty."""


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
    gate: Gate = DEFAULT_GATE,
) -> None:
    """Write labels (D, H, W), which lie on the grid of ``series``, atomically.

    Segments without a voxel are described too, so that "looked for and not found" can be told from
    "not looked for"; where no voxel has any label there is one empty frame.

    Raises:
        GeometryError: labels do not fit the series.
        InputError: the series cannot be trusted.
        EnvironmentFault: highdicom is not installed, or the folder cannot be written.
    """
    planes = ordered_planes(series, gate)
    if labels.shape != (len(planes), *planes[0].shape):
        raise GeometryError(
            f"{series.name}: labels of shape {labels.shape} do not fit a series of {len(planes)} "
            f"images of {planes[0].shape}. Give the mask of this series."
        )
    sources = _sources([plane.entry for plane in planes])
    stored = _segment_array(labels, segments)
    dataset = _segmentation(sources, stored, segments, algorithm)
    replace_atomic(path, lambda temporary: dataset.save_as(temporary, enforce_file_format=True))


def _sources(entries: Sequence[Any]) -> list[Any]:
    """The images' data sets without pixels; a multi-frame file once."""
    sources = []
    for entry in dict.fromkeys(entries):
        dataset = open_dataset(entry)
        dataset.pop("PixelData", None)
        _complete(dataset)
        sources.append(dataset)
    return sources


def _complete(dataset: Any) -> None:
    """Give identifiers to images that lost theirs, from what the file says besides."""
    meta = dataset.file_meta
    if not dataset.get("SOPClassUID"):
        dataset.SOPClassUID = meta.MediaStorageSOPClassUID
    if not dataset.get("SOPInstanceUID"):
        dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        if not dataset.get(keyword):
            stem = str(dataset.get("FrameOfReferenceUID") or dataset.get("StudyDate") or "")
            setattr(dataset, keyword, _uid(keyword, stem))
    for keyword in COPIED_ALWAYS:
        if keyword not in dataset:
            setattr(dataset, keyword, "")
    for keyword in OPTIONAL_KEYWORDS:
        if keyword in dataset:
            delattr(dataset, keyword)


def _segment_array(
    labels: NDArray[np.integer[Any]], segments: Sequence[SegmentLabel]
) -> NDArray[np.uint8]:
    """(D, H, W, segments) of 0 and 1; segments may overlap, as regions do."""
    return np.stack(
        [np.isin(labels, segment.values).astype(np.uint8) for segment in segments], axis=-1
    )


def _segmentation(
    sources: list[Any],
    stored: NDArray[np.uint8],
    segments: Sequence[SegmentLabel],
    algorithm: str,
) -> Any:
    highdicom = _highdicom()
    digest = hashlib.sha256(stored.tobytes()).hexdigest()
    first = sources[0]
    dataset = highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=stored if len(sources) == len(stored) else _as_frames(stored, first),
        segmentation_type="BINARY",
        segment_descriptions=[
            _description(highdicom, number, segment, algorithm)
            for number, segment in enumerate(segments, 1)
        ],
        series_instance_uid=_uid("series", str(first.SeriesInstanceUID), algorithm, digest),
        series_number=SERIES_NUMBER,
        sop_instance_uid=_uid("instance", str(first.SeriesInstanceUID), algorithm, digest),
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


def _as_frames(stored: NDArray[np.uint8], source: Any) -> NDArray[np.uint8]:
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
            element.value = _uid("dimensions", str(dataset.SOPInstanceUID))
        elif element.keyword == "ContributionDateTime":
            element.value = f"{date}{time}"


def _uid(*parts: str) -> str:
    """A UUID-derived identifier (PS3.5 B.2) that follows from ``parts``."""
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return f"2.25.{int(digest, 16) >> (256 - UID_BITS)}"


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
