"""Predict and export with nnU-Net and with medmamba, side by side in fresh processes.

python cli/bench/predict.py export [--repeats 3] [--json RESULTS]
python cli/bench/predict.py memory WHERE [--lengths 300 600] [--json RESULTS]
python cli/bench/predict.py cases MODEL IMAGES WHERE [--sides ...] [--repeats 3] [--json RESULTS]

``export``: logits of 14 classes at 100x160x160 to labels at 150x320x320, written as NIfTI.
``memory``: CT-size volumes of 512x512 slices at 0.8x0.8x1 mm through the whole command with a small
network. ``cases``: a folder of images from cold start with mirroring, MODEL being a plain_unet
model folder of medmamba, which is written as nnU-Net's trainer would and imported back. Labels are
compared before any time is printed. Memory is the largest sum of proportional shares over a
process and all its children; of the export, what it added to the process. Runs of both sides
alternate; results are merged into RESULTS by part. Needs the extra ``nnunet`` and Linux.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "plans" / "bench"))

from speed import family, share

from medmamba.machine import processor_name

CLASSES = 14
COARSE, FINE = (100, 160, 160), (150, 320, 320)
COARSE_MM, FINE_MM = (3.0, 1.6, 1.6), (2.0, 0.8, 0.8)
SLICE, CT_MM = (512, 512), (1.0, 0.8, 0.8)
SAMPLE_S = 0.05
SIDES = ("ours-fp32", "ours-bf16", "nnunet-sequential", "nnunet-defaults")
TIES = 5e-4
"""Share of voxels in which float32 may differ from nnU-Net's float16 accumulation."""

REDUCED_DICE = 0.999
"""Smallest Dice of each label between bf16 and float32."""

MEMORY = """
from pathlib import Path


def resident_mib(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")
    return resident_mib("VmRSS")


"""
"""Peak memory from a moment on, which Linux keeps per process."""

EXPORT_OURS = """
import json, sys, time
import numpy as np
from pathlib import Path
from medmamba.io import SourceHeader, write_labels
from medmamba.labels import LabelMap
from medmamba.preprocessing.pipeline import UndoRecord
from medmamba.preprocessing.recipe import ChannelRecipe, Normalization, PreprocessingRecipe
from medmamba.preprocessing.restore import restore_labels
from medmamba.volume import Geometry

logits, coarse_mm, fine, fine_mm, classes, output = json.loads(sys.argv[1])
values = np.load(logits)
labels = LabelMap(values={"background": (0,), **{f"l{k}": (k,) for k in range(1, classes)}})
recipe = PreprocessingRecipe(
    channels=(ChannelRecipe(normalization=Normalization.ZSCORE),), transpose_forward=(0, 1, 2)
)
geometry = Geometry.from_spacing(tuple(fine), tuple(fine_mm))
record = UndoRecord(
    geometry=geometry, transpose_forward=(0, 1, 2), spacing_mm=tuple(fine_mm), shape=tuple(fine),
    crop_box=tuple((0, size) for size in fine), shape_after_crop=tuple(fine),
    working_spacing_mm=tuple(coarse_mm), working_shape=values.shape[1:],
)
header = SourceHeader(format="nifti", suffix=".nii.gz", dimension=3, geometry=geometry)
before = forget_peak()
started = time.perf_counter()
write_labels(Path(output), restore_labels(values, record, recipe, labels), header)
seconds = time.perf_counter() - started
extra = resident_mib("VmHWM") - before
print(json.dumps({"seconds": seconds, "extra_mib": extra}))
"""

EXPORT_NNUNET = """
import json, sys, time

if __name__ == "__main__":
    import numpy as np
    import torch
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.inference.export_prediction import export_prediction_from_logits
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    logits, coarse_mm, fine, fine_mm, classes, output = json.loads(sys.argv[1])
    kwargs = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    function = "resample_data_or_seg_to_shape"
    plans = PlansManager({
        "dataset_name": "Dataset001_Bench", "plans_name": "nnUNetPlans",
        "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
        "image_reader_writer": "SimpleITKIO", "label_manager": "LabelManager",
        "configurations": {"3d_fullres": {
            "spacing": coarse_mm, "resampling_fn_probabilities": function,
            "resampling_fn_probabilities_kwargs": kwargs, "use_mask_for_norm": [False],
            "architecture": {"network_class_name": "none", "arch_kwargs": {}},
        }},
    })
    dataset = {
        "channel_names": {"0": "CT"}, "file_ending": ".nii.gz",
        "labels": {"background": 0, **{f"l{k}": k for k in range(1, classes)}},
    }
    properties = {
        "spacing": fine_mm, "shape_before_cropping": fine,
        "shape_after_cropping_and_before_resampling": fine,
        "bbox_used_for_cropping": [[0, size] for size in fine],
        "sitk_stuff": {
            "spacing": fine_mm[::-1], "origin": (0, 0, 0), "direction": np.eye(3).ravel(),
        },
    }
    values = torch.from_numpy(np.load(logits))
    before = forget_peak()
    started = time.perf_counter()
    export_prediction_from_logits(
        values, properties, plans.get_configuration("3d_fullres"), plans, dataset,
        output.removesuffix(".nii.gz"),
    )
    seconds = time.perf_counter() - started
    extra = resident_mib("VmHWM") - before
    print(json.dumps({"seconds": seconds, "extra_mib": extra}))
"""

PREDICT_NNUNET = """
import sys

if __name__ == "__main__":
    mode, images, masks, model = sys.argv[1:5]
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=True, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(model, ("all",), "checkpoint_final.pth")
    if mode == "sequential":
        predictor.predict_from_files_sequential(images, masks)
    else:
        # The numbers of processes that nnUNetv2_predict starts.
        predictor.predict_from_files(
            images, masks, num_processes_preprocessing=3, num_processes_segmentation_export=3
        )
"""


def run(
    command: Sequence[str], environment: dict[str, str] | None = None, *, sampled: bool = True
) -> dict[str, Any]:
    """Run a program in a fresh process; return its last line of JSON, seconds and peak memory.

    Looking at memory holds up the processes that are looked at (by 1.5 of 10 s in `cases`), so a
    run that is timed for a comparison is better not ``sampled``; its peak is 0.
    """
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as talk:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=talk,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        largest = 0
        while sampled and process.poll() is None:
            largest = max(largest, sum(share(number) for number in family(process.pid)))
            time.sleep(SAMPLE_S)
        process.wait()
        seconds = time.perf_counter() - started
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
        if process.returncode:
            talk.seek(0)
            sys.exit("\n".join([*lines, talk.read()[-3000:]]))
    found: dict[str, Any] = {"whole_s": seconds, "peak_mib": largest / 1024}
    if lines and lines[-1].startswith("{"):
        found |= json.loads(lines[-1])
    return found


def summary(runs: Sequence[dict[str, Any]], key: str) -> dict[str, float]:
    """Median and range of one figure over runs."""
    values = [each[key] for each in runs]
    return {
        "median": round(statistics.median(values), 3),
        "lowest": round(min(values), 3),
        "highest": round(max(values), 3),
    }


def blobs(shape: tuple[int, ...], classes: int) -> np.ndarray:
    """Logits of organs in a body: smooth, background towards the edges; float32."""
    from scipy.ndimage import zoom

    random = np.random.default_rng(0)
    grid = tuple(max(2, size // 12) for size in shape)
    axes = np.ogrid[tuple(slice(-1, 1, size * 1j) for size in shape)]
    distance = sum(axis**2 for axis in axes)
    result = np.empty((classes, *shape), np.float32)
    for label, values in enumerate(result):
        coarse = random.normal(0, 4, grid)
        values[:] = zoom(coarse, [s / g for s, g in zip(shape, grid, strict=True)], order=1)
        if label:
            values -= 8 * np.maximum(0, distance - 0.6)
    return result


def bench_export(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the export of one case on both sides."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        np.save(place / "logits.npy", blobs(COARSE, CLASSES))
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "nnunet": []}
        scripts = {"ours": EXPORT_OURS, "nnunet": EXPORT_NNUNET}
        for side, script in scripts.items():
            (place / f"{side}.py").write_text(MEMORY + script)
        for repeat in range(arguments.repeats):
            for side in scripts:
                output = str(place / f"{side}.nii.gz")
                request = [str(place / "logits.npy"), COARSE_MM, FINE, FINE_MM, CLASSES, output]
                found = run([sys.executable, str(place / f"{side}.py"), json.dumps(request)])
                runs[side].append(found)
            if repeat == 0:
                wrong = differing(place / "ours.nii.gz", place / "nnunet.nii.gz")
                if wrong > TIES:
                    sys.exit(
                        f"{wrong:.2%} of voxels differ: nothing is timed before that is mended"
                    )
    found = {
        side: {"seconds": summary(made, "seconds"), "extra_mib": summary(made, "extra_mib")}
        for side, made in runs.items()
    }
    faster = found["nnunet"]["seconds"]["median"] / found["ours"]["seconds"]["median"]
    return {**found, "voxels_that_differ": wrong, "times_faster": round(faster, 2)}


def differing(first: Path, second: Path) -> float:
    """Share of voxels in which two masks differ."""
    from medmamba.io import read_labels

    one, other = (read_labels(path)[0].array for path in (first, second))
    return float((one != other).mean())


def bench_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the whole command on volumes of several lengths."""
    place = arguments.where
    model = place / "small_ct_model"
    if not model.exists():
        write_small_model(model)
    found: dict[str, Any] = {}
    for length in arguments.lengths:
        images = place / f"ct_{length}"
        if not images.exists():
            write_ct(images / "ct_0000.nii.gz", length)
        masks = place / f"masks_{length}"
        command = [sys.executable, "-m", "medmamba", "predict", "-i", str(images), "-o", str(masks)]
        made = run([*command, "-m", str(model), "--overwrite", "always"])
        record = json.loads((masks / "ct.json").read_text())
        if record["status"] not in ("ok", "ok_with_warnings"):
            sys.exit(f"prediction failed: {record['error']}")
        found[str(length)] = {
            "peak_mib": round(made["peak_mib"], 1),
            "seconds": round(made["whole_s"], 1),
            "tiles": record["tiles"],
        }
    first, *_, last = sorted(arguments.lengths)
    voxels = (last - first) * SLICE[0] * SLICE[1]
    grown = (found[str(last)]["peak_mib"] - found[str(first)]["peak_mib"]) * 2**20
    return {"lengths": found, "bytes_per_extra_voxel": round(grown / voxels, 2)}


def write_ct(path: Path, length: int) -> None:
    """Write a body with an organ in noisy air, int16."""
    from medmamba.io import write_image
    from medmamba.volume import Geometry

    random = np.random.default_rng(0)
    y, x = np.ogrid[-1 : 1 : SLICE[0] * 1j, -1 : 1 : SLICE[1] * 1j]
    values = np.empty((length, *SLICE), np.int16)
    for plane, z in enumerate(np.linspace(-1, 1, length)):
        body, organ = y**2 / 0.5 + x**2 / 0.75 < 1, y**2 + (x - 0.2) ** 2 + z**2 < 0.1
        values[plane] = np.where(body, 40 + 100 * organ, -1000) + random.normal(0, 20, SLICE)
    path.parent.mkdir(parents=True)
    write_image(path, values, Geometry.from_spacing(values.shape, CT_MM))


def write_small_model(folder: Path) -> None:
    """Write a model folder of a small network with random weights for CT at 1.5 mm."""
    import torch

    from medmamba.bundle import save_bundle
    from medmamba.networks import build_network
    from medmamba.plans.budget import Budget
    from medmamba.plans.fingerprint import fingerprint_from_nnunet
    from medmamba.plans.planner import make_plan
    from medmamba.plans.presets import load_preset

    intensities = {
        "max": 2000.0, "mean": 50.0, "median": 50.0, "min": -1000.0, "std": 80.0,
        "percentile_00_5": -150.0, "percentile_99_5": 300.0,
    }  # fmt: skip
    fingerprint = {
        "spacings": [[1.5, 1.5, 1.5]] * 2,
        "shapes_after_crop": [[64, 96, 96]] * 2,
        "foreground_intensity_properties_per_channel": {"0": intensities},
        "median_relative_size_after_cropping": 1.0,
    }
    description = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "organ": 1, "vessel": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    plan = make_plan(
        fingerprint_from_nnunet(fingerprint, "Dataset001_Small"),
        description,
        load_preset("lightm_unet_s"),
        Budget(),
    )
    torch.manual_seed(0)
    network = build_network(plan.configurations["3d_fullres"].network)
    weights = [network.state_dict()]
    save_bundle(
        folder, plan=plan, configuration="3d_fullres", weights=weights, reference_case=False
    )


def bench_cases(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time a folder of images from cold start on both sides."""
    place = arguments.where
    place.mkdir(parents=True, exist_ok=True)
    theirs = place / "nnunet_results"
    if not theirs.exists():
        write_nnunet_results(arguments.model, theirs)
    model = place / "imported"
    if not model.exists():
        convert = ["convert", "import-nnunet", str(theirs), "-o", str(model)]
        run([sys.executable, "-m", "medmamba", *convert])
    (place / "nnunet.py").write_text(PREDICT_NNUNET)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in arguments.sides}
    for turn in range(arguments.repeats + 1):
        for side in arguments.sides:
            program, mode = side.split("-")
            masks = str(place / f"masks_{side}")
            images = str(arguments.images)
            if program == "ours":
                command = [sys.executable, "-m", "medmamba", "predict", "-i", images, "-o", masks]
                command += ["-m", str(model), "--tta", "--precision", mode]
                command += ["--device", "cpu", "--overwrite", "always"]
            else:
                command = [sys.executable, str(place / "nnunet.py"), mode, images, masks]
                command += [str(theirs)]
                Path(masks).mkdir(exist_ok=True)
            # The first turn is for memory, and warms the page cache for all sides alike.
            runs[side].append(run(command, sampled=turn == 0))
    check = check_cases(place, arguments.sides)
    known = known_results(arguments).get("cases", {})
    figures = {}
    for side, made in runs.items():
        # Earlier runs of this script count too: a call may be too short for all of them.
        earlier = known.get(side, {})
        seconds = [*earlier.get("seconds", []), *(each["whole_s"] for each in made[1:])]
        memory = [*earlier.get("peak_mib", []), made[0]["peak_mib"]]
        figures[side] = {
            "seconds": [round(value, 2) for value in seconds],
            "peak_mib": [round(value, 1) for value in memory],
        }
    return {
        "cases": len(list(arguments.images.iterdir())),
        **figures,
        "labels": {**known.get("labels", {}), **check},
    }


def known_results(arguments: argparse.Namespace) -> dict[str, Any]:
    """What earlier calls found."""
    if arguments.json is None or not arguments.json.exists():
        return {}
    found: dict[str, Any] = json.loads(arguments.json.read_text())
    return found


def check_cases(place: Path, sides: Sequence[str]) -> dict[str, float]:
    """Compare masks with those of nnU-Net, and bf16 with float32; stop where they differ."""
    from medmamba.io import read_labels

    def masks(side: str) -> list[np.ndarray]:
        paths = sorted((place / f"masks_{side}").glob("*.nii.gz"))
        return [read_labels(path)[0].array.ravel() for path in paths]

    found = {}
    if {"ours-fp32", "nnunet-sequential"} <= set(sides):
        one, other = (np.concatenate(masks(s)) for s in ("ours-fp32", "nnunet-sequential"))
        found["fp32_voxels_that_differ"] = float((one != other).mean())
        if found["fp32_voxels_that_differ"] > TIES:
            sys.exit(f"{found}: nothing is timed before that is mended")
    if {"ours-fp32", "ours-bf16"} <= set(sides):
        one, other = (np.concatenate(masks(side)) for side in ("ours-fp32", "ours-bf16"))
        for label in np.unique(one[one > 0]):
            both = np.count_nonzero((one == label) & (other == label))
            either = np.count_nonzero(one == label) + np.count_nonzero(other == label)
            found[f"bf16_dice_of_{label}"] = 2 * both / either
        if min(value for key, value in found.items() if "bf16" in key) < REDUCED_DICE:
            sys.exit(f"{found}: nothing is timed before that is mended")
    return found


def write_nnunet_results(model: Path, folder: Path) -> None:
    """Write a plain_unet model folder as nnU-Net's trainer leaves its own."""
    import torch

    from medmamba.bundle import load_bundle, load_networks
    from medmamba.interop.official import official_state
    from medmamba.plans.nnunet_schema import BLOCK, plan_to_nnunet

    bundle = load_bundle(model)
    plans = plan_to_nnunet(bundle.plan)
    plans.pop(BLOCK)
    names = bundle.plan.label_map.values
    description = {
        "channel_names": {str(k): name for k, name in enumerate(bundle.plan.channel_names)},
        "labels": {name: values[0] for name, values in names.items()},
        "numTraining": 1,
        "file_ending": bundle.plan.file_ending,
    }
    place = folder / "fold_all"
    place.mkdir(parents=True)
    content = {
        "network_weights": official_state(load_networks(bundle)[0]),
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": bundle.manifest.configuration, "fold": "all"},
        "inference_allowed_mirroring_axes": bundle.configuration.training.mirror_axes,
    }
    torch.save(content, place / "checkpoint_final.pth")
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(description))


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    packages = ("medmamba", "nnunetv2", "torch", "numpy", "scipy")
    return {
        "cpu": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {name: version(name) for name in packages},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts = parser.add_subparsers(dest="part", required=True)
    for name in ("export", "memory", "cases"):
        part = parts.add_parser(name)
        part.add_argument("--json", type=Path)
        if name == "cases":
            part.add_argument("model", type=Path)
            part.add_argument("images", type=Path)
            part.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
        if name != "export":
            part.add_argument("where", type=Path)
        if name == "memory":
            part.add_argument("--lengths", nargs="+", type=int, default=[300, 600])
        else:
            part.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    before = machine()
    bench = {"export": bench_export, "memory": bench_memory, "cases": bench_cases}[arguments.part]
    found = {"machine": before, **bench(arguments)}
    print(json.dumps(found, indent=1))
    if arguments.json is not None:
        known = known_results(arguments)
        merged = {**known.get(arguments.part, {}), **found}
        arguments.json.write_text(json.dumps({**known, arguments.part: merged}, indent=1) + "\n")


if __name__ == "__main__":
    main()
