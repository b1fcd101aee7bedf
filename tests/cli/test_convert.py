"""Conversions as a user meets them: a foreign checkpoint becomes a model that predicts."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from foreign_checkpoints import CONFIGURATION as PRESENT
from foreign_checkpoints import DATASET
from foreign_checkpoints import PLANS as PRESENT_PLANS
from torch import nn
from typer.testing import CliRunner

from medmamba.bundle import load_bundle
from medmamba.cli.app import app
from medmamba.errors import BundleError, SecurityError, UsageError
from medmamba.interop.official import build, official_state

LIGHTM = {"spatial_dims": 3, "init_filters": 8, "in_channels": 1, "out_channels": 2}

OLD_ARCHITECTURE = {
    "UNet_class_name": "PlainConvUNet",
    "UNet_base_num_features": 32,
    "n_conv_per_stage_encoder": [2, 2, 2],
    "n_conv_per_stage_decoder": [2, 2],
    "num_pool_per_axis": [2, 2, 2],
    "pool_op_kernel_sizes": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
    "conv_kernel_sizes": [[3, 3, 3]] * 3,
    "unet_max_num_features": 320,
}
"""How plans of before nnU-Net 2.4 describe a network."""

CONFIGURATION = {k: v for k, v in PRESENT.items() if k != "architecture"} | OLD_ARCHITECTURE
PLANS = PRESENT_PLANS | {"configurations": {"3d_fullres": CONFIGURATION}}


def write_checkpoint(path: Path, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    network = build("LightMUNet", LIGHTM).eval()
    content = {
        "network_weights": official_state(network),
        "trainer_name": "nnUNetTrainerLightMUNet",
        "init_args": {
            "plans": PLANS,
            "dataset_json": DATASET,
            "configuration": "3d_fullres",
            "fold": "all",
            "device": torch.device("cpu"),
        },
        "inference_allowed_mirroring_axes": (0, 1, 2),
        **changes,
    }
    torch.save(content, path)
    return network


def run(*arguments: object) -> str:
    """Run a command; what it raises is what ``main`` turns into a line and an exit code."""
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False).stdout


def test_imported_checkpoint_predicts_what_its_network_says(tmp_path: Path) -> None:
    network = write_checkpoint(tmp_path / "checkpoint_final.pth")
    said = run("convert", "import-checkpoint", tmp_path / "checkpoint_final.pth")
    model = tmp_path / "checkpoint_final-model"
    assert "lightm_unet_s" in said and str(model) in said
    # One patch of unit spacing: no tiling and no resampling stand between image and mask.
    image = np.random.default_rng(0).normal(size=(16, 16, 16)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(image, np.diag([-1.0, -1, 1, 1])), tmp_path / "a_0000.nii.gz")
    run("predict", "-i", tmp_path / "a_0000.nii.gz", "-o", tmp_path / "out", "-m", model)
    mask = np.asarray(nibabel.load(next((tmp_path / "out").glob("*.nii.gz"))).dataobj)
    array = image.transpose(2, 1, 0)
    normal = torch.from_numpy((array - array.mean()) / array.std())[None, None]
    with torch.no_grad():
        expected = network(normal).argmax(1)[0].numpy().transpose(2, 1, 0)
    assert 0 < expected.sum() < expected.size
    # Tiles are averaged in other precision where the device has bf16.
    assert (mask == expected).mean() > 0.99


def test_json_is_the_manifest(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c.pth")
    said = run("convert", "import-checkpoint", tmp_path / "c.pth", "-o", tmp_path / "m", "--json")
    assert json.loads(said)["network"] == "lightm_unet_s"
    assert load_bundle(tmp_path / "m").folds == ("all",)


def test_existing_folder_is_kept(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c.pth")
    (tmp_path / "m").mkdir()
    arguments = ("convert", "import-checkpoint", tmp_path / "c.pth", "-o", tmp_path / "m")
    with pytest.raises(UsageError, match="exists"):
        run(*arguments)
    run(*arguments, "--overwrite")
    assert load_bundle(tmp_path / "m").manifest.network == "lightm_unet_s"


class Payload:
    """Creates a file when a full unpickler loads it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def test_planted_program_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    write_checkpoint(tmp_path / "c.pth", current_epoch=Payload(marker))
    with zipfile.ZipFile(tmp_path / "c.pth") as archive:
        assert b"touch" in archive.read("c/data.pkl")
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists(), "the payload works"
    marker.unlink()
    with pytest.raises(SecurityError, match="nothing of it was run") as refusal:
        run("convert", "import-checkpoint", tmp_path / "c.pth", "-o", tmp_path / "m")
    assert refusal.value.exit_code == 7
    assert not marker.exists()
    assert not (tmp_path / "m").exists()


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        run("convert", "import-checkpoint", tmp_path / "c.pth", "-o", tmp_path / "m")
