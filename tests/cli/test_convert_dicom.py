import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_phantom import make_series, phantom, save
from typer.testing import CliRunner

from medmamba.cli.app import app


def test_a_series_becomes_one_image_on_its_grid(tmp_path: Path) -> None:
    folder = save(make_series(), tmp_path / "ct")
    target = tmp_path / "ct.nii.gz"
    result = CliRunner().invoke(app, ["convert", "dicom-to-nifti", str(folder), "-o", str(target)])
    assert result.exit_code == 0, result.output
    image = nib.load(target)
    assert image.get_data_dtype() == np.int16
    np.testing.assert_array_equal(np.asarray(image.dataobj).T, phantom())
    np.testing.assert_allclose(image.affine @ [0, 0, 1, 1], [40, 30, 13, 1], atol=1e-5)


@pytest.fixture
def run(medmamba) -> Callable[..., int]:
    """Run the command as the program does and return its exit code."""
    return lambda *arguments: medmamba("convert", "seg-to-dicom", *arguments)[0]


@pytest.fixture
def labelled(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A series, its mask stored along other axes, and names of the labels."""
    folder = save(make_series(), tmp_path / "ct")
    mask = ((phantom() > 50).astype(np.uint8) + (phantom() > 85)).transpose(2, 1, 0)
    affine = np.diag([-0.7, -0.8, 3.0, 1.0])
    affine[:3, 3] = [40.0, 30.0, 10.0]
    image = nib.as_closest_canonical(nib.Nifti1Image(mask, affine))
    nib.save(image, tmp_path / "mask.nii.gz")
    names = tmp_path / "labels.json"
    names.write_text(json.dumps({"background": 0, "shell": 1, "core": 2}))
    return folder, tmp_path / "mask.nii.gz", names


def test_a_mask_along_other_axes_becomes_segments_of_the_series(
    labelled, run, tmp_path: Path
) -> None:
    folder, mask, names = labelled
    target = tmp_path / "a.dcm"
    assert run(mask, folder, "-o", target, "--labels", names, "--algorithm", "people") == 0
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    segments = dataset.SegmentSequence
    assert [item.SegmentLabel for item in segments] == ["shell", "core"]
    assert segments[0].SegmentAlgorithmName == "people"
    frames = dataset.pixel_array
    for frame, group in zip(frames, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        index = round((float(group.PlanePositionSequence[0].ImagePositionPatient[2]) - 10) / 3)
        number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        low, high = ((50, 85), (85, 999))[number - 1]
        np.testing.assert_array_equal(frame, (phantom()[index] > low) & (phantom()[index] <= high))


def test_other_forms_of_the_object_on_request(labelled, run, tmp_path: Path) -> None:
    folder, mask, names = labelled
    assert run(mask, folder, "-o", tmp_path / "a.dcm", "--labels", names, "--labelmap") == 0
    assert pydicom.dcmread(tmp_path / "a.dcm").SegmentationType == "LABELMAP"


def test_a_mask_of_something_else_is_refused(labelled, run, tmp_path: Path) -> None:
    folder, mask, names = labelled
    target = tmp_path / "a.dcm"
    assert run(mask, folder, "-o", target) == 2
    names.write_text(json.dumps({"shell": 1}))
    assert run(mask, folder, "-o", target, "--labels", names) == 4
    names.write_text(json.dumps({"shell": "one"}))
    assert run(mask, folder, "-o", target, "--labels", names) == 3
    names.write_text(json.dumps({"shell": 1, "core": 2}))
    image = nib.load(mask)
    moved = image.affine + np.array([[0, 0, 0, 0.5], [0] * 4, [0] * 4, [0] * 4])
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), moved), mask)
    assert run(mask, folder, "-o", target, "--labels", names) == 4
    assert not target.exists()
