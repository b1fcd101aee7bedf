"""Small raw datasets made on the spot."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

SHAPE = (10, 12, 8)


def write_volume(
    path: Path,
    values: NDArray[Any],
    spacing: tuple[float, float, float] = (1.0, 1.5, 2.0),
    *,
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> Path:
    """Save a volume (x, y, z) with a coded position."""
    matrix = np.diag([*spacing, 1.0])
    matrix[:3, 3] = origin
    image = nibabel.Nifti1Image(values, matrix)
    image.set_qform(matrix, 1)
    image.set_sform(matrix, 1)
    image.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


@pytest.fixture
def volume() -> Callable[..., Path]:
    """``write_volume`` for tests."""
    return write_volume


def image_values(seed: int, shape: tuple[int, ...] = SHAPE) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


def label_values(shape: tuple[int, ...] = SHAPE) -> NDArray[np.uint8]:
    labels = np.zeros(shape, np.uint8)
    labels[2:5, 3:6, 2:5] = 1
    labels[6:8, 7:10, 3:6] = 2
    return labels


@pytest.fixture
def raw_dataset(tmp_path: Path) -> Path:
    """A sound nnU-Net raw dataset of six cases with two channels."""
    folder = tmp_path / "Dataset123_Phantom"
    for index in range(6):
        for channel in range(2):
            name = f"case_{index:02d}_{channel:04d}.nii.gz"
            write_volume(folder / "imagesTr" / name, image_values(10 * index + channel))
        write_volume(folder / "labelsTr" / f"case_{index:02d}.nii.gz", label_values())
    for channel in range(2):
        write_volume(folder / "imagesTs" / f"new_{channel:04d}.nii.gz", image_values(90 + channel))
    description = {
        "channel_names": {"0": "PET", "1": "MRI"},
        "labels": {"background": 0, "liver": 1, "tumour": 2},
        "numTraining": 6,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


@pytest.fixture
def edit() -> Callable[..., None]:
    """Change entries of a dataset.json; None removes one."""

    def change(folder: Path, **entries: Any) -> None:
        path = folder / "dataset.json"
        description = json.loads(path.read_text())
        for key, value in entries.items():
            if value is None:
                description.pop(key, None)
            else:
                description[key] = value
        path.write_text(json.dumps(description))

    return change
