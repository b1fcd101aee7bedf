"""Programs that share no code with ours read our masks: same grid as the image, same volumes.

``apt-get install mrtrix3 nifti-bin`` brings those that Debian has; without them their tests are
skipped.
"""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch

import medmamba
from medmamba.bundle import save_bundle
from medmamba.networks import build_network
from tests.test_bundle import tiny_plan


@dataclass(frozen=True)
class Predicted:
    image: Path
    mask: Path
    labels: dict[int, dict]


def oblique(spacing: tuple[float, ...], angle: float, flip: bool = False) -> np.ndarray:
    """An affine that is turned about two axes, and left-handed if wanted."""
    c, s = np.cos(angle), np.sin(angle)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, c, -s], [0, s, c]]
    )
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(spacing) @ np.diag([-1.0 if flip else 1.0, 1, 1])
    affine[:3, 3] = (-31.5, 12.25, 407.75)
    return affine


IMAGES = {
    "straight": (oblique((1.0, 1.0, 1.0), 0.0), nib.Nifti1Image, np.int16),
    "oblique": (oblique((0.7, 1.3, 2.9), 0.31), nib.Nifti1Image, np.float32),
    "left-handed": (oblique((1.1, 0.9, 1.4), -0.2, flip=True), nib.Nifti1Image, np.uint8),
}


@pytest.fixture(scope="module")
def predicted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Predicted]:
    root = tmp_path_factory.mktemp("programs")
    torch.manual_seed(0)
    weights = build_network(tiny_plan().configurations["3d_fullres"].network).state_dict()
    save_bundle(
        root / "model", plan=tiny_plan(), configuration="3d_fullres", weights=[weights],
        reference_case=False,
    )  # fmt: skip
    (root / "in").mkdir()
    for seed, (name, (affine, kind, dtype)) in enumerate(IMAGES.items()):
        voxels = np.random.default_rng(seed).normal(100, 15, (19, 22, 13)).astype(dtype)
        picture = kind(voxels, affine)
        picture.set_qform(affine, 1)
        picture.set_sform(affine, 1)
        picture.header.set_xyzt_units("mm")
        nib.save(picture, root / "in" / f"{name}_0000.nii.gz")
    outcome = medmamba.predict(
        root / "in", root / "out", root / "model", device="cpu", supervised=False
    )
    assert outcome.succeeded == len(IMAGES)
    found = {}
    for name in IMAGES:
        record = json.loads((root / "out" / f"{name}.json").read_text())
        labels = {item["values"][0]: item for item in record["labels"]}
        assert all(item["voxels"] for item in labels.values())
        found[name] = Predicted(
            root / "in" / f"{name}_0000.nii.gz", root / "out" / f"{name}.nii.gz", labels
        )
    return found


@pytest.mark.parametrize("name", IMAGES)
def test_nibabel_agrees(predicted: dict[str, Predicted], name: str) -> None:
    case = predicted[name]
    image, mask = nib.load(case.image), nib.load(case.mask)
    np.testing.assert_array_equal(mask.affine, image.affine)
    assert mask.shape == image.shape
    assert mask.header.get_zooms() == image.header.get_zooms()
    voxel_ml = abs(np.linalg.det(mask.affine[:3, :3])) / 1000
    for value, item in case.labels.items():
        count = int((np.asarray(mask.dataobj) == value).sum())
        assert count == item["voxels"]
        assert count * voxel_ml == pytest.approx(item["volume_ml"], rel=1e-6)


@pytest.mark.parametrize("name", IMAGES)
def test_simpleitk_agrees(predicted: dict[str, Predicted], name: str) -> None:
    case = predicted[name]
    image, mask = SimpleITK.ReadImage(str(case.image)), SimpleITK.ReadImage(str(case.mask))
    assert mask.GetSize() == image.GetSize()
    assert mask.GetOrigin() == image.GetOrigin()
    assert mask.GetSpacing() == image.GetSpacing()
    assert mask.GetDirection() == image.GetDirection()
    shapes = SimpleITK.LabelShapeStatisticsImageFilter()
    shapes.Execute(mask)
    assert set(shapes.GetLabels()) == set(case.labels)
    for value, item in case.labels.items():
        assert shapes.GetNumberOfPixels(value) == item["voxels"]
        assert shapes.GetPhysicalSize(value) / 1000 == pytest.approx(item["volume_ml"], rel=1e-5)


def said(*command: str | Path) -> str:
    return subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.skipif(shutil.which("mrinfo") is None, reason="mrtrix3 is not installed")
@pytest.mark.parametrize("name", IMAGES)
def test_mrtrix_agrees(predicted: dict[str, Predicted], name: str, tmp_path: Path) -> None:
    case = predicted[name]
    for question in ("-size", "-spacing", "-transform", "-strides"):
        assert said("mrinfo", question, case.mask) == said("mrinfo", question, case.image)
    spacing = [float(value) for value in said("mrinfo", "-spacing", case.mask).split()]
    for value, item in case.labels.items():
        chosen = tmp_path / f"{value}.nii"
        said("mrcalc", "-quiet", case.mask, str(value), "-eq", chosen)
        count = int(said("mrstats", "-quiet", case.mask, "-mask", chosen, "-output", "count"))
        assert count == item["voxels"]
        assert count * np.prod(spacing) / 1000 == pytest.approx(item["volume_ml"], rel=1e-4)


@pytest.mark.skipif(shutil.which("nifti_tool") is None, reason="nifti-bin is not installed")
@pytest.mark.parametrize("name", IMAGES)
def test_nifti_tool_agrees(predicted: dict[str, Predicted], name: str) -> None:
    case = predicted[name]
    fields = ["qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x",
              "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units",
              "dim"]  # fmt: skip
    asked = [part for field in fields for part in ("-field", field)]
    image, mask = (
        said("nifti_tool", "-quiet", "-disp_hdr", *asked, "-infiles", path)
        for path in (case.image, case.mask)
    )
    assert mask == image
