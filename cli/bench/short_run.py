"""Trains one network for some minutes as a user would, scores the test cases, notes the figures.

python cli/bench/short_run.py DATASET --network plain_unet --max-time 5m [--work FOLDER] [--note]

Runs plan, train, predict and evaluate on a raw dataset with imagesTs and labelsTs and prints a row
of results; `--note` puts it into cli/bench/results/short_runs.json, in place of that network's.
Prediction is timed from the call of the command to its end. Run it on an otherwise idle machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from medmamba.machine import processor_name

RESULTS = Path(__file__).resolve().parent / "results" / "short_runs.json"


def medmamba(*arguments: object) -> float:
    """Run a command of the program; return its seconds."""
    begun = time.monotonic()
    code = "from medmamba.cli.app import main; main()"
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True)
    return time.monotonic() - begun


def measure(dataset: Path, network: str, max_time: str, folder: Path) -> dict[str, Any]:
    """Run the four commands and read what they wrote."""
    work, masks = folder / "work", folder / "masks"
    medmamba("plan", dataset, "-o", work, "-n", network)
    medmamba("train", work, "-n", network, "--fold", "all", "--max-time", max_time)
    run = next(work.glob(f"runs/{network}/*/fold_all"))
    predict_s = medmamba("predict", "-i", dataset / "imagesTs", "-o", masks, "-m", run)
    medmamba("evaluate", dataset / "labelsTs", masks)
    summary = json.loads((masks / "summary.json").read_text(encoding="utf-8"))
    names = json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))["labels"]
    last = json.loads((run / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    labels = {
        name.lower(): {
            "dice": round(summary["mean"][str(value)]["Dice"], 4),
            "hd95_mm": round(summary["mean"][str(value)]["HD95_mm"], 2),
        }
        for name, value in names.items()
        if str(value) in summary["mean"]
    }
    return {
        "network": network,
        "max_time": max_time,
        "fold": "all",
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": version("torch"),
        "cases": len(summary["metric_per_case"]),
        "dice": round(summary["foreground_mean"]["Dice"], 4),
        "labels": labels,
        "steps": last["iteration"],
        "predict_s": round(predict_s, 2),
    }


def note(row: dict[str, Any]) -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    kept = [run for run in results["runs"] if run["network"] != row["network"]]
    results["runs"] = sorted([*kept, row], key=lambda run: -run["dice"])
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--network", required=True)
    parser.add_argument("--max-time", default="10m")
    parser.add_argument("--work", type=Path, help="keep what was made here")
    parser.add_argument("--note", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        row = measure(arguments.dataset, arguments.network, arguments.max_time, folder)
    print(json.dumps(row, indent=1))
    if arguments.note:
        note(row)


if __name__ == "__main__":
    main()
