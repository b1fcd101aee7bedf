"""Time whole training iterations of nnU-Net's trainer and of medmamba's, side by side on a CPU.

python plans/bench/training.py DATASET_FOLDER [--blocks 3] [--steps 6]

Both train ``plain_unet`` under nnU-Net's own plan (same patch, batch, augmentation, optimiser) and
are timed in turns, each in a process of its own that is stopped while another one runs, so that
neither disturbs nor profits. An iteration is: take the next batch from the loaders that work beside
it, forward, loss, backward, clipping, update. Needs the extra ``nnunet`` and Linux.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

WARMUP = 2

NNUNET = """
import json, sys, time
from pathlib import Path

if __name__ == "__main__":
    out, sys.stdout = sys.stdout, sys.stderr
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    folder, name = Path(sys.argv[1]), sys.argv[2]
    plans = json.loads((folder / name / "nnUNetPlans.json").read_text())
    plans["continue_training"] = False
    described = json.loads((folder / name / "dataset.json").read_text())
    trainer = nnUNetTrainer(plans, "3d_fullres", 0, described, device=torch.device("cpu"))
    trainer.on_train_start()
    trainer.network.train()

    def step():
        return float(trainer.train_step(next(trainer.dataloader_train))["loss"])

    about = {"batch": trainer.batch_size, "patch": list(trainer.configuration_manager.patch_size)}
    print(json.dumps(about), file=out, flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            begun = time.perf_counter()
            loss = step()
            seconds.append(time.perf_counter() - begun)
        print(json.dumps({"seconds": seconds, "loss": loss}), file=out, flush=True)
"""

MEDMAMBA = """
import json, sys, time
from pathlib import Path

from medmamba.dataset import read_splits, split_for_fold
from medmamba.plans.nnunet_schema import load_plan
from medmamba.pipeline.work import open_work
from medmamba.preprocessing.store import CaseStore
from medmamba.training.loading import BatchLoader
from medmamba.training.sampling import Stream
from medmamba.training.schedule import Clock
from medmamba.training.setup import TrainingSetup
from medmamba.training.precision import keep_freed_memory
from medmamba.training.trainer import FoldRun
from dataclasses import replace

work, precision, scratch = open_work(Path(sys.argv[1])), sys.argv[2], Path(sys.argv[3])
plan = work.load_plan("plain_unet")
branch = plan.configurations["3d_fullres"]
store = work.store("3d_fullres", branch)
setup = TrainingSetup(
    run_folder=scratch / precision,
    network=branch.network,
    grid=branch.grid,
    recipe=replace(branch.training, cpu_batch_size=None, **json.loads(sys.argv[4])),
    label_map=plan.label_map,
    store_folder=store,
    split=split_for_fold(read_splits(work.splits), 0, CaseStore(store).case_ids()),
    device="cpu",
    precision=precision,
)
keep_freed_memory()
run = FoldRun(setup, Clock(), resume=False)
run.stepper.network.train()
about = {"batch": setup.recipe.batch_size, "patch": list(setup.grid.patch_size)}
print(json.dumps(about), flush=True)
with BatchLoader(run.sampler(Stream.TRAINING), first=0) as loader:
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            begun = time.perf_counter()
            loss = run.step(loader.next(), setup.recipe.learning_rate)
            seconds.append(time.perf_counter() - begun)
        print(json.dumps({"seconds": seconds, "loss": loss}), flush=True)
"""

NNUNET_RECIPE = {
    "optimizer": "sgd", "learning_rate": 0.01, "momentum": 0.99, "weight_decay": 3e-5,
    "gradient_clip": 12.0, "augmentation": "default", "mirror_axes": [0, 1, 2],
    "weight_averaging": 0.0, "loss": "dice_ce",
}  # fmt: skip
"""What nnU-Net's trainer does, whatever the shipped preset says."""


class Worker:
    """A training process that runs when told and is stopped in between."""

    def __init__(self, script: Path, arguments: list[str], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.about = self._read()
        self.seconds: list[float] = []
        self.run(WARMUP)
        self.seconds.clear()
        self._signal(signal.SIGSTOP)

    def block(self, steps: int) -> None:
        """Run some iterations; one more before them fills the queues again."""
        self._signal(signal.SIGCONT)
        self.run(1 + steps)
        del self.seconds[-1 - steps]
        self._signal(signal.SIGSTOP)

    def run(self, steps: int) -> None:
        """Run iterations and note their times."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        found = self._read()
        assert found["loss"] == found["loss"], "a loss is not a number: nothing to time"
        self.seconds.extend(found["seconds"])

    def end(self) -> None:
        """End the process and its children."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _read(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args} ended with code {self._process.wait()}")
        return json.loads(line)

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)


def prepare(dataset: Path, folder: Path, environment: dict[str, str]) -> Path:
    """Plan and preprocess with both; return medmamba's work folder."""
    number, work = dataset.name[7:10], folder / "work"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": True}
    (folder / "raw").mkdir()
    (folder / "raw" / dataset.name).symlink_to(dataset)
    code = (
        "from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import "
        "plan_and_preprocess_entry as run; run()"
    )
    options = ["-d", number, "-c", "3d_fullres", "-np", "2", "-npfp", "2"]
    subprocess.run([sys.executable, "-c", code, *options], env=environment, **quiet)
    code = "from medmamba.cli.app import main; main()"
    plan = ["plan", str(dataset), "-o", str(work), "--network", "plain_unet"]
    subprocess.run([sys.executable, "-c", code, *plan], env=environment, **quiet)
    return work


def report(name: str, worker: Worker, base: Worker) -> None:
    """Print one row."""
    middle = statistics.median(worker.seconds)
    first, _, third = statistics.quantiles(worker.seconds, n=4)
    ratio = statistics.median(base.seconds) / middle
    print(
        f"{name:15} {middle:6.2f} s an iteration (quartiles {first:.2f} to {third:.2f}, "
        f"n = {len(worker.seconds)})  {ratio:5.2f} x"
    )


def main() -> None:
    """Prepare, time in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--prepared", type=Path, help="keep or reuse what was planned here")
    arguments = parser.parse_args()
    # The stopped processes must not outlive this one.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    dataset = arguments.dataset.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.prepared or Path(temporary)
        folder.mkdir(exist_ok=True)
        environment = {
            **os.environ,
            **{f"nnUNet_{key}": str(folder / key) for key in ("raw", "preprocessed", "results")},
        }
        if not (folder / "work").exists():
            prepare(dataset, folder, environment)
        scripts = {"nnunet": NNUNET, "medmamba": MEDMAMBA}
        for name, text in scripts.items():
            (folder / f"{name}.py").write_text(text)
        ours = [str(folder / "work")]
        workers = {
            "nnunetv2 fp32": Worker(
                folder / "nnunet.py", [str(folder / "preprocessed"), dataset.name], environment
            )
        }
        try:
            for precision in ("fp32", "bf16"):
                rest = [precision, temporary, json.dumps(NNUNET_RECIPE)]
                workers[f"medmamba {precision}"] = Worker(
                    folder / "medmamba.py", ours + rest, environment
                )
            for _ in range(arguments.blocks):
                for worker in workers.values():
                    worker.block(arguments.steps)
        finally:
            for worker in workers.values():
                worker.end()
    packages = ", ".join(f"{name} {version(name)}" for name in ("nnunetv2", "torch"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, {packages}")
    base = workers["nnunetv2 fp32"]
    for name, worker in workers.items():
        assert worker.about == base.about, (name, worker.about, base.about)
        report(name, worker, base)
    print(f"patch {base.about['patch']}, batch {base.about['batch']}")


if __name__ == "__main__":
    main()
