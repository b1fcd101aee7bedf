"""Draw random fingerprints, plan them with nnU-Net and with medmamba, and count differences.

python plans/bench/planner_parity.py [--draws 300] [--first 0]

Needs the extra ``nnunet``. nnU-Net's planner runs in this process, its candidate networks on the
meta device, so that a draw takes about a second. Exit code 1 if any key of any plan differs.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmamba.errors import PlanError
from medmamba.plans.budget import Budget
from medmamba.plans.fingerprint import fingerprint_from_nnunet
from medmamba.plans.nnunet_schema import BLOCK, plan_to_nnunet
from medmamba.plans.planner import make_plan
from medmamba.plans.presets import Preset
from medmamba.plans.sizing import NNUNET_PLANNERS

CHANNELS = ("CT", "T1", "noNorm", "zscore", "rescale_to_0_1", "rgb_to_0_1")
STATISTICS = ("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std")


@dataclass(frozen=True, kw_only=True)
class Draw:
    """A fingerprint, a dataset.json and what a user might ask of the planner."""

    fingerprint: dict[str, Any]
    description: dict[str, Any]
    options: dict[str, Any]


def draw(seed: int) -> Draw:
    """Invent any anisotropy, size, channel and label count; every other draw has a peculiarity."""
    random = np.random.default_rng(seed)
    fingerprint, description = _ordinary(random)
    options: dict[str, Any] = {}
    if seed % 2:
        PECULIARITIES[int(random.integers(len(PECULIARITIES)))](fingerprint, description, random)
        options = _options(random)
    return Draw(fingerprint=fingerprint, description=description, options=options)


def _ordinary(random: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
    cases = int(random.integers(1, 60))
    spacing = np.exp(random.uniform(np.log(0.3), np.log(3), 3))
    if random.random() < 0.5:
        spacing[random.integers(3)] *= random.uniform(1, 8)
    size = np.exp(random.uniform(np.log(12), np.log(500), 3))
    if random.random() < 0.1:
        size[0] = 1
    spread = 0.0 if random.random() < 0.3 else 0.1
    spacings = [
        [float(np.float32(s * random.uniform(1 - spread, 1 + spread))) for s in spacing]
        for _ in range(cases)
    ]
    shapes = [
        [int(s * random.uniform(0.7, 1.3)) if s > 1 else 1 for s in size] for _ in range(cases)
    ]
    names = random.choice(CHANNELS, int(random.integers(1, 4)))
    labels = int(random.integers(1, 12))
    statistics = dict.fromkeys(STATISTICS, 1.0)
    fingerprint = {
        "spacings": spacings,
        "shapes_after_crop": shapes,
        "foreground_intensity_properties_per_channel": {
            str(index): statistics for index in range(len(names))
        },
        "median_relative_size_after_cropping": float(random.uniform(0.5, 1)),
    }
    description = {
        "channel_names": {str(index): str(name) for index, name in enumerate(names)},
        "labels": {"background": 0, **{f"c{i}": i for i in range(1, labels + 1)}},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    return fingerprint, description


def _thin(found: dict[str, Any], description: dict[str, Any], random: np.random.Generator) -> None:
    count, axis = description["numTraining"], int(random.integers(3))
    spacing, size = [0.5] * 3, [200, 220, 240]
    spacing[axis], size[axis] = float(random.uniform(1.4, 8)), int(random.integers(3, 40))
    found["spacings"] = [
        [float(value * random.choice([1, 1, 1.2, 0.8])) for value in spacing] for _ in range(count)
    ]
    found["shapes_after_crop"] = [
        [int(edge * random.uniform(0.8, 1.2)) for edge in size] for _ in range(count)
    ]


def _flat(found: dict[str, Any], description: dict[str, Any], random: np.random.Generator) -> None:
    count = description["numTraining"]
    found["spacings"] = [[999.0 if random.random() < 0.5 else 1.0, 1.0, 1.0]] * count
    found["shapes_after_crop"] = [
        [1, *map(int, random.integers(20, 2000, 2))] for _ in range(count)
    ]


def _cube(found: dict[str, Any], description: dict[str, Any], random: np.random.Generator) -> None:
    edge = int(random.choice([64, 96, 100, 128, 160, 256, 300, 512]))
    found["spacings"] = [[1.0] * 3] * description["numTraining"]
    found["shapes_after_crop"] = [[edge] * 3] * description["numTraining"]


def _single(
    found: dict[str, Any], description: dict[str, Any], random: np.random.Generator
) -> None:
    description["numTraining"] = 1
    found["spacings"], found["shapes_after_crop"] = (
        found[key][:1] for key in ("spacings", "shapes_after_crop")
    )


def _regions(
    found: dict[str, Any], description: dict[str, Any], random: np.random.Generator
) -> None:
    labels = description["labels"]
    if len(labels) > 2:
        description["regions_class_order"] = list(range(1, len(labels) + 1))
        labels["whole"] = [1, 2]


def _ignore(
    found: dict[str, Any], description: dict[str, Any], random: np.random.Generator
) -> None:
    description["labels"]["ignore"] = len(description["labels"])


PECULIARITIES = (_thin, _flat, _cube, _single, _regions, _ignore)


def _options(random: np.random.Generator) -> dict[str, Any]:
    """Arguments of nnU-Net's planners."""
    options: dict[str, Any] = {}
    if random.random() < 0.3:
        digits = int(random.integers(1, 4))
        options["overwrite_target_spacing"] = [
            float(value) for value in np.round(random.uniform(0.3, 6, 3), digits)
        ]
    if random.random() < 0.4:
        options["gpu_memory_target_in_gb"] = float(random.choice([4, 6, 8, 11, 16, 24, 40, 80]))
    if random.random() < 0.2:
        options["plans_name"] = "otherPlans"
    return options


def plan_with_medmamba(drawn: Draw, planner: str, name: str) -> dict[str, Any]:
    network = "resenc_unet" if NNUNET_PLANNERS[planner].residual else "plain_unet"
    plan = make_plan(
        fingerprint_from_nnunet(drawn.fingerprint, name),
        drawn.description,
        Preset(name=network, network=network),
        Budget(
            planner=planner,
            memory_gb=drawn.options.get("gpu_memory_target_in_gb"),
            spacing_mm=drawn.options.get("overwrite_target_spacing"),
        ),
        plans_name=drawn.options.get("plans_name"),
    )
    content: dict[str, Any] = json.loads(json.dumps(plan_to_nnunet(plan)))
    del content[BLOCK]
    return content


def plan_with_nnunet(drawn: Draw, planner: str, folder: Path) -> dict[str, Any]:
    """Run nnU-Net's own planner; ``folder`` is its folder of preprocessed datasets."""
    dataset = folder / "preprocessed" / "Dataset500_Random"
    (folder / "raw" / dataset.name / "imagesTr").mkdir(parents=True, exist_ok=True)
    dataset.mkdir(parents=True, exist_ok=True)
    for place in (folder / "raw" / dataset.name, dataset):
        (place / "dataset.json").write_text(json.dumps(drawn.description))
    (dataset / "dataset_fingerprint.json").write_text(json.dumps(drawn.fingerprint))
    for old in dataset.glob("*Plans.json"):
        # nnU-Net keeps configurations of an older file.
        old.unlink()
    with nnunet_folders(folder), contextlib.redirect_stdout(io.StringIO()):
        running = _nnunet_planner(planner)(500, **drawn.options)
        running.plan_experiment()
    content: dict[str, Any] = json.loads((dataset / f"{running.plans_identifier}.json").read_text())
    return content


def compare(drawn: Draw, planner: str, folder: Path) -> list[str]:
    """Say how the two plans differ; nothing when they agree, or both refuse."""
    try:
        theirs = plan_with_nnunet(drawn, planner, folder)
    except ZeroDivisionError:
        # An axis of the median case has no voxel left at the spacing asked for.
        theirs = None
    try:
        ours = plan_with_medmamba(drawn, planner, "Dataset500_Random")
    except PlanError as problem:
        return [] if theirs is None else [f"only medmamba refuses: {problem.message}"]
    return ["only nnU-Net refuses"] if theirs is None else differences(ours, theirs)


@contextlib.contextmanager
def nnunet_folders(folder: Path) -> Iterator[None]:
    """Point nnU-Net at ``folder`` for the block."""
    names = ("raw", "preprocessed", "results")
    before = {f"nnUNet_{name}": os.environ.get(f"nnUNet_{name}") for name in names}
    os.environ.update({f"nnUNet_{name}": str(folder / name) for name in names})
    try:
        yield
    finally:
        for variable, value in before.items():
            os.environ.pop(variable)
            if value is not None:
                os.environ[variable] = value


def _nnunet_planner(name: str) -> type[Any]:
    import torch
    from nnunetv2.experiment_planning.experiment_planners import (  # noqa: TID251
        default_experiment_planner,
    )
    from nnunetv2.experiment_planning.experiment_planners.residual_unets import (  # noqa: TID251
        residual_encoder_unet_planners,
    )
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO  # noqa: TID251

    plain = default_experiment_planner.ExperimentPlanner
    kind = plain if name == plain.__name__ else getattr(residual_encoder_unet_planners, name)

    class OnMeta(kind):  # type: ignore[valid-type, misc]
        @staticmethod
        def static_estimate_VRAM_usage(*args: Any, **kwargs: Any) -> float:  # noqa: N802
            with torch.device("meta"):
                return float(kind.static_estimate_VRAM_usage(*args, **kwargs))

        def determine_reader_writer(self) -> type[SimpleITKIO]:
            return SimpleITKIO

    OnMeta.__name__ = name
    return OnMeta


def differences(ours: Any, theirs: Any, where: str = "") -> list[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = [*theirs, *(key for key in ours if key not in theirs)]
        return [d for k in keys for d in differences(ours.get(k), theirs.get(k), f"{where}/{k}")]
    return [] if ours == theirs else [f"{where}: {ours} instead of {theirs}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    chosen = parser.parse_args()
    planners, failed = list(NNUNET_PLANNERS), 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(chosen.first, chosen.first + chosen.draws):
            planner = planners[seed % len(planners)]
            found = compare(draw(seed), planner, Path(folder))
            failed += bool(found)
            for line in found[:5]:
                print(f"draw {seed}, {planner}: {line}")
    print(f"{chosen.draws - failed} of {chosen.draws} plans equal")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
