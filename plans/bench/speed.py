"""Fingerprint and preprocess one raw dataset with nnU-Net and with medmamba, side by side.

python plans/bench/speed.py DATASET_FOLDER [--workers 2] [--steps fingerprint preprocess]
python plans/bench/speed.py --synthetic 6 WHERE     first writes 6 cases of 4 x 155 x 240 x 240

Steps: ``fingerprint`` is exact against nnU-Net's random samples; ``compatible`` draws the same
samples as nnU-Net and checks that the statistics agree; ``preprocess`` makes 3d_fullres.

Needs the extra ``nnunet`` and Linux. Each step runs in a fresh process; memory is the largest sum
of proportional shares over that process and all its children, sampled ten times a second.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

STEPS = ("fingerprint", "compatible", "preprocess")
AGREEMENT = 1e-6
SYNTHETIC_SHAPE = (155, 240, 240)
SYNTHETIC_CHANNELS = 4
SAMPLE_S = 0.1

MEDMAMBA = """
import sys
from pathlib import Path
from medmamba.dataset import open_dataset
from medmamba.files import from_plain, read_json, to_json, write_atomic
from medmamba.errors import PlanError
from medmamba.plans.budget import Budget
from medmamba.plans.fingerprint import (
    Fingerprint,
    compute_fingerprint,
    fingerprint_to_nnunet,
)
from medmamba.plans.planner import make_plan
from medmamba.plans.preprocess import preprocess_dataset
from medmamba.plans.presets import load_preset

step, folder, work, workers = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
dataset = open_dataset(folder)
path = work / "fingerprint.json"
if step in ("fingerprint", "compatible"):
    sampling = "exact" if step == "fingerprint" else "compatible"
    found = compute_fingerprint(
        dataset, workers=workers, folder=work / ("cases_" + step), sampling=sampling
    )
    write_atomic(path, to_json(found))
    write_atomic(work / (step + ".json"), to_json(fingerprint_to_nnunet(found)))
else:
    content = read_json(path, what="fingerprint", error=PlanError)
    found = from_plain(Fingerprint, content, what="fingerprint", error=PlanError)
    plan = make_plan(found, dataset.description, load_preset("plain_unet"), Budget())
    name = "3d_fullres" if "3d_fullres" in plan.configurations else "2d"
    preprocess_dataset(dataset, plan, {name: work / name}, workers=workers)
"""

NNUNET = """
import sys
from pathlib import Path

if __name__ == "__main__":
    step, folder, workers = sys.argv[1], Path(sys.argv[2]), int(sys.argv[4])
    number = int(folder.name[7:10])
    if step in ("fingerprint", "compatible"):
        from nnunetv2.experiment_planning.dataset_fingerprint import fingerprint_extractor

        extractor = fingerprint_extractor.DatasetFingerprintExtractor(number, workers)
        extractor.run(overwrite_existing=True)
    else:
        from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset

        preprocess_dataset(number, configurations=("3d_fullres",), num_processes=(workers,))
"""

PLAN = """
import sys
from pathlib import Path

if __name__ == "__main__":
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset

    plan_experiment_dataset(int(Path(sys.argv[2]).name[7:10]))
"""


def measure(script: Path, arguments: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Run a script; return seconds and mebibytes."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    largest = 0
    while process.poll() is None:
        largest = max(largest, sum(share(number) for number in family(process.pid)))
        time.sleep(SAMPLE_S)
    if process.returncode:
        assert process.stderr is not None
        sys.exit(process.stderr.read().decode()[-2000:])
    return time.perf_counter() - started, largest / 1024


def family(number: int) -> list[int]:
    """The process and everything it started."""
    found = [number]
    try:
        for task in Path(f"/proc/{number}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += family(int(child))
    except OSError:
        pass
    return found


def share(number: int) -> int:
    """Proportional share of memory in kibibytes."""
    try:
        for line in Path(f"/proc/{number}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def write_synthetic(folder: Path, cases: int) -> Path:
    """Write cases as large as the brain tumour images of nnU-Net's papers."""
    dataset = folder / "Dataset960_Synthetic"
    random = np.random.default_rng(0)
    depth, height, width = SYNTHETIC_SHAPE
    z, y, x = np.ogrid[:depth, :height, :width]
    for number in range(cases):
        centre = np.array(SYNTHETIC_SHAPE) / 2 + random.normal(0, 4, 3)
        parts = zip((z, y, x), centre, SYNTHETIC_SHAPE, strict=True)
        distance = sum(((axis - c) / (0.38 * size)) ** 2 for axis, c, size in parts)
        labels = (distance < 0.15).astype(np.uint8) + (distance < 0.08)
        for channel in range(SYNTHETIC_CHANNELS):
            noise = random.normal(400 + 50 * channel, 60, SYNTHETIC_SHAPE)
            image = ((noise + 80 * labels) * (distance < 1)).astype(np.float32)
            _write(dataset / "imagesTr" / f"case_{number}_{channel:04d}.nii.gz", image)
        _write(dataset / "labelsTr" / f"case_{number}.nii.gz", labels)
    description = {
        "channel_names": {str(channel): f"MR{channel}" for channel in range(SYNTHETIC_CHANNELS)},
        "labels": {"background": 0, "edge": 1, "core": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (dataset / "dataset.json").write_text(json.dumps(description))
    return dataset


def _write(path: Path, array: np.ndarray) -> None:
    from medmamba.io import write_image
    from medmamba.volume import Geometry

    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, array, Geometry.from_spacing(array.shape, (1.0, 1.0, 1.0)))


def disagreement(ours: Path, theirs: Path) -> float:
    """Largest relative difference of intensity statistics; sizes must be equal."""
    mine, other = (json.loads(path.read_text()) for path in (ours, theirs))
    for key in ("spacings", "shapes_after_crop"):
        if mine[key] != other[key]:
            sys.exit(f"{key} differ: nothing is timed before that is mended")
    key = "foreground_intensity_properties_per_channel"
    return max(
        abs(mine[key][channel][name] - value) / max(abs(value), 1e-9)
        for channel, statistics in other[key].items()
        for name, value in statistics.items()
    )


def compare(step: str, dataset: Path, work: Path, workers: int) -> dict[str, Any]:
    """Time one step of both sides."""
    environment = {
        **os.environ,
        **{f"nnUNet_{name}": str(work / name) for name in ("raw", "preprocessed", "results")},
    }
    figures = {}
    for side in ("ours", "theirs"):
        if side == "theirs" and step == "preprocess":
            measure(work / "plan.py", ["plan", str(dataset)], environment)
        arguments = [step, str(dataset), str(work), str(workers)]
        figures[side] = measure(work / f"{side}.py", arguments, environment)
    (seconds, memory), (their_seconds, their_memory) = figures["ours"], figures["theirs"]
    found = {
        "step": step,
        "dataset": dataset.name,
        "medmamba_s": round(seconds, 2),
        "nnunet_s": round(their_seconds, 2),
        "times_faster": round(their_seconds / seconds, 1),
        "medmamba_mib": round(memory),
        "nnunet_mib": round(their_memory),
        "memory_fraction": round(memory / their_memory, 3),
    }
    if step == "compatible":
        theirs = work / "preprocessed" / dataset.name / "dataset_fingerprint.json"
        found["disagreement"] = disagreement(work / "compatible.json", theirs)
        if found["disagreement"] > AGREEMENT:
            sys.exit(f"statistics differ by {found['disagreement']}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path, help="raw dataset, or where to write a synthetic one")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", nargs="+", default=STEPS, choices=STEPS)
    parser.add_argument("--synthetic", type=int, metavar="CASES", help="write this many first")
    chosen = parser.parse_args()
    dataset = chosen.dataset.resolve()
    if chosen.synthetic:
        dataset = write_synthetic(dataset, chosen.synthetic)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "raw").mkdir()
        (work / "raw" / dataset.name).symlink_to(dataset)
        for script, text in (("ours", MEDMAMBA), ("theirs", NNUNET), ("plan", PLAN)):
            (work / f"{script}.py").write_text(text)
        for step in STEPS:
            if step in chosen.steps:
                print(json.dumps(compare(step, dataset, work, chosen.workers)), flush=True)


if __name__ == "__main__":
    main()
