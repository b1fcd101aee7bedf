import shutil
import subprocess
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from dicom_phantom import SENTINEL, enhanced, make_series, phantom, save

from medmamba.errors import GeometryError, UsageError
from medmamba.io.dicom_seg import SegmentLabel, write_segmentation

LIVER = SegmentLabel(name="liver", values=(1,), color="#e69f00", snomed="10200004")
BOTH = SegmentLabel(name="both", values=(1, 2))
ABSENT = SegmentLabel(name="absent", values=(9,))


def labels_of(values: np.ndarray) -> np.ndarray:
    return ((values > 50).astype(np.uint8) + (values > 85)).astype(np.uint8)


def decoded(path: Path, number: int, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Frames of a segment by their position in space, read without highdicom's own logic."""
    dataset = pydicom.dcmread(path)
    frames = dataset.pixel_array.reshape(-1, *shape)
    found = {}
    for frame, group in zip(frames, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        if group.SegmentIdentificationSequence[0].ReferencedSegmentNumber == number:
            position = group.PlanePositionSequence[0].ImagePositionPatient
            found[f"{float(position[2]):.3f}"] = frame
    return found


@pytest.mark.parametrize("kind", ["files", "frames"])
def test_segments_lie_on_the_planes_of_the_series(tmp_path: Path, kind: str) -> None:
    datasets = make_series() if kind == "files" else [enhanced(phantom())]
    folder = save(datasets, tmp_path / "ct")
    labels = labels_of(phantom())
    path = tmp_path / "a.seg.dcm"
    write_segmentation(path, labels, folder, (LIVER, BOTH, ABSENT), algorithm="model x")
    for number, values in ((1, (1,)), (2, (1, 2)), (3, (9,))):
        frames = decoded(path, number, labels.shape[1:])
        for index, plane in enumerate(labels):
            expected = np.isin(plane, values)
            frame = frames.get(f"{10 + 3 * index:.3f}", np.zeros_like(plane))
            np.testing.assert_array_equal(frame, expected)
    dataset = highdicom.seg.segread(path)
    first = dataset.get_segment_description(1)
    assert (first.segment_label, first.segmented_property_type.value) == ("liver", "10200004")
    assert dataset.SegmentationType == "BINARY"
    known = {item.SOPInstanceUID for item in datasets}
    cited = {
        item.ReferencedSOPInstanceUID
        for series in dataset.ReferencedSeriesSequence
        for item in series.ReferencedInstanceSequence
    }
    assert cited == known
    assert dataset.StudyInstanceUID == datasets[0].StudyInstanceUID


def test_the_same_work_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = save(make_series(), tmp_path / "ct")
    for name in ("a", "b"):
        write_segmentation(tmp_path / name, labels_of(phantom()), folder, (LIVER,))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_label_map_holds_the_same_labels(tmp_path: Path) -> None:
    folder = save(make_series(), tmp_path / "ct")
    labels = labels_of(phantom())
    segments = (LIVER, SegmentLabel(name="core", values=(2,)))
    write_segmentation(tmp_path / "a.dcm", labels, folder, segments, kind="LABELMAP")
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    assert dataset.SegmentationType == "LABELMAP"
    found = np.zeros_like(labels)
    for frame, group in zip(
        dataset.pixel_array, dataset.PerFrameFunctionalGroupsSequence, strict=True
    ):
        height = float(group.PlanePositionSequence[0].ImagePositionPatient[2])
        found[round((height - 10) / 3)] = frame
    np.testing.assert_array_equal(found, labels)
    write_segmentation(tmp_path / "b.dcm", labels, folder, segments)
    assert pydicom.dcmread(tmp_path / "b.dcm").SOPInstanceUID != dataset.SOPInstanceUID
    with pytest.raises(UsageError, match="overlap"):
        write_segmentation(tmp_path / "c.dcm", labels, folder, (LIVER, BOTH), kind="LABELMAP")


def test_an_empty_mask_is_written_and_another_grid_refused(tmp_path: Path) -> None:
    folder = save(make_series(), tmp_path / "ct")
    write_segmentation(tmp_path / "a", np.zeros(phantom().shape, np.uint8), folder, (LIVER,))
    assert not pydicom.dcmread(tmp_path / "a").pixel_array.any()
    with pytest.raises(GeometryError):
        write_segmentation(tmp_path / "b", labels_of(phantom())[1:], folder, (LIVER,))


def test_only_required_identity_is_copied(tmp_path: Path) -> None:
    def mark(index: int, dataset: pydicom.Dataset) -> None:
        for keyword in (
            "StudyDescription", "SeriesDescription", "ImageComments", "PatientComments",
            "OtherPatientIDs", "InstitutionName", "OperatorsName", "PhysiciansOfRecord",
            "ProtocolName", "StationName", "Occupation", "PatientAddress", "IssuerOfPatientID",
            "DeviceSerialNumber", "InstitutionAddress", "EthnicGroup", "AdditionalPatientHistory",
        ):  # fmt: skip
            setattr(dataset, keyword, f"{SENTINEL}{keyword}"[:16])

    folder = save(make_series(change=mark), tmp_path / "ct")
    write_segmentation(tmp_path / "a", labels_of(phantom()), folder, (LIVER,))
    dataset = pydicom.dcmread(tmp_path / "a")
    assert str(dataset.PatientName) == f"{SENTINEL}^NAME"
    marked = {item.keyword for item in dataset.iterall() if SENTINEL in str(item.value)}
    assert marked - {"ReferencedSeriesSequence"} == {
        "PatientName", "PatientID", "AccessionNumber", "ReferringPhysicianName",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("keyword", "value", "kept"),
    [
        ("PatientSex", "MALE", ""),
        ("StudyDate", "2020-01-02", ""),
        ("StudyTime", "noon", ""),
        ("PatientBirthDate", "1945", ""),
        ("PatientName", "ONLYONE", "ONLYONE"),
        ("SpecificCharacterSet", "latin-9000", "ISO_IR 192"),
        ("SpecificCharacterSet", "ISO_IR 100", "ISO_IR 100"),
        ("StudyID", None, ""),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value:UserWarning", "ignore:Unknown enc:UserWarning")
def test_odd_values_of_patient_and_study_do_not_cost_the_mask(
    tmp_path: Path, keyword: str, value: str | None, kept: str
) -> None:
    def spoil(index: int, dataset: pydicom.Dataset) -> None:
        setattr(dataset, keyword, value)

    folder = save(make_series(change=spoil), tmp_path / "ct")
    write_segmentation(tmp_path / "a.dcm", labels_of(phantom()), folder, (LIVER,))
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    assert str(dataset.get(keyword) or "") == kept
    assert dataset.PatientID == f"{SENTINEL}-ID"


def test_overlapping_and_separate_segments_give_the_same_frames(tmp_path: Path) -> None:
    folder = save(make_series(), tmp_path / "ct")
    labels = labels_of(phantom())
    second = SegmentLabel(name="second", values=(2,))
    write_segmentation(tmp_path / "apart", labels, folder, (LIVER, second))
    write_segmentation(tmp_path / "over", labels, folder, (LIVER, second, BOTH))
    for number in (1, 2):
        apart, over = (decoded(tmp_path / name, number, labels.shape[1:]) for name in
                       ("apart", "over"))  # fmt: skip
        assert list(apart) == list(over)
        assert all((apart[place] == over[place]).all() for place in apart)


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dicom3tools is not installed")
def test_an_independent_validator_finds_no_error(tmp_path: Path) -> None:
    folder = save(make_series(), tmp_path / "ct")
    write_segmentation(tmp_path / "a.dcm", labels_of(phantom()), folder, (LIVER, BOTH, ABSENT))
    command = [str(shutil.which("dciodvfy")), str(tmp_path / "a.dcm")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "Segmentation" in result.stdout + result.stderr
    problems = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert problems == []
