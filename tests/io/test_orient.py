"""Turning images to another orientation and their labels back, exactly."""

import itertools
from pathlib import Path

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from medmamba import io
from medmamba.dataset import Case, load_case
from medmamba.errors import UsageError
from medmamba.volume import Geometry

CODES = [
    "".join(letters)
    for order in itertools.permutations(("RL", "AP", "SI"))
    for letters in itertools.product(*order)
]


def stored_as(image: nibabel.Nifti1Image, code: str) -> nibabel.Nifti1Image:
    """The same image with its axes stored the other way, by nibabel."""
    now = nibabel.io_orientation(image.affine)
    wanted = nibabel.orientations.axcodes2ornt(code)
    return image.as_reoriented(nibabel.orientations.ornt_transform(now, wanted))


@pytest.fixture
def image(voxels: NDArray[np.int16]) -> nibabel.Nifti1Image:
    angle = 0.3
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix[:3, :3] *= (0.7, 1.3, 3.1)
    matrix[:3, 3] = (-11, 7, 30)
    made = nibabel.Nifti1Image(voxels, matrix)
    made.set_sform(matrix, 1)
    made.set_qform(None, 0)
    return made


@pytest.mark.parametrize("code", CODES)
def test_labels_are_those_of_the_reference_stored_alike(
    code: str, image: nibabel.Nifti1Image, tmp_path: Path
) -> None:
    nibabel.save(stored_as(image, code), tmp_path / "in.nii.gz")
    case = Case(id="in", images=(tmp_path / "in.nii.gz",))
    volume, _, header = load_case(case, orientation="RAS")
    assert io.orientation_code(header.geometry) == code
    assert io.orientation_code(volume.geometry) == "RAS"
    assert np.array_equal(volume.array[0], image.get_fdata().T)
    assert volume.geometry == io.working_geometry(header)
    expected = Geometry.from_matrix((16, 24, 20), image.affine[:, [2, 1, 0, 3]])
    assert volume.geometry.same_grid_as(expected, tolerance_voxels=1e-4)
    labels = (volume.array[0] > 200).astype(np.uint8)
    labels[2, 3, 4] = 9
    io.write_labels(tmp_path / "out.nii.gz", labels, header)
    reference = nibabel.Nifti1Image(labels.T, image.affine)
    written = nibabel.load(tmp_path / "out.nii.gz")
    assert np.array_equal(
        np.asarray(written.dataobj), np.asarray(stored_as(reference, code).dataobj)
    )
    assert np.array_equal(written.affine, nibabel.load(tmp_path / "in.nii.gz").affine)


def test_image_and_labels_turn_together(image: nibabel.Nifti1Image, tmp_path: Path) -> None:
    for name in ("image", "labels"):
        data = np.abs(image.get_fdata()) if name == "image" else image.get_fdata() > 200
        made = nibabel.Nifti1Image(data.astype(np.int16), image.affine)
        nibabel.save(stored_as(made, "PIR"), tmp_path / f"{name}.nii.gz")
    case = Case(id="a", images=(tmp_path / "image.nii.gz",), labels=tmp_path / "labels.nii.gz")
    volume, labels, _ = load_case(case, orientation="LPS")
    assert labels is not None
    assert labels.geometry == volume.geometry
    assert np.array_equal(labels.array[0], volume.array[0] > 200)
    untouched, _, header = load_case(case)
    assert io.orientation_code(untouched.geometry) == "PIR"
    assert header.axis_order == (0, 1, 2)


@pytest.mark.parametrize("code", ["RA", "RAX", "RRS", "", "RASL"])
def test_no_orientation(code: str, image: nibabel.Nifti1Image, tmp_path: Path) -> None:
    nibabel.save(image, tmp_path / "in.nii.gz")
    with pytest.raises(UsageError, match="orientation"):
        load_case(Case(id="in", images=(tmp_path / "in.nii.gz",)), orientation=code)
