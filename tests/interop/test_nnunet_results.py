"""A results folder of nnU-Net becomes a model of all its folds, by the folder's own plans."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from medmamba.bundle import load_networks
from medmamba.errors import BundleError
from medmamba.interop.nnunet_results import find_results, import_results
from medmamba.interop.official import official_state
from medmamba.networks import build_network
from medmamba.plans.budget import Budget
from medmamba.plans.fingerprint import fingerprint_from_nnunet
from medmamba.plans.nnunet_schema import BLOCK, plan_to_nnunet
from medmamba.plans.planner import make_plan
from medmamba.plans.presets import load_preset

STATISTICS = dict.fromkeys(
    ("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std"), 1.0
)
FINGERPRINT = {
    "spacings": [[1.0, 1.0, 1.0]] * 2,
    "shapes_after_crop": [[16, 18, 16]] * 2,
    "foreground_intensity_properties_per_channel": {"0": STATISTICS},
    "median_relative_size_after_cropping": 1.0,
}
DATASET = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "block": 1},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}


def write_results(root: Path, folds: tuple[int | str, ...]) -> Path:
    """Write what nnU-Net's trainer leaves behind, with random weights."""
    plan = make_plan(
        fingerprint_from_nnunet(FINGERPRINT, "Dataset007_Block"),
        DATASET,
        load_preset("plain_unet"),
        Budget(),
    )
    plans: dict[str, Any] = plan_to_nnunet(plan)
    del plans[BLOCK]
    folder = root / "Dataset007_Block" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    for fold in folds:
        torch.manual_seed(hash(fold) % 100)
        network = build_network(plan.configurations["3d_fullres"].network)
        content = {
            "network_weights": official_state(network),
            "trainer_name": "nnUNetTrainer",
            "init_args": {
                # What the trainer was given may be older than what the folder says.
                "plans": {**plans, "plans_name": "older"},
                "dataset_json": DATASET,
                "configuration": "3d_fullres",
                "fold": fold,
                "device": torch.device("cpu"),
            },
            "inference_allowed_mirroring_axes": (0, 1),
        }
        (folder / f"fold_{fold}" / "validation").mkdir(parents=True)
        torch.save(content, folder / f"fold_{fold}" / "checkpoint_final.pth")
        summary = {"foreground_mean": {"Dice": 0.5}}
        (folder / f"fold_{fold}" / "validation" / "summary.json").write_text(json.dumps(summary))
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(DATASET))
    return folder


def test_all_folds_become_one_model(tmp_path: Path) -> None:
    write_results(tmp_path, (0, 1))
    bundle = import_results(find_results(tmp_path), tmp_path / "model")
    assert bundle.folds == ("0", "1")
    assert bundle.plan.plans_name == "nnUNetPlans"
    assert bundle.configuration.training.mirror_axes == (0, 1)
    assert bundle.manifest.scores == {"validation_dice": {"0": 0.5, "1": 0.5}}
    first, second = load_networks(bundle)
    weights = [next(network.parameters()) for network in (first, second)]
    assert not torch.equal(*weights)


def test_a_fold_or_chosen_folds_are_taken(tmp_path: Path) -> None:
    folder = write_results(tmp_path, (0, 1, "all"))
    assert find_results(folder).folds == ("0", "1")
    assert find_results(folder / "fold_1").folds == ("1",)
    assert find_results(folder, folds=["all"]).folds == ("all",)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    folder = write_results(tmp_path, (0,))
    with pytest.raises(BundleError, match=r"fold 3 .*there for: 0"):
        find_results(folder, folds=["0", "3"])
    with pytest.raises(BundleError, match=r"checkpoint_best\.pth"):
        find_results(folder, checkpoint="checkpoint_best.pth")
    with pytest.raises(BundleError, match="configuration '2d'"):
        find_results(tmp_path, configuration="2d")
    with pytest.raises(BundleError, match="holds no model"):
        find_results(tmp_path / "Dataset007_Block" / folder.name / "fold_0" / "validation")


def test_several_models_are_listed(tmp_path: Path) -> None:
    folder = write_results(tmp_path, (0,))
    write_results(tmp_path / "more", (0,)).rename(
        folder.with_name("nnUNetTrainer__nnUNetPlans__2d")
    )
    with pytest.raises(BundleError, match=r"2 models .*__2d.*__3d_fullres"):
        find_results(folder.parent)
    assert find_results(folder.parent, configuration="3d_fullres").folder == folder
