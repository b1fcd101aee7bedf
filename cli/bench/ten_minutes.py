"""Train networks and nnU-Net for the same few minutes, several seeds each, and compare their masks.

python cli/bench/ten_minutes.py DATASET [--programs nnunet plain_unet lightm_unet_s] [--seeds 0 1 2]
    [--minutes 10] [--cores 2] [--fold all] [--prepared FOLDER] [--json RESULTS]

Every run gets its own `--cores` processors; as many runs go side by side as the machine has room
for. nnU-Net's own trainer runs with its schedule stretched over the same minutes (40 epochs, its
online validation left out, which is to its advantage) and predicts with its mirroring; medmamba's
commands run as a user would type them. With `--fold all` the networks train on every case of
imagesTr and the test cases of imagesTs count; with a number they train on that fold and its
validation cases count, which is how a preset is to be chosen. Needs the extra `nnunet` where
nnU-Net takes part, and Linux.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from medmamba.machine import processor_name

NNUNET_TRAIN = """
import json, sys, time
from pathlib import Path

if __name__ == "__main__":
    preprocessed, name, fold, seconds, model, seed = sys.argv[1:7]
    import numpy, random, torch
    random.seed(int(seed)); numpy.random.seed(int(seed)); torch.manual_seed(int(seed))
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    folder, epochs, budget = Path(preprocessed) / name, 40, float(seconds)
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["continue_training"] = False
    described = json.loads((folder / "dataset.json").read_text())
    begun = time.monotonic()
    trainer = nnUNetTrainer(
        plans, "3d_fullres", fold if fold == "all" else int(fold), described,
        device=torch.device("cpu"),
    )
    trainer.num_epochs = epochs
    trainer.on_train_start()
    steps = 0
    for epoch in range(epochs):
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        while time.monotonic() - begun < budget * (epoch + 1) / epochs:
            trainer.train_step(next(trainer.dataloader_train))
            steps += 1
        trainer.current_epoch += 1
    model = Path(model)
    place = model / f"fold_{fold}"
    place.mkdir(parents=True)
    trainer.save_checkpoint(str(place / "checkpoint_final.pth"))
    for file in ("plans.json", "dataset.json"):
        (model / file).write_text(json.dumps(plans if file == "plans.json" else described))
    print(json.dumps({"steps": steps, "seconds": time.monotonic() - begun}), flush=True)
    trainer.on_train_end()
"""

NNUNET_PREDICT = """
import sys

if __name__ == "__main__":
    images, masks, model, fold = sys.argv[1:5]
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=True, device=torch.device("cpu"), allow_tqdm=False)
    folds = (fold if fold == "all" else int(fold),)
    predictor.initialize_from_trained_model_folder(model, folds, "checkpoint_final.pth")
    predictor.predict_from_files_sequential(images, masks, save_probabilities=False)
"""

MEDMAMBA = "from medmamba.cli.app import main; main()"


def call(code: str, *arguments: str, cores: list[int], log: Path, environment=None) -> str:
    """Run Python code on certain processors; return what it printed."""
    limits = {"OMP_NUM_THREADS": str(len(cores)), "nnUNet_n_proc_DA": str(len(cores))}
    found = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **limits, **(environment or {})},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    with log.open("a") as text:
        text.write(f"$ {' '.join(arguments)}\n{found.stdout}\n{found.stderr}\n")
    if found.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit {found.returncode}, see {log}")
    return found.stdout


class Experiment:
    """One dataset, prepared for every program, and the cases that count."""

    def __init__(self, dataset: Path, folder: Path, fold: str, minutes: float) -> None:
        self.dataset, self.folder = dataset, folder
        self.fold, self.minutes = fold, minutes
        keys = ("raw", "preprocessed", "results")
        self.environment = {f"nnUNet_{key}": str(folder / key) for key in keys}

    def prepare(self, programs: list[str], cores: list[int]) -> None:
        """Plan and preprocess what is not there yet, and lay the counted cases out."""
        log = self.folder / "prepare.log"
        if "nnunet" in programs and not (self.folder / "preprocessed").exists():
            (self.folder / "raw").mkdir()
            (self.folder / "raw" / self.dataset.name).symlink_to(self.dataset)
            code = (
                "from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import "
                "plan_and_preprocess_entry as run\nif __name__ == '__main__': run()"
            )
            options = ["-d", self.dataset.name[7:10], "-c", "3d_fullres", "-np", "2", "-npfp", "2"]
            call(code, *options, cores=cores, log=log, environment=self.environment)
        for name in programs:
            done = (self.folder / "work" / "plans" / f"{name}.json").exists()
            if name != "nnunet" and not done:
                options = ["plan", str(self.dataset), "-o", str(self.folder / "work"), "-n", name]
                call(MEDMAMBA, *options, cores=cores, log=log)
        self._lay_out_counted_cases(programs)

    def _lay_out_counted_cases(self, programs: list[str]) -> None:
        self.images, self.labels = self.dataset / "imagesTs", self.dataset / "labelsTs"
        if self.fold == "all":
            return
        splits = self.folder / "work" / "splits.json"
        if not splits.exists():
            raise SystemExit("--fold K needs a medmamba network among the programs, for its split")
        counted = json.loads(splits.read_text())[int(self.fold)]["val"]
        for kind in ("images", "labels"):
            target = self.folder / f"counted_{kind}"
            target.mkdir(exist_ok=True)
            for case in counted:
                for file in (self.dataset / f"{kind}Tr").glob(f"{case}[_.]*"):
                    shutil.copy(file, target / file.name)
            setattr(self, kind, target)
        if "nnunet" in programs:
            shutil.copy(
                splits, self.folder / "preprocessed" / self.dataset.name / "splits_final.json"
            )

    def run(self, program: str, seed: int, cores: list[int]) -> dict:
        """Train, predict and score one program with one seed."""
        place = self.folder / f"{program}_{seed}_fold{self.fold}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        train = self._train_nnunet if program == "nnunet" else self._train_medmamba
        begun = time.monotonic()
        found = train(program, seed, cores, place)
        found |= {"program": program, "seed": seed, "wall_s": round(time.monotonic() - begun, 1)}
        import medmamba

        scores = medmamba.evaluate(self.labels, place / "masks").summary()
        found["dice"] = scores["foreground_mean"]["Dice"]
        found["dice_per_label"] = {key: row["Dice"] for key, row in scores["mean"].items()}
        return found

    def _train_nnunet(self, _: str, seed: int, cores: list[int], place: Path) -> dict:
        results = {**self.environment, "nnUNet_results": str(place / "results")}
        shared = {"cores": cores, "log": place / "log.txt", "environment": results}
        model, preprocessed = str(place / "model"), str(self.folder / "preprocessed")
        script = place / "train.py"
        script.write_text(NNUNET_TRAIN)
        code = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
        options = [
            preprocessed,
            self.dataset.name,
            self.fold,
            str(60 * self.minutes),
            model,
            str(seed),
        ]
        printed = call(code, *options, **shared)
        (place / "masks").mkdir()
        call(NNUNET_PREDICT, str(self.images), str(place / "masks"), model, self.fold, **shared)
        for file in (place / "masks").glob("*.json"):
            file.unlink()
        return json.loads([line for line in printed.splitlines() if line.startswith('{"steps')][-1])

    def _train_medmamba(self, name: str, seed: int, cores: list[int], place: Path) -> dict:
        shared = {"cores": cores, "log": place / "log.txt"}
        work = place / "work"
        shutil.copytree(self.folder / "work", work)
        length = ["--max-time", f"{round(60 * self.minutes)}s", "--seed", str(seed)]
        call(MEDMAMBA, "train", str(work), "-n", name, "-f", self.fold, *length, **shared)
        run = next(work.glob(f"runs/{name}/*/fold_{self.fold}"))
        options = ["-i", str(self.images), "-o", str(place / "masks"), "-m", str(run)]
        call(MEDMAMBA, "predict", *options, **shared)
        last = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()][-1]
        return {"steps": last["iteration"], "seconds": last["elapsed_s"]}


def describe_machine(cores: int, slots: int, programs: list[str]) -> dict:
    """Say where this ran."""
    names = ["medmamba", "torch", *(["nnunetv2"] if "nnunet" in programs else [])]
    packages = {name: version(name) for name in names}
    return {
        "processor": processor_name(),
        "architecture": platform.machine(),
        "cores_per_run": cores,
        "runs_side_by_side": slots,
        "packages": packages,
    }


def collect(experiment: Experiment, jobs: list[tuple[str, int]], cores: int) -> tuple[list, int]:
    """Run all jobs, several side by side, each on processors of its own."""
    from concurrent.futures import ThreadPoolExecutor
    from queue import SimpleQueue

    every = sorted(os.sched_getaffinity(0))
    groups = [every[i : i + cores] for i in range(0, len(every) - cores + 1, cores)]
    free: SimpleQueue[list[int]] = SimpleQueue()
    for group in groups:
        free.put(group)

    def work(job: tuple[str, int]) -> dict:
        group = free.get()
        try:
            found = experiment.run(*job, group)
        finally:
            free.put(group)
        print(json.dumps(found), file=sys.stderr, flush=True)
        return found

    with ThreadPoolExecutor(len(groups)) as pool:
        return list(pool.map(work, jobs)), len(groups)


def main() -> None:
    """Prepare, run, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--programs", nargs="+", default=["nnunet", "plain_unet", "lightm_unet_s"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--fold", default="all")
    parser.add_argument("--prepared", type=Path, help="keep or reuse plans and arrays here")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.prepared or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        experiment = Experiment(
            arguments.dataset.resolve(), folder, arguments.fold, arguments.minutes
        )
        first = sorted(os.sched_getaffinity(0))[: arguments.cores]
        experiment.prepare(arguments.programs, first)
        jobs = [(program, seed) for seed in arguments.seeds for program in arguments.programs]
        runs, slots = collect(experiment, jobs, arguments.cores)
    machine = describe_machine(arguments.cores, slots, arguments.programs)
    if arguments.json:
        settings = {"minutes": arguments.minutes, "fold": arguments.fold}
        results = {"machine": machine, **settings, "runs": runs}
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    where = (
        "12 test cases" if arguments.fold == "all" else f"validation cases of fold {arguments.fold}"
    )
    print(
        f"{machine['processor']}, {arguments.cores} cores a run, {slots} runs side by side; {where}"
    )
    print(f"{'':18} mean Dice (each seed)   spread   steps")
    for program in arguments.programs:
        own = [run for run in runs if run["program"] == program]
        dice = [run["dice"] for run in own]
        each = " ".join(f"{value:.3f}" for value in dice)
        spread = statistics.stdev(dice) if len(dice) > 1 else float("nan")
        steps = statistics.median(run["steps"] for run in own)
        print(f"{program:18} {statistics.mean(dice):.3f} ({each})   {spread:.3f}   {steps:.0f}")


if __name__ == "__main__":
    main()
