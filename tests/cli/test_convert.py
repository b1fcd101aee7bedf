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
from torch import nn
from typer.testing import CliRunner

from medmamba.bundle import load_bundle
from medmamba.cli.app import app
from medmamba.errors import BundleError, SecurityError, UsageError
from medmamba.interop.official import build, official_state

LIGHTM = {"spatial_dims": 3, "init_filters": 8, "in_channels": 1, "out_channels": 2}

CONFIGURATION = {
    "data_identifier": "nnUNetPlans_3d_fullres",
    "preprocessor_name": "DefaultPreprocessor",
    "batch_size": 2,
    "patch_size": [16, 16, 16],
    "median_image_size_in_voxels": [20.0, 20.0, 20.0],
    "spacing": [1.0, 1.0, 1.0],
    "normalization_schemes": ["ZScoreNormalization"],
    "use_mask_for_norm": [False],
    "UNet_class_name": "PlainConvUNet",
    "UNet_base_num_features": 32,
    "n_conv_per_stage_encoder": [2, 2, 2],
    "n_conv_per_stage_decoder": [2, 2],
    "num_pool_per_axis": [2, 2, 2],
    "pool_op_kernel_sizes": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
    "conv_kernel_sizes": [[3, 3, 3]] * 3,
    "unet_max_num_features": 320,
    "resampling_fn_data": "resample_data_or_seg_to_shape",
    "resampling_fn_seg": "resample_data_or_seg_to_shape",
    "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0},
    "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0},
    "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
    "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, "order_z": 0},
    "batch_dice": False,
}
INTENSITIES = dict.fromkeys(
    ("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std"), 1.0
)
PLANS = {
    "dataset_name": "Dataset001_Blocks",
    "plans_name": "nnUNetPlans",
    "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
    "original_median_shape_after_transp": [20, 20, 20],
    "image_reader_writer": "SimpleITKIO",
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
    "configurations": {"3d_fullres": CONFIGURATION},
    "experiment_planner_used": "ExperimentPlanner",
    "label_manager": "LabelManager",
    "foreground_intensity_properties_per_channel": {"0": INTENSITIES},
}
DATASET = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "block": 1},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}


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
