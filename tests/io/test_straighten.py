"""Tilted images: straightened on the way in, labels back on the file's own grid on the way out."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from medmamba import io
from medmamba.errors import GeometryError
from medmamba.io.affine import shear_of
from medmamba.io.straighten import straight_geometry
from medmamba.volume import Geometry


def tilted(tangent: float, axis: int = 2) -> NDArray[np.float64]:
    """Slices 2.5 mm apart, each shifted along another axis as under a tilted gantry."""
    matrix = np.diag([0.8, 0.8, 2.5, 1.0])
    matrix[(axis + 2) % 3, axis] = tangent * matrix[axis, axis]
    matrix[:3, 3] = (-20, 5, 11)
    return matrix


def save(path: Path, voxels: NDArray[np.generic], matrix: NDArray[np.float64]) -> None:
    image = nibabel.Nifti1Image(voxels, None)
    image.set_sform(matrix, 1)
    image.header.set_xyzt_units("mm")
    image.header["pixdim"][1:4] = np.linalg.norm(matrix[:3, :3], axis=0)
    nibabel.save(image, path)


def ball(matrix: NDArray[np.float64], shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """A smooth ball in world space around the centre of the grid, sampled on the grid."""
    index = np.stack(np.meshgrid(*[np.arange(size) for size in shape], indexing="ij"), -1)
    points = index @ matrix[:3, :3].T + matrix[:3, 3]
    centre = (np.array(shape) - 1) / 2 @ matrix[:3, :3].T + matrix[:3, 3]
    distance = np.linalg.norm(points - centre, axis=-1)
    return (200 / (1 + np.exp(distance - 8.0))).astype(np.float32)


@pytest.mark.parametrize("tangent", [0.05, 0.2, 0.35])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_labels_return_to_the_tilted_grid(tangent: float, axis: int, tmp_path: Path) -> None:
    matrix = tilted(tangent, axis)
    values = ball(matrix, (40, 44, 16))
    save(tmp_path / "in.nii.gz", values, matrix)
    volume, header = io.read_image(tmp_path / "in.nii.gz")
    assert header.warning_codes == ("W_GEOM_RESAMPLED",)
    assert header.straightened == volume.geometry
    assert shear_of(volume.geometry.matrix) < 1e-6
    assert volume.geometry.voxel_volume_ml == pytest.approx(
        header.geometry.voxel_volume_ml, rel=0.07
    )
    labels = (volume.array[0] > 100).astype(np.uint8)
    io.write_labels(tmp_path / "out.nii.gz", labels, header)
    written = nibabel.load(tmp_path / "out.nii.gz")
    assert np.array_equal(written.header.get_sform(), nibabel.load(tmp_path / "in.nii.gz").affine)
    carried = io.labels_on_file_grid(labels, header)
    assert np.array_equal(carried, np.asarray(written.dataobj).T)
    expected = values > 100
    found = np.asarray(written.dataobj) > 0
    dice = 2 * np.sum(expected & found) / (expected.sum() + found.sum())
    assert dice > 0.93


def test_training_and_labels_stay_on_the_stored_grid(tmp_path: Path) -> None:
    matrix = tilted(0.2)
    save(tmp_path / "in.nii.gz", (ball(matrix, (20, 24, 16)) > 100).astype(np.uint8), matrix)
    volume, header = io.read_image(tmp_path / "in.nii.gz", gate=io.TRAINING_GATE)
    assert volume.geometry.shape == (16, 24, 20)
    assert header.warning_codes == ("W_GEOM_SHEAR",)
    labels, _ = io.read_labels(tmp_path / "in.nii.gz")
    assert labels.geometry == volume.geometry


def test_right_angles_are_left_alone() -> None:
    geometry = Geometry.from_spacing((4, 5, 6), (2.0, 1.5, 1.25))
    assert straight_geometry(geometry).same_grid_as(geometry, tolerance_voxels=1e-9)


def test_labels_of_the_wrong_grid_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "in.nii.gz", ball(tilted(0.3), (20, 24, 16)), tilted(0.3))
    _, header = io.read_image(tmp_path / "in.nii.gz")
    with pytest.raises(GeometryError):
        io.write_labels(tmp_path / "o.nii.gz", np.zeros(header.geometry.shape, np.uint8), header)
