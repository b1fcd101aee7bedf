"""A results folder as nnU-Net's trainer leaves it, with random weights."""

import json
from pathlib import Path
from typing import Any

import torch

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
