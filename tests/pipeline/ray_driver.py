"""Predicts a folder on a Ray cluster with a fake network that sleeps; prints what came of it.

    python ray_driver.py ADDRESS IMAGES OUT SECONDS WORKERS

A case whose first voxel is POISON kills the worker that has it in its network.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))

from test_engine import MODEL, ThresholdPredictor

from medmamba.dataset import find_cases
from medmamba.inference.assignment import Assignment
from medmamba.inference.draining import drain_on_signals
from medmamba.inference.worker import WorkerSetup
from medmamba.pipeline import cluster_prediction
from medmamba.pipeline.cluster import Needs, ray_cluster

POISON = 77


def make(setup: WorkerSetup) -> tuple[ThresholdPredictor, dict[str, Any]]:
    seconds = setup.options["seconds"]

    def infer(mark: float, _: Any) -> None:
        if mark == POISON:
            os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(seconds)

    return ThresholdPredictor(on_infer=infer), {"settings": "in its sleep"}


def main() -> None:
    address, images, out, seconds, workers = sys.argv[1:]
    # Workers that find this file as a module, and not as __main__, can import what it defines.
    import ray_driver

    ready: list[float] = []
    setup = WorkerSetup(folder=Path(out), model=MODEL, options={"seconds": float(seconds)})
    assignment = Assignment(
        cases=find_cases(images, channels=1).cases,
        on_ready=lambda about: ready.append(time.monotonic()),
    )
    if int(workers) == 1:
        cluster_prediction._Driver._room = lambda self: 1
    with drain_on_signals() as drain, ray_cluster(address) as ray:
        run = cluster_prediction.predict_on_cluster(
            ray, assignment, setup, ray_driver.make, drain, needs=Needs(cpus=1)
        )  # fmt: skip
        spent = time.monotonic() - ready[0]
    counts = {
        "counts": run.counts, "exit_code": run.exit_code, "spent_s": spent,
        "torch": "torch" in sys.modules,
    }  # fmt: skip
    sys.stdout.write(json.dumps(counts) + "\n")


if __name__ == "__main__":
    main()
