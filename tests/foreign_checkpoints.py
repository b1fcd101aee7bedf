"""Checkpoint files as nnU-Net and its forks write them, with random weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from medmamba.interop.official import official_state
from medmamba.networks import NETWORKS, build_network
from medmamba.plans.nnunet_schema import plan_from_nnunet

RESAMPLING = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
SEGMENTATION = {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None}

CONFIGURATION = {
    "data_identifier": "nnUNetPlans_3d_fullres",
    "preprocessor_name": "DefaultPreprocessor",
    "batch_size": 2,
    "patch_size": [16, 16, 16],
    "median_image_size_in_voxels": [20.0, 20.0, 20.0],
    "spacing": [1.0, 1.0, 1.0],
    "normalization_schemes": ["ZScoreNormalization"],
    "use_mask_for_norm": [False],
    "resampling_fn_data": "resample_data_or_seg_to_shape",
    "resampling_fn_seg": "resample_data_or_seg_to_shape",
    "resampling_fn_data_kwargs": RESAMPLING,
    "resampling_fn_seg_kwargs": SEGMENTATION,
    "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
    "resampling_fn_probabilities_kwargs": {**SEGMENTATION, "is_seg": False},
    "architecture": {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": [8, 16, 32],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * 3,
            "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
            "n_conv_per_stage": [2, 2, 2],
            "n_conv_per_stage_decoder": [2, 2],
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    },
    "batch_dice": False,
}

INTENSITIES = {
    "max": 4.0,
    "mean": 1.0,
    "median": 1.0,
    "min": 0.0,
    "percentile_00_5": 0.0,
    "percentile_99_5": 3.0,
    "std": 1.0,
}

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


def write_content(
    path: Path, state: Any, *, plans: Any = PLANS, configuration: str = "3d_fullres", **changes: Any
) -> None:
    """Write what nnU-Net's trainers write."""
    content = {
        "network_weights": state,
        "optimizer_state": {"state": {}, "param_groups": [{"lr": 0.01}]},
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float64(0.5)], "dice_per_class_or_region": [np.ones(2)]},
        "_best_ema": np.float64(0.5),
        "current_epoch": 1000,
        "trainer_name": "nnUNetTrainer",
        "init_args": {
            "plans": plans,
            "dataset_json": DATASET,
            "configuration": configuration,
            "fold": 2,
            "unpack_dataset": True,
            "device": torch.device("cpu"),
        },
        "inference_allowed_mirroring_axes": (0, 2),
        **changes,
    }
    torch.save(content, path)


def write_checkpoint(path: Path, name: str, **changes: Any) -> nn.Module:
    """Write what the official trainer of a network would write; return that network."""
    planned = plan_from_nnunet(PLANS, DATASET).configurations["3d_fullres"].network
    spec = replace(planned, name=name)
    if name.startswith("lightm"):
        spec = NETWORKS[name].arrange(spec)
    torch.manual_seed(1)
    network = build_network(spec).eval()
    write_content(path, changes.pop("network_weights", official_state(network)), **changes)
    return network
