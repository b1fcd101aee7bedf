"""Fingerprint and preprocess one raw dataset with nnU-Net and with medmamba, side by side.

python plans/bench/speed.py DATASET_FOLDER [--workers 2]

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

STEPS = ("fingerprint", "preprocess")
SAMPLE_S = 0.1

MEDMAMBA = """
import sys
from pathlib import Path
from medmamba.dataset import open_dataset
from medmamba.files import from_plain, read_json, to_json, write_atomic
from medmamba.errors import PlanError
from medmamba.plans.budget import Budget
from medmamba.plans.fingerprint import Fingerprint, compute_fingerprint
from medmamba.plans.planner import make_plan
from medmamba.plans.preprocess import preprocess_dataset
from medmamba.plans.presets import load_preset

step, folder, work, workers = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
dataset = open_dataset(folder)
path = work / "fingerprint.json"
if step == "fingerprint":
    found = compute_fingerprint(dataset, workers=workers, folder=work / "cases")
    write_atomic(path, to_json(found))
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
    if step == "fingerprint":
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    chosen = parser.parse_args()
    dataset = chosen.dataset.resolve()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "raw").mkdir()
        (work / "raw" / dataset.name).symlink_to(dataset)
        environment = {
            **os.environ,
            "nnUNet_raw": str(work / "raw"),
            "nnUNet_preprocessed": str(work / "preprocessed"),
            "nnUNet_results": str(work / "results"),
        }
        for script, text in (("ours", MEDMAMBA), ("theirs", NNUNET), ("plan", PLAN)):
            (work / f"{script}.py").write_text(text)
        for step in STEPS:
            figures = {}
            for side in ("ours", "theirs"):
                if side == "theirs" and step == "preprocess":
                    measure(work / "plan.py", ["plan", str(dataset)], environment)
                arguments = [step, str(dataset), str(work), str(chosen.workers)]
                figures[side] = measure(work / f"{side}.py", arguments, environment)
            (seconds, memory), (their_seconds, their_memory) = figures["ours"], figures["theirs"]
            print(
                json.dumps(
                    {
                        "step": step,
                        "dataset": dataset.name,
                        "medmamba_s": round(seconds, 2),
                        "nnunet_s": round(their_seconds, 2),
                        "times_faster": round(their_seconds / seconds, 1),
                        "medmamba_mib": round(memory),
                        "nnunet_mib": round(their_memory),
                        "memory_fraction": round(memory / their_memory, 3),
                    }
                )
            )


if __name__ == "__main__":
    main()
