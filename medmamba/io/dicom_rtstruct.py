"""Labels of a DICOM series as contours: an RT structure set.

``contours`` draws them on the grid of indices; here they are carried to the planes of the series
and tied to its images. Of patient and study the object carries what the standard requires
(PS3.3 A.19) and nothing else, and identifiers follow from the contents, as in ``dicom_seg``.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba import __version__
from medmamba.files import replace_atomic
from medmamba.io.contours import Contour, draw_contours
from medmamba.io.dicom_headers import pydicom_module
from medmamba.io.dicom_identity import REQUIRED_KEYWORDS, derived_uid
from medmamba.io.dicom_seg import (
    MANUFACTURER,
    TISSUE,
    UNKNOWN_DATE,
    UNKNOWN_TIME,
    SegmentLabel,
    planes_under,
    sources_of,
)
from medmamba.io.dicom_series import Plane
from medmamba.io.header import DEFAULT_GATE, Gate

RTSTRUCT_CLASS = "1.2.840.10008.5.1.4.1.1.481.3"
STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"
EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
SERIES_DESCRIPTION = "Contours (research use only)"
SERIES_NUMBER = 901


def write_structures(
    path: Path,
    labels: NDArray[np.integer[Any]],
    series: Path,
    segments: Sequence[SegmentLabel],
    *,
    algorithm: str = MANUFACTURER,
    gate: Gate = DEFAULT_GATE,
) -> None:
    """Write contours of labels (D, H, W), which lie on the grid of ``series``, atomically.

    Labels that were not found are listed too, without contours.

    Raises:
        GeometryError: labels do not fit the series.
        InputError: the series cannot be trusted.
        EnvironmentFault: plastimatch or pydicom is not installed, or the folder cannot be written.
    """
    planes = planes_under(labels, series, gate)
    contours = [draw_contours(np.isin(labels, segment.values)) for segment in segments]
    sources = sources_of([plane.entry for plane in planes])
    dataset = _structure_set(planes, sources, segments, contours, algorithm)
    replace_atomic(path, lambda temporary: dataset.save_as(temporary, enforce_file_format=True))


def _structure_set(
    planes: Sequence[Plane],
    sources: Sequence[Any],
    segments: Sequence[SegmentLabel],
    contours: Sequence[Sequence[Contour]],
    algorithm: str,
) -> Any:
    dicom = pydicom_module()
    first = sources[0]
    digest = hashlib.sha256()
    for drawn in contours:
        digest.update(b"".join(contour.points.tobytes() for contour in drawn) + b"/")
    names = ("rtstruct", str(first.SeriesInstanceUID), algorithm, digest.hexdigest())
    dataset = _identity(dicom, first, derived_uid("series", *names), derived_uid(*names))
    dataset.StructureSetLabel = "SEGMENTATION"
    dataset.StructureSetDate, dataset.StructureSetTime = dataset.StudyDate, dataset.StudyTime
    if not dataset.StructureSetDate:
        dataset.StructureSetDate, dataset.StructureSetTime = UNKNOWN_DATE, UNKNOWN_TIME
    dataset.ReferencedFrameOfReferenceSequence = [_cited_series(dicom, first, sources)]
    dataset.StructureSetROISequence = [
        _new(
            dicom,
            ROINumber=number,
            ReferencedFrameOfReferenceUID=first.FrameOfReferenceUID,
            ROIName=segment.name[:64],
            ROIGenerationAlgorithm="AUTOMATIC",
            ROIGenerationDescription=algorithm[:64],
        )
        for number, segment in enumerate(segments, 1)
    ]
    cited = _images_of(planes, sources)
    dataset.ROIContourSequence = [
        _drawn_region(dicom, number, segment, drawn, planes, cited)
        for number, (segment, drawn) in enumerate(zip(segments, contours, strict=True), 1)
    ]
    dataset.RTROIObservationsSequence = [
        _observation(dicom, number, segment) for number, segment in enumerate(segments, 1)
    ]
    dataset.ApprovalStatus = "UNAPPROVED"
    return dataset


def _identity(dicom: Any, source: Any, series_uid: str, own_uid: str) -> Any:
    """A new object of the source's study: patient, study, series, equipment."""
    dataset = dicom.Dataset()
    dataset.file_meta = dicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = EXPLICIT_LITTLE_ENDIAN
    if "SpecificCharacterSet" in source:
        dataset.SpecificCharacterSet = source.SpecificCharacterSet
    for keyword in REQUIRED_KEYWORDS:
        setattr(dataset, keyword, source.get(keyword))
    dataset.StudyInstanceUID = source.StudyInstanceUID
    dataset.SOPClassUID, dataset.SOPInstanceUID = RTSTRUCT_CLASS, own_uid
    dataset.Modality, dataset.OperatorsName = "RTSTRUCT", ""
    dataset.SeriesInstanceUID, dataset.SeriesNumber = series_uid, SERIES_NUMBER
    dataset.SeriesDescription, dataset.InstanceNumber = SERIES_DESCRIPTION, 1
    dataset.Manufacturer = dataset.ManufacturerModelName = MANUFACTURER
    dataset.SoftwareVersions = __version__
    dataset.FrameOfReferenceUID, dataset.PositionReferenceIndicator = source.FrameOfReferenceUID, ""
    return dataset


def _cited_series(dicom: Any, first: Any, sources: Iterable[Any]) -> Any:
    images = [_reference(dicom, source) for source in sources]
    series = _new(dicom, SeriesInstanceUID=first.SeriesInstanceUID, ContourImageSequence=images)
    study = _new(
        dicom, ReferencedSOPClassUID=STUDY_CLASS, ReferencedSOPInstanceUID=first.StudyInstanceUID,
        RTReferencedSeriesSequence=[series],
    )  # fmt: skip
    return _new(
        dicom, FrameOfReferenceUID=first.FrameOfReferenceUID, RTReferencedStudySequence=[study]
    )


def _images_of(planes: Sequence[Plane], sources: Sequence[Any]) -> list[tuple[Any, int | None]]:
    """The image of every plane, and which of its frames it is, for those of several."""
    by_entry = dict(zip(dict.fromkeys(plane.entry for plane in planes), sources, strict=True))
    return [
        (by_entry[plane.entry], None if len(sources) == len(planes) else plane.frame + 1)
        for plane in planes
    ]


def _drawn_region(
    dicom: Any,
    number: int,
    segment: SegmentLabel,
    drawn: Sequence[Contour],
    planes: Sequence[Plane],
    cited: Sequence[tuple[Any, int | None]],
) -> Any:
    region = _new(dicom, ReferencedROINumber=number)
    if segment.color:
        region.ROIDisplayColor = list(bytes.fromhex(segment.color.removeprefix("#")))
    if drawn:
        region.ContourSequence = [
            _new(
                dicom,
                ContourImageSequence=[_reference(dicom, *cited[contour.plane])],
                ContourGeometricType="CLOSED_PLANAR",
                NumberOfContourPoints=len(contour.points),
                ContourData=_decimals(on_plane(planes[contour.plane], contour.points)),
            )
            for contour in drawn
        ]
    return region


def on_plane(plane: Plane, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Column and row, in voxels (n, 2), as LPS millimetres (n, 3) on an image plane."""
    between_rows, between_columns = plane.spacing_mm
    steps = np.stack(
        [
            np.multiply(plane.along_row, between_columns),
            np.multiply(plane.along_column, between_rows),
        ]
    )
    placed: NDArray[np.float64] = np.asarray(plane.position) + points @ steps
    return placed


def _decimals(points: NDArray[np.float64]) -> list[str]:
    """Numbers in at most sixteen characters (PS3.5 6.2, DS): to a hundredth of a micrometre."""
    rounded = np.round(points.ravel(), 5) + 0.0  # no minus before zero
    return [f"{value:.5f}".rstrip("0").rstrip(".") for value in rounded]


def _observation(dicom: Any, number: int, segment: SegmentLabel) -> Any:
    value, meaning = (segment.snomed, segment.name) if segment.snomed else TISSUE
    code = _new(dicom, CodeValue=value, CodingSchemeDesignator="SCT", CodeMeaning=meaning[:64])
    return _new(
        dicom, ObservationNumber=number, ReferencedROINumber=number,
        RTROIIdentificationCodeSequence=[code], RTROIInterpretedType="", ROIInterpreter="",
    )  # fmt: skip


def _reference(dicom: Any, source: Any, frame: int | None = None) -> Any:
    cited = _new(
        dicom,
        ReferencedSOPClassUID=source.SOPClassUID,
        ReferencedSOPInstanceUID=source.SOPInstanceUID,
    )
    if frame is not None:
        cited.ReferencedFrameNumber = frame
    return cited


def _new(dicom: Any, **attributes: Any) -> Any:
    dataset = dicom.Dataset()
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return dataset
