"""DICOM series made by pydicom, for tests: a bright ellipsoid in air."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    generate_uid,
)

SENTINEL = "ZZPHI"
ROW, COLUMN = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)


def phantom(shape: tuple[int, int, int] = (8, 20, 24)) -> np.ndarray:
    """Values (D, H, W) from -1000 to 200, no two slices alike."""
    rng = np.random.default_rng(11)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij"))
    inside = (grid**2).sum(0) < 0.6
    return np.where(inside, 60, -1000).astype(np.int16) + rng.integers(0, 40, shape).astype(
        np.int16
    )


def slice_dataset(values: np.ndarray, **tags: Any) -> FileDataset:
    """One image (H, W) of HU, stored with the usual offset of 1024."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = generate_uid()
    dataset.PatientName, dataset.PatientID = f"{SENTINEL}^NAME", f"{SENTINEL}-ID"
    dataset.PatientBirthDate, dataset.PatientSex = "19010203", "O"
    dataset.StudyID, dataset.AccessionNumber = "S1", f"{SENTINEL}-ACC"
    dataset.StudyDate, dataset.StudyTime = "20200102", "030405"
    dataset.ReferringPhysicianName = f"{SENTINEL}^REF"
    dataset.Modality, dataset.SeriesNumber, dataset.AcquisitionNumber = "CT", 3, 1
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.Rows, dataset.Columns = values.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = 0
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
    dataset.PixelData = (values.astype(np.int32) + 1024).astype("<u2").tobytes()
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return dataset


def make_series(
    values: np.ndarray | None = None,
    *,
    spacing_mm: tuple[float, float, float] = (3.0, 0.8, 0.7),
    step: tuple[float, float, float] | None = None,
    row: tuple[float, ...] = ROW,
    column: tuple[float, ...] = COLUMN,
    change: Callable[[int, Dataset], None] | None = None,
    **tags: Any,
) -> list[FileDataset]:
    """A series; ``step`` (LPS mm) tilts it; ``change`` edits single slices."""
    values = phantom() if values is None else values
    uids = {"StudyInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid()}
    tags = {**uids, "FrameOfReferenceUID": generate_uid(), **tags}
    direction = np.cross(row, column) * spacing_mm[0] if step is None else np.array(step)
    datasets = []
    for index, plane in enumerate(values):
        position = np.array([-40.0, -30.0, 10.0]) + index * direction
        dataset = slice_dataset(
            plane,
            InstanceNumber=index + 1,
            ImagePositionPatient=[f"{value:.6f}"[:16] for value in position],
            ImageOrientationPatient=[f"{value:.9f}" for value in (*row, *column)],
            PixelSpacing=[spacing_mm[1], spacing_mm[2]],
            SliceThickness=spacing_mm[0],
            **tags,
        )
        if change is not None:
            change(index, dataset)
        datasets.append(dataset)
    return datasets


def save(datasets: list[FileDataset], folder: Path, *, prefix: str = "IM") -> Path:
    """Write files in an order that is not that of space."""
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(5).permutation(len(datasets))
    for number, index in enumerate(order):
        datasets[index].save_as(folder / f"{prefix}{number:04d}.dcm", enforce_file_format=True)
    return folder


def localizer() -> FileDataset:
    """A scout image, larger than any slice."""
    return make_series(
        np.zeros((1, 64, 64), np.int16), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]
    )[0]


def enhanced(values: np.ndarray) -> FileDataset:
    """An enhanced multi-frame CT, its frames stored from top to bottom."""
    dataset = slice_dataset(values[0], SOPClassUID=EnhancedCTImageStorage)
    del dataset.RescaleSlope, dataset.RescaleIntercept
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
    dataset.FrameOfReferenceUID = generate_uid()
    dataset.NumberOfFrames = len(values)
    dataset.PixelData = (values[::-1].astype(np.int32) + 1024).astype("<u2").tobytes()
    shared = Dataset()
    shared.PixelMeasuresSequence = Sequence([_item(PixelSpacing=[0.8, 0.7], SliceThickness=3.0)])
    shared.PlaneOrientationSequence = Sequence([_item(ImageOrientationPatient=[*ROW, *COLUMN])])
    dataset.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for index in reversed(range(len(values))):
        frame = Dataset()
        position = _item(ImagePositionPatient=[-40.0, -30.0, 10.0 + 3.0 * index])
        frame.PlanePositionSequence = Sequence([position])
        frame.PixelValueTransformationSequence = Sequence(
            [_item(RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU")]
        )
        frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = Sequence(frames)
    return dataset


def mr_tags() -> dict[str, Any]:
    """What makes a series MR."""
    return {"SOPClassUID": MRImageStorage, "Modality": "MR"}


def _item(**tags: Any) -> Dataset:
    item = Dataset()
    for keyword, value in tags.items():
        setattr(item, keyword, value)
    return item
