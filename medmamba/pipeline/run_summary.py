"""Where a training run is and how it does, read from its folder; needs no torch."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from medmamba.bundling.manifest import MANIFEST_FILE, MODEL_FOLDER
from medmamba.errors import CheckpointError
from medmamba.files import read_json
from medmamba.training.run_files import (
    BEST,
    CURVES,
    LATEST,
    LOG,
    RUN_RECORD,
    RunState,
    load_state,
    read_log,
)

FOLD_PREFIX = "fold_"
START_SLACK_S = 60.0
"""A process that is younger than its run's record by more than this has only its number."""


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A training run in one page.

    Args:
        status: ``finished``, ``running``, ``interrupted`` (go on with --resume), or ``elsewhere``:
            unfinished, and begun on another machine, so that it may be running there.
        configuration, fold: by the folder's place; None where it lies elsewhere.
        epochs_done, epochs_planned: the plan of a run with a time budget is an estimate.
        iterations: optimiser steps done, those of a begun epoch included.
        last: loss, validation_loss, dice, ema_dice, learning_rate of the last epoch.
        best: the best of each over epochs, and the epoch it was reached in, counted from 1.
        dice_per_class: on validation patches of the last epoch.
        whole_cases: mean Dice of whole validation cases, by label; empty until they are scored.
        remaining_s: as estimated after the last epoch; 0 when finished.
        skipped_steps: steps whose loss or gradient was not finite.
        files: checkpoints, curves, log and model, as far as they are there.
        settings: what the run was begun with.
    """

    folder: str
    status: str
    network: str
    configuration: str | None
    fold: str | None
    epochs_done: int
    epochs_planned: int | None
    iterations: int
    length: str
    last: dict[str, float | None]
    best: dict[str, dict[str, float]]
    dice_per_class: dict[str, float | None]
    whole_cases: dict[str, float | None]
    elapsed_s: float
    remaining_s: float
    patches_per_s: float | None
    memory_gb: float | None
    skipped_steps: int
    started: str
    files: dict[str, str]
    settings: dict[str, Any]


def is_run(folder: Path) -> bool:
    """Whether a folder is one that ``train`` writes into."""
    return (folder / RUN_RECORD).is_file() and (folder / LOG).is_file()


def summarize_run(folder: Path) -> RunSummary:
    """Read what a run has written so far; it may be running.

    Raises:
        CheckpointError: its record or checkpoint is damaged.
    """
    record = read_json(folder / RUN_RECORD, what="training run", error=CheckpointError)
    rows = read_log(folder / LOG)
    epochs = [row for row in rows if row.get("kind") == "epoch"]
    state = load_state(folder / LATEST) if (folder / LATEST).exists() else None
    last: Mapping[str, Any] = epochs[-1] if epochs else {}
    finished = state is not None and state.finished
    in_place = folder.name.startswith(FOLD_PREFIX)
    return RunSummary(
        folder=str(folder),
        status="finished" if finished else _status(record),
        network=str(record.get("network", {}).get("name", "")),
        configuration=folder.parent.name if in_place else None,
        fold=folder.name.removeprefix(FOLD_PREFIX) if in_place else None,
        epochs_done=len(epochs) if state is None else max(state.epoch, len(epochs)),
        epochs_planned=_planned(epochs, record, finished=finished),
        iterations=_iterations(rows, state),
        length=str(record.get("length", "")),
        last={key: last.get(key) for key in (*LOWEST, *HIGHEST, "learning_rate")},
        best=_best(epochs),
        dice_per_class=dict(last.get("dice_per_class") or {}),
        whole_cases=_whole_cases(folder),
        elapsed_s=float(last.get("elapsed_s") or (state.elapsed_s if state else 0.0)),
        remaining_s=0.0 if finished else float(last.get("remaining_s") or 0.0),
        patches_per_s=last.get("patches_per_s"),
        memory_gb=last.get("memory_gb"),
        skipped_steps=sum(int(row.get("skipped_steps") or 0) for row in epochs),
        started=str(record.get("started", "")),
        files=_files(folder),
        settings={key: value for key, value in record.items() if key != "identity"},
    )


LOWEST, HIGHEST = ("loss", "validation_loss"), ("dice", "ema_dice")


def _best(epochs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    found = {}
    for key in (*LOWEST, *HIGHEST):
        known = [row for row in epochs if row.get(key) is not None]
        if known:
            choose = min if key in LOWEST else max
            row = choose(known, key=lambda one: float(one[key]))
            found[key] = {"value": float(row[key]), "epoch": int(row["epoch"]) + 1}
    return found


def _planned(
    epochs: Sequence[Mapping[str, Any]], record: Mapping[str, Any], *, finished: bool
) -> int | None:
    if finished:
        return len(epochs)
    if epochs:
        return int(epochs[-1]["epochs"])
    # A time budget says how many only once the machine's speed is known.
    timed = str(record.get("length", "")).endswith(" s")
    return None if timed else record.get("recipe", {}).get("epochs")


def _iterations(rows: Sequence[Mapping[str, Any]], state: RunState | None) -> int:
    steps = [int(row["iteration"]) + 1 for row in rows if row.get("kind") == "step"]
    return max([*steps[-1:], 0 if state is None else state.iteration])


def _status(record: Mapping[str, Any]) -> str:
    process = record.get("process", {})
    if process.get("host") != platform.node():
        return "elsewhere"
    alive = _is_alive(int(process.get("pid", 0)), str(record.get("started", "")))
    return "running" if alive else "interrupted"


def _is_alive(number: int, started: str) -> bool:
    """Whether the process is there, and not a younger one that was given its number."""
    if number <= 0:
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    entry = Path(f"/proc/{number}")
    try:
        begun = datetime.fromisoformat(started).timestamp()
        return not entry.exists() or entry.stat().st_ctime <= begun + START_SLACK_S
    except (ValueError, OSError):
        return True


def _whole_cases(folder: Path) -> dict[str, float | None]:
    path = folder / "validation.json"
    if not path.is_file():
        return {}
    content = read_json(path, what="validation", error=CheckpointError)
    return dict(content.get("dice", {}))


def _files(folder: Path) -> dict[str, str]:
    places = {
        "latest_checkpoint": folder / LATEST,
        "best_checkpoint": folder / BEST,
        "log": folder / LOG,
        "curves": folder / CURVES,
        "model": folder / MODEL_FOLDER,
    }
    return {
        name: str(path)
        for name, path in places.items()
        if (path / MANIFEST_FILE if name == "model" else path).exists()
    }
