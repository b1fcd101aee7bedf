"""What a derived DICOM object says of patient and study: what the standard requires, well formed.

Values that people or old devices typed wrongly are common, and must not cost a mask: a date that is
none, an unknown character set or code of sex is left out of the derived object.
"""

import hashlib
import re
from typing import Any

from medmamba.io.dicom_headers import pydicom_module

REQUIRED_KEYWORDS = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime",
    "StudyID", "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
"""Of type 2 in the patient and study modules: must be there, if only empty."""
IMAGE_KEYWORDS = (
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID",
    "FrameOfReferenceUID", "SpecificCharacterSet", "Modality", "ImageType", "InstanceNumber",
    "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated",
    "BitsStored", "HighBit", "PixelRepresentation", "NumberOfFrames", "ImagePositionPatient",
    "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices",
    "LossyImageCompression", "LossyImageCompressionRatio", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "DimensionOrganizationSequence", "DimensionIndexSequence",
)  # fmt: skip
"""What ties the object to the planes of its images. Nothing else of an image is looked at."""
WELL_FORMED = {
    "PatientBirthDate": r"\d{8}",
    "StudyDate": r"\d{8}",
    "StudyTime": r"\d{2}(\d{2}(\d{2}(\.\d{1,6})?)?)?",
    "PatientSex": r"[MFO]",
}
"""Forms of PS3.5 6.2 and the codes of PS3.3 C.7.1.1; anything else becomes empty."""
LOSSY = ("00", "01")
CHARACTER_SET = re.compile(
    r"(ISO_IR (100|101|109|110|144|127|126|138|148|203|13|166|192)|GB18030|GBK"
    r"|ISO 2022 IR (6|100|101|109|110|144|127|126|138|148|203|13|166|87|159|149|58))"
)
"""Defined terms of PS3.3 C.12.1.1.2."""
UNICODE = "ISO_IR 192"
UID_BITS = 120


def make_citable(dataset: Any) -> None:
    """Bring an image's header, in memory, into a form that a derived object may copy from.

    Identifiers that got lost are derived from what the file says besides.
    """
    meta = dataset.file_meta
    if not dataset.get("SOPClassUID"):
        dataset.SOPClassUID = meta.MediaStorageSOPClassUID
    if not dataset.get("SOPInstanceUID"):
        dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        if not dataset.get(keyword):
            stem = str(dataset.get("FrameOfReferenceUID") or dataset.get("StudyDate") or "")
            setattr(dataset, keyword, derived_uid(keyword, stem))
    keyword_of = pydicom_module().datadict.keyword_for_tag
    kept = {*IMAGE_KEYWORDS, *REQUIRED_KEYWORDS}
    for tag in list(dataset.keys()):
        if keyword_of(tag) not in kept:
            del dataset[tag]
    if str(dataset.get("LossyImageCompression", "00")) not in LOSSY:
        del dataset.LossyImageCompression
    for keyword in REQUIRED_KEYWORDS:
        if keyword not in dataset or not _is_well_formed(dataset, keyword):
            setattr(dataset, keyword, "")
    _settle_characters(dataset)


def derived_uid(*parts: str) -> str:
    """A UUID-derived identifier (PS3.5 B.2) that follows from ``parts``."""
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return f"2.25.{int(digest, 16) >> (256 - UID_BITS)}"


def _is_well_formed(dataset: Any, keyword: str) -> bool:
    form = WELL_FORMED.get(keyword)
    value = str(dataset.get(keyword) or "")
    return form is None or not value or re.fullmatch(form, value) is not None


def _settle_characters(dataset: Any) -> None:
    stated = dataset.get("SpecificCharacterSet")
    names = [stated] if isinstance(stated, str) else list(stated or ())
    if all(not name or CHARACTER_SET.fullmatch(name) for name in names):
        return
    # Text becomes what the reader makes of it, before the set that it was written in goes.
    for keyword in REQUIRED_KEYWORDS:
        setattr(dataset, keyword, str(dataset.get(keyword) or ""))
    dataset.SpecificCharacterSet = UNICODE
