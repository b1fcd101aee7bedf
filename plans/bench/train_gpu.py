"""Measure training steps of planned networks on a GPU against what the planner expects of them.

    python plans/bench/train_gpu.py WORK [--json OUT.json] [--seconds 20] [--train-seconds 60]
        [--big] [--images FOLDER]

WORK is a folder in which ``medmamba plan`` has planned one or several networks. For each: labels of
one patch on the GPU against the CPU (float32), then steps on random patches under bfloat16 with
time and peak memory, beside the planner's estimate, launched one by one and replayed from a CUDA
graph, and some under float16. With ``--big`` the same for two samples of 128x128x128. With
``--train-seconds`` each network is trained on fold 0 for so long, as ``medmamba train`` does, and
its validation cases are scored; with ``--images`` it then predicts those on the GPU and on the CPU,
and the labels are compared.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import medmamba
from medmamba.io import TRAINING_GATE, read_labels
from medmamba.networks import NETWORKS, build_network
from medmamba.networks.spec import NetworkSpec
from medmamba.pipeline.validating import read_validation
from medmamba.pipeline.work import choose_configuration
from medmamba.plans.nnunet_schema import load_plan
from medmamba.training.recipe import TrainingRecipe
from medmamba.training.run_files import LOG, read_log
from medmamba.training.sampling import Batch
from medmamba.training.step_memory import StepConditions, step_memory
from medmamba.training.stepping import Stepper

BIG_PATCH = (128, 128, 128)
WARMUP = 6
CUDA = torch.device("cuda")


def batch_of(spec: NetworkSpec, size: int) -> Batch:
    """Random patches with random labels."""
    return Batch(
        data=torch.randn(size, spec.in_channels, *spec.patch_size),
        labels=torch.randint(0, spec.out_channels, (size, 1, *spec.patch_size)).short(),
        cases=("random",) * size,
        iteration=0,
    )


def steps(
    spec: NetworkSpec,
    recipe: TrainingRecipe,
    label_map: Any,
    size: int,
    precision: str,
    s: float,
    *,
    graph: bool = False,
) -> dict[str, Any]:
    """Train for some seconds; times, peak bytes and whether all was finite."""
    torch.manual_seed(0)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    network = build_network(spec).to(CUDA).train()
    stepper = Stepper(
        network, recipe, label_map, device=CUDA, precision=precision, batch_size=size, graph=graph
    )
    batch, times, finite, skipped = batch_of(spec, size), [], True, 0
    end = time.monotonic() + s
    while len(times) < WARMUP + 3 or time.monotonic() < end:
        torch.cuda.synchronize()
        begun = time.perf_counter()
        outcome = stepper.train(batch, recipe.learning_rate, len(times))
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
        skipped += not outcome.applied
        finite = finite and outcome.loss == outcome.loss
        if len(times) >= WARMUP + 200:
            break
    return {
        "precision": precision,
        "replayed": stepper.replays,
        "step_ms": statistics.median(times[WARMUP:]) * 1e3,
        "spread_ms": statistics.pstdev(times[WARMUP:]) * 1e3,
        "steps": len(times),
        "peak_bytes": torch.cuda.max_memory_allocated() - before,
        "finite": finite,
        "steps_not_applied": skipped,
    }


@torch.no_grad()
def agreement(spec: NetworkSpec) -> float:
    """Share of voxels with the same label on CPU and GPU."""
    torch.manual_seed(1)
    network = build_network(spec).eval()
    image = torch.randn(1, spec.in_channels, *spec.patch_size)

    def labels(found: Tensor | list[Tensor]) -> Tensor:
        return (found if isinstance(found, Tensor) else found[0]).argmax(1).cpu()

    on_cpu = labels(network(image))
    on_gpu = labels(network.to(CUDA)(image.to(CUDA)))
    return (on_cpu == on_gpu).float().mean().item()


def measure(path: Path, seconds: float, compare: bool) -> dict[str, Any]:
    """Everything about one plan."""
    plan = load_plan(path)
    branch = plan.configurations[choose_configuration(plan, None)]
    spec, recipe = branch.network, branch.training
    row: dict[str, Any] = {"network": spec.name, "patch": spec.patch_size}
    row["batch"] = recipe.batch_size
    if compare:
        row["labels_equal"] = agreement(spec)
    conditions = StepConditions(recipe=recipe, label_map=plan.label_map)
    estimate = step_memory(spec, recipe.batch_size, conditions)
    for precision, length in (("bf16", seconds), ("fp16", 2.0)):
        row[precision] = steps(spec, recipe, plan.label_map, recipe.batch_size, precision, length)
    row["replayed"] = steps(
        spec, recipe, plan.label_map, recipe.batch_size, "bf16", seconds, graph=True
    )
    row["estimate_bytes"] = estimate
    row["estimate_over_peak"] = estimate / row["bf16"]["peak_bytes"]
    return row


def measure_big(path: Path) -> dict[str, Any]:
    """Two samples of 128x128x128, the size at which LightM-UNet used not to fit."""
    plan = load_plan(path)
    branch = plan.configurations[choose_configuration(plan, None)]
    spec = NETWORKS[branch.network.name].arrange(replace(branch.network, patch_size=BIG_PATCH))
    row: dict[str, Any] = {"network": spec.name, "patch": spec.patch_size, "batch": 2}
    conditions = StepConditions(recipe=branch.training, label_map=plan.label_map)
    row["estimate_bytes"] = step_memory(spec, 2, conditions)
    row["bf16"] = steps(spec, branch.training, plan.label_map, 2, "bf16", 3.0)
    row["estimate_over_peak"] = row["estimate_bytes"] / row["bf16"]["peak_bytes"]
    return row


def train(name: str, work: Path, seconds: float, images: Path | None) -> dict[str, Any]:
    """Train on real data from nothing; Dice of whole validation cases, and both devices' masks."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    outcome = medmamba.train(work, network=name, fold=0, max_time=seconds, overwrite=True)
    peak = torch.cuda.max_memory_allocated()
    record = read_validation(outcome.run_folder)
    rows = read_log(outcome.run_folder / LOG)
    last = [row for row in rows if row["kind"] == "epoch"][-1]
    row: dict[str, Any] = {"network": name, "train_s": last["elapsed_s"]}
    row |= {"steps": last["iteration"], "peak_bytes": peak}
    row["dice"] = None if record is None else record.dice
    if images is not None:
        row["labels_equal_gpu_cpu"] = compare_devices(outcome.model, images, outcome.run_folder)
    return row


def compare_devices(model: Path, images: Path, folder: Path) -> dict[str, float]:
    """Share of voxels with the same label from ``predict`` on either device, case by case."""
    for device in ("cuda", "cpu"):
        medmamba.predict(
            images, folder / f"masks_{device}", model, device=device, overwrite="always"
        )
    found = {}
    for mask in sorted((folder / "masks_cuda").glob("*.nii.gz")):
        other, _ = read_labels(folder / "masks_cpu" / mask.name, gate=TRAINING_GATE)
        own, _ = read_labels(mask, gate=TRAINING_GATE)
        foreground = (own.array > 0) | (other.array > 0)
        equal = own.array == other.array
        found[mask.name] = float(equal.mean())
        found[f"{mask.name} foreground"] = float(equal[foreground].mean())
    return found


def attempt(work: Any, *values: Any) -> dict[str, Any]:
    """Run one measurement; a failure is a row too, so that the others still come."""
    try:
        return dict(work(*values))
    except Exception as error:
        return {"network": str(values[0]), "failed": f"{type(error).__name__}: {error}"[:600]}


def main() -> None:
    """Print a line a network, and write all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--without-cpu", action="store_true", help="compare no labels")
    parser.add_argument("--train-seconds", type=float, default=0.0)
    parser.add_argument("--images", type=Path, help="of a few cases, to predict on both devices")
    parser.add_argument("--big", action="store_true", help="patches of 128x128x128 too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    paths = sorted((options.work / "plans").glob("*.json"))
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    rows = []
    for path in paths:
        rows.append(attempt(measure, path, options.seconds, not options.without_cpu))
        print(json.dumps(rows[-1]), flush=True)
    for path in paths if options.big else ():
        rows.append(attempt(measure_big, path))
        print(json.dumps(rows[-1]), flush=True)
    trained = []
    for path in paths if options.train_seconds else ():
        trained.append(
            attempt(train, path.stem, options.work, options.train_seconds, options.images)
        )
        print(json.dumps(trained[-1]), flush=True)
    if options.json is not None:
        table = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        table["trained"] = trained
        options.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
