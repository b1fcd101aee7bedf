"""Preprocess random volumes and restore random logits with nnU-Net and with medmamba.

python plans/bench/preprocessing_parity.py [--draws 300] [--first 0]

Needs the extra ``nnunet``; both run in this process. Drawn are shapes down to one voxel, spacings,
axis orders, zero margins, every normalisation with and without mask, regions, ignore labels, 2D
and 3D, and logits in fp32 and fp16. Exit code 1 if any case differs.
"""

import argparse
import copy
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from medmamba.errors import GeometryError
from medmamba.plans.nnunet_schema import plan_from_nnunet
from medmamba.preprocessing.pipeline import preprocess_case
from medmamba.preprocessing.restore import (
    labels_from_probabilities,
    restore_labels,
    restore_probabilities,
)
from medmamba.volume import Geometry, Volume

SCHEMES = (
    "ZScoreNormalization",
    "CTNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
    "NoNormalization",
)
DATA_TOLERANCE = 1e-5
"""Relative to the largest value of the case."""
LABEL_TIES = 1e-4
PROBABILITY_TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3}


@dataclass(frozen=True, kw_only=True, eq=False)
class Draw:
    """One case, and what a planner could have said of it."""

    image: np.ndarray
    labels: np.ndarray
    spacing: tuple[float, ...]
    description: dict[str, Any]
    plans: dict[str, Any]
    random: np.random.Generator


def draw(seed: int) -> Draw:
    """Invent a case."""
    random = np.random.default_rng(seed)
    shape = random.integers(4, 40, 3)
    kind = random.integers(5)
    if kind == 0:
        shape[random.integers(3)] = random.integers(1, 6)
    if kind == 1:
        shape[0] = 1
    spacing = np.exp(random.uniform(np.log(0.4), np.log(3), 3))
    if random.random() < 0.5:
        spacing[random.integers(3)] *= random.uniform(2, 6)
    if random.random() < 0.2:
        spacing[:] = spacing[0]
    if random.random() < 0.15:
        spacing[1] = spacing[0]
    spacing = [float(np.float32(value)) for value in spacing]
    schemes = [SCHEMES[index] for index in random.integers(0, 5, int(random.integers(1, 4)))]
    mask = _mask(shape, random)
    image = np.stack([_channel(scheme, shape, random) * mask for scheme in schemes])
    count = int(random.integers(1, 6))
    fields = ndimage.gaussian_filter(random.normal(size=(count + 1, *shape)), (0, 1.5, 1.5, 1.5))
    labels = fields.argmax(0).astype(np.int16)
    if random.random() < 0.3:
        labels = (labels * mask).astype(np.int16)
    description = _description(len(schemes), count, random)
    if "ignore" in description["labels"]:
        labels[random.random(shape) < 0.1] = count + 1
    return Draw(
        image=image.astype(np.float32),
        labels=labels,
        spacing=tuple(spacing),
        description=description,
        plans=_plans(schemes, spacing, random),
        random=random,
    )


def _mask(shape: np.ndarray, random: np.random.Generator) -> np.ndarray:
    mask = np.zeros(shape, bool)
    if random.random() < 0.3:
        mask[:] = True
    else:
        low = [int(random.integers(0, size // 3 + 1)) for size in shape]
        high = [int(size - random.integers(0, size // 3 + 1)) for size in shape]
        mask[tuple(slice(a, max(b, a + 1)) for a, b in zip(low, high, strict=True))] = True
    if random.random() < 0.3:
        mask &= random.random(shape) < 0.9
    return mask


def _channel(scheme: str, shape: np.ndarray, random: np.random.Generator) -> np.ndarray:
    values = random.normal(100, 40, shape)
    if random.random() < 0.5:
        values = ndimage.gaussian_filter(values, 1) * 3
    if scheme.startswith("RGB"):
        values = np.clip(np.round(np.abs(values)), 0, 255)
    if random.random() < 0.4:
        values = np.round(values)
    return values * 10 - 500 if scheme.startswith("CT") else values


def _description(channels: int, count: int, random: np.random.Generator) -> dict[str, Any]:
    labels: dict[str, Any] = {"background": 0, **{f"c{i}": i for i in range(1, count + 1)}}
    found: dict[str, Any] = {
        "channel_names": {str(index): "any" for index in range(channels)},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    kind = random.integers(4)
    if kind == 0 and count >= 2:
        whole = [int(value) for value in random.permutation(np.arange(1, count + 1))]
        labels = {"background": 0, "whole": whole, **{f"c{i}": i for i in range(2, count + 1)}}
        found["regions_class_order"] = [int(v) for v in random.permutation(whole)]
    if kind == 1 or (kind == 0 and random.random() < 0.4):
        labels["ignore"] = count + 1
    return {**found, "labels": labels}


def _plans(schemes: list[str], spacing: list[float], random: np.random.Generator) -> dict[str, Any]:
    forward = [int(axis) for axis in random.permutation(3)]
    dimension = 2 if random.random() < 0.25 else 3
    turned = np.array(spacing)[forward]
    target = turned * np.exp(random.uniform(np.log(0.5), np.log(1.8), 3))
    if random.random() < 0.2:
        target[random.integers(3)] *= 4
    if random.random() < 0.15:
        target = turned
    if random.random() < 0.1:
        target[0] = turned[0]
    statistics = {
        "max": 2000.0,
        "mean": float(random.normal(0, 200)),
        "median": 0.0,
        "min": -1000.0,
        "percentile_00_5": -300.0,
        "percentile_99_5": 500.0,
        "std": float(random.uniform(50, 300)),
    }
    return {
        "dataset_name": "Dataset500_Random",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [9, 9, 9],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": forward,
        "transpose_backward": [forward.index(axis) for axis in range(3)],
        "configurations": {
            "drawn": _configuration(schemes, [float(v) for v in target[3 - dimension :]], random)
        },
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            str(index): statistics for index in range(len(schemes))
        },
    }


def _configuration(
    schemes: list[str], spacing: list[float], random: np.random.Generator
) -> dict[str, Any]:
    kinds = {"data": (False, 3), "seg": (True, 1), "probabilities": (False, 1)}
    dimension = len(spacing)
    return {
        "data_identifier": "drawn",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [16] * dimension,
        "median_image_size_in_voxels": [16.0] * dimension,
        "spacing": spacing,
        "normalization_schemes": schemes,
        "use_mask_for_norm": [bool(random.random() < 0.5) for _ in schemes],
        **{f"resampling_fn_{kind}": "resample_data_or_seg_to_shape" for kind in kinds},
        **{
            f"resampling_fn_{kind}_kwargs": {
                "is_seg": is_seg,
                "order": order,
                "order_z": 0,
                "force_separate_z": None,
            }
            for kind, (is_seg, order) in kinds.items()
        },
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 2,
                "features_per_stage": [8, 16],
                "kernel_sizes": [[3] * dimension] * 2,
                "strides": [[1] * dimension, [2] * dimension],
                "n_conv_per_stage": [2, 2],
                "n_conv_per_stage_decoder": [2],
            },
            "_kw_requires_import": [],
        },
        "batch_dice": True,
    }


def compare(case: Draw) -> list[str]:
    """Say how the two differ; nothing when they agree, or both refuse."""
    theirs = _Nnunet(case)
    plan = plan_from_nnunet(case.plans, case.description)
    branch = plan.configurations["drawn"]
    geometry = Geometry.from_spacing(case.labels.shape, case.spacing)
    try:
        made = preprocess_case(
            Volume(array=case.image, geometry=geometry),
            Volume(array=case.labels[None], geometry=geometry),
            grid=branch.grid,
            recipe=branch.preprocessing,
            label_map=plan.label_map,
        )
    except GeometryError:
        return [] if theirs.failed else ["only medmamba refuses the case"]
    if theirs.failed:
        return ["only nnU-Net refuses the case"]
    if made.data.shape != theirs.data.shape:
        return [f"shape {made.data.shape} instead of {theirs.data.shape}"]
    found = _compare_arrays(made, theirs)
    logits = case.random.normal(size=(plan.label_map.output_channels, *made.data.shape[1:]))
    logits = ndimage.gaussian_filter(logits, (0, 1, 1, 1)).astype(np.float32) * 8
    for precision in ("fp32", "fp16"):
        found += _compare_export(logits, precision, made.record, branch, plan, theirs)
    return found


class _Nnunet:
    """What nnU-Net makes of a case."""

    def __init__(self, case: Draw) -> None:
        from nnunetv2.preprocessing.preprocessors.default_preprocessor import (  # noqa: TID251
            DefaultPreprocessor,
        )
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager  # noqa: TID251

        self.plans = PlansManager(copy.deepcopy(case.plans))
        self.configuration = self.plans.get_configuration("drawn")
        self.labels = self.plans.get_label_manager(case.description)
        try:
            self.data, self.seg, self.properties = DefaultPreprocessor(verbose=False).run_case_npy(
                case.image,
                case.labels[None],
                {"spacing": list(case.spacing)},
                self.plans,
                self.configuration,
                case.description,
            )
            self.failed = False
        except ValueError:
            # An axis without voxels: nnU-Net stumbles over the empty array.
            self.failed = True

    def export(self, logits: Any, *, probabilities: bool) -> Any:
        from nnunetv2.inference import export_prediction  # noqa: TID251

        return export_prediction.convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, self.plans, self.configuration, self.labels, self.properties, probabilities, 1
        )


def _compare_arrays(made: Any, theirs: _Nnunet) -> list[str]:
    found = []
    worst = np.abs(made.data - theirs.data).max() / max(1, np.abs(theirs.data).max())
    if not worst <= DATA_TOLERANCE:
        found.append(f"data differ by {worst}")
    if not np.array_equal(made.labels, theirs.seg):
        found.append(f"{np.count_nonzero(made.labels != theirs.seg)} labels differ")
    box = [list(map(int, side)) for side in theirs.properties["bbox_used_for_cropping"]]
    if [list(side) for side in made.record.crop_box] != box:
        found.append(f"box {made.record.crop_box} instead of {box}")
    expected = {
        key if isinstance(key, tuple) else (int(key),): np.asarray(where).reshape(-1, 4)[:, 1:]
        for key, where in theirs.properties["class_locations"].items()
    }
    if set(expected) != set(made.class_locations):
        return [*found, f"classes {set(made.class_locations)} instead of {set(expected)}"]
    return found + [
        f"locations of {key} differ"
        for key, where in expected.items()
        if not np.array_equal(where, made.class_locations[key])
    ]


def _compare_export(
    logits: np.ndarray, precision: str, record: Any, branch: Any, plan: Any, theirs: _Nnunet
) -> list[str]:
    import torch

    half = precision == "fp16"
    tensor = torch.from_numpy(logits)
    tensor = tensor.half() if half else tensor
    recipe, label_map = branch.preprocessing, plan.label_map
    quick = theirs.export(tensor.clone(), probabilities=False)
    slow, exact = theirs.export(tensor.clone(), probabilities=True)
    labels = restore_labels(tensor, record, recipe, label_map, compat=half)
    fields = restore_probabilities(tensor, record, recipe, label_map, compat=half)
    decided = labels_from_probabilities(fields, label_map)
    allowed = 0 if half else max(1, LABEL_TIES * labels.size)
    found = []
    if labels.dtype != quick.dtype:
        found.append(f"{precision}: labels are {labels.dtype} instead of {quick.dtype}")
    for name, ours, expected in (("logits", labels, quick), ("probabilities", decided, slow)):
        wrong = np.count_nonzero(ours != expected)
        if wrong > allowed:
            found.append(f"{precision}: {wrong} labels from {name} differ")
    worst = np.abs(fields - np.asarray(exact)).max()
    if worst > PROBABILITY_TOLERANCE[precision]:
        found.append(f"{precision}: probabilities differ by {worst}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    chosen = parser.parse_args()
    failed = 0
    for seed in range(chosen.first, chosen.first + chosen.draws):
        found = compare(draw(seed))
        failed += bool(found)
        for line in found:
            print(f"draw {seed}: {line}")
    print(f"{chosen.draws - failed} of {chosen.draws} cases equal")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
