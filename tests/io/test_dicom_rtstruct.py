"""Contours of a mask: drawn back they are the mask, they lie on the planes, and cite the images."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_phantom import SENTINEL, enhanced, make_series, phantom, save
from skimage.draw import polygon2mask

from medmamba.errors import EnvironmentFault, GeometryError
from medmamba.io.contours import join_holes
from medmamba.io.dicom_rtstruct import write_structures
from medmamba.io.dicom_seg import SegmentLabel

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("plastimatch") is None, reason="plastimatch is not installed"
)
LIVER = SegmentLabel(name="liver", values=(1,), color="#e69f00", snomed="10200004")
ABSENT = SegmentLabel(name="absent", values=(9,))


def ring() -> np.ndarray:
    """Parts at the very border, with holes, and with an island in a hole."""
    labels = np.zeros(phantom().shape, np.uint8)
    labels[2:6, 4:14, 5:18] = 1
    labels[3:5, 6:12, 7:12] = 0
    labels[4, 8:10, 9] = 1
    labels[3:6, 5:7, 14:16] = 0
    labels[2:6, 16:, 20:] = 1
    return labels


def drawn_back(dataset: pydicom.Dataset, number: int, datasets: list, shape: tuple) -> np.ndarray:
    """Voxels whose centres the contours of a structure enclose, by the cited images' geometry."""
    masks = np.zeros((2, *shape), bool)
    images = {item.SOPInstanceUID: index for index, item in enumerate(datasets)}
    for contour in dataset.ROIContourSequence[number].get("ContourSequence", []):
        [cited] = contour.ContourImageSequence
        index = images[cited.ReferencedSOPInstanceUID]
        image = datasets[index]
        axes = np.array(image.ImageOrientationPatient, float).reshape(2, 3)
        between_rows, between_columns = (float(value) for value in image.PixelSpacing)
        points = np.array(contour.ContourData, float).reshape(-1, 3)
        offsets = points - np.array(image.ImagePositionPatient, float)
        columns, rows = offsets @ axes[0] / between_columns, offsets @ axes[1] / between_rows
        assert np.abs(offsets @ np.cross(*axes)).max() < 1e-4  # in the plane
        inside = polygon2mask(shape[1:], np.stack([rows, columns], axis=1))
        masks[0, index] ^= inside
        masks[1, index] |= inside
    # Readers differ in what they make of a curve within another, so there must be none.
    np.testing.assert_array_equal(*masks)
    return masks[0]


@pytest.mark.parametrize("turned", [False, True])
def test_the_contours_enclose_the_mask_voxel_by_voxel(tmp_path: Path, turned: bool) -> None:
    def turn(index: int, dataset: pydicom.Dataset) -> None:
        dataset.ImageOrientationPatient = [0, 0.8, -0.6, 1, 0, 0]
        dataset.ImagePositionPatient = (
            np.array([3.0, -5, 7]) + 2.0 * index * np.array([0, 0.6, 0.8])
        ).tolist()

    datasets = make_series(change=turn if turned else lambda index, dataset: None)
    folder = save(datasets, tmp_path / "ct")
    labels = ring()
    if turned:
        datasets = datasets[::-1] if _runs_down(datasets) else datasets
    write_structures(tmp_path / "a.dcm", labels, folder, (LIVER, ABSENT), algorithm="model x")
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    np.testing.assert_array_equal(drawn_back(dataset, 0, datasets, labels.shape), labels == 1)
    assert "ContourSequence" not in dataset.ROIContourSequence[1]
    assert [item.ROIName for item in dataset.StructureSetROISequence] == ["liver", "absent"]
    [code] = dataset.RTROIObservationsSequence[0].RTROIIdentificationCodeSequence
    assert (code.CodeValue, code.CodingSchemeDesignator) == ("10200004", "SCT")
    assert list(dataset.ROIContourSequence[0].ROIDisplayColor) == [0xE6, 0x9F, 0x00]
    assert dataset.StudyInstanceUID == datasets[0].StudyInstanceUID
    [frame] = dataset.ReferencedFrameOfReferenceSequence
    [series] = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence
    assert {item.ReferencedSOPInstanceUID for item in series.ContourImageSequence} == {
        item.SOPInstanceUID for item in datasets
    }


def _runs_down(datasets: list[pydicom.Dataset]) -> bool:
    axes = np.array(datasets[0].ImageOrientationPatient, float).reshape(2, 3)
    step = np.subtract(datasets[1].ImagePositionPatient, datasets[0].ImagePositionPatient)
    return bool(np.cross(*axes) @ step < 0)


def test_holes_run_against_the_curve_around_them() -> None:
    square = np.array([(0.5, 0), (9.5, 0), (9.5, 9), (0.5, 9)])
    hole = np.array([(4.5, 4), (6.5, 4), (6.5, 6), (4.5, 6)])
    for inner in (hole, hole[::-1]):
        [joined] = join_holes([inner, square])
        x, y = joined.T
        enclosed = abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
        assert enclosed == pytest.approx(9 * 9 - 2 * 2)


def test_frames_are_cited_by_their_number(tmp_path: Path) -> None:
    folder = save([enhanced(phantom())], tmp_path / "ct")
    write_structures(tmp_path / "a.dcm", ring(), folder, (LIVER,))
    contours = pydicom.dcmread(tmp_path / "a.dcm").ROIContourSequence[0].ContourSequence
    frames = {item.ContourImageSequence[0].ReferencedFrameNumber for item in contours}
    assert len(frames) == 4


def test_bytes_repeat_and_only_required_identity_is_copied(tmp_path: Path) -> None:
    def mark(index: int, dataset: pydicom.Dataset) -> None:
        for keyword in ("StudyDescription", "SeriesDescription", "InstitutionName", "StationName"):
            setattr(dataset, keyword, f"{SENTINEL}{keyword}"[:16])

    folder = save(make_series(change=mark), tmp_path / "ct")
    for name in ("a", "b"):
        write_structures(tmp_path / name, ring(), folder, (LIVER,))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    dataset = pydicom.dcmread(tmp_path / "a")
    marked = {item.keyword for item in dataset.iterall() if SENTINEL in str(item.value)}
    assert marked == {"PatientName", "PatientID", "AccessionNumber", "ReferringPhysicianName"}


def test_another_grid_and_a_missing_program_are_refused(tmp_path: Path, monkeypatch) -> None:
    folder = save(make_series(), tmp_path / "ct")
    with pytest.raises(GeometryError):
        write_structures(tmp_path / "a", ring()[1:], folder, (LIVER,))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match=r"medmamba\[rtstruct\]"):
        write_structures(tmp_path / "a", ring(), folder, (LIVER,))


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dicom3tools are not installed")
def test_the_structure_set_follows_the_standard(tmp_path: Path) -> None:
    folder = save(make_series(), tmp_path / "ct")
    write_structures(tmp_path / "a.dcm", ring(), folder, (LIVER, ABSENT))
    done = subprocess.run(
        ["dciodvfy", tmp_path / "a.dcm"], capture_output=True, text=True, check=False
    )
    assert "RTStructureSet" in done.stderr
    assert not [line for line in done.stderr.splitlines() if line.startswith("Error")]
