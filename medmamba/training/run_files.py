"""The files of a run folder and where the run is, read without torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmamba.errors import BundleError, CheckpointError
from medmamba.files import RECORD_CONFIG, from_plain
from medmamba.networks.tensor_file import load_metadata

LATEST = "checkpoint_latest.safetensors"
BEST = "checkpoint_best.safetensors"
LOG, RUN_RECORD, CURVES = "log.jsonl", "run.json", "curves.png"

START_RECORD = "start.json"
"""What became of the weights a run was given to begin with."""

CHECKPOINT_VERSION = 1
STATE_KEY = "state"
"""Of a checkpoint's metadata; its value is a ``RunState`` as JSON."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run is, but for its tensors.

    Args:
        identity: name and hashes of what the run is about; all must match on resuming.
        epoch, steps: finished epochs, and steps of the one that was begun.
        iteration: optimiser steps asked for since the start; the number of the next batch.
        losses: of the steps of the begun epoch.
        elapsed_s: time of training in all processes so far.
        ema_dice, best_dice: smoothed validation Dice, now and at its best; None before the first.
        validation_batches: settled number of validation batches; None before the first epoch.
        log_bytes: length of log.jsonl that belongs to this state.
        scaler: state of the fp16 gradient scaler.
        bad_steps: consecutive steps that were skipped.
        length: the schedule's length in words, for comparing and for people.
        finished: the schedule ended.
    """

    __pydantic_config__ = RECORD_CONFIG

    version: int = CHECKPOINT_VERSION
    identity: dict[str, str]
    epoch: int = 0
    steps: int = 0
    iteration: int = 0
    losses: tuple[float, ...] = ()
    elapsed_s: float = 0.0
    dice: float | None = None
    ema_dice: float | None = None
    best_dice: float | None = None
    validation_batches: int | None = None
    log_bytes: int = 0
    scaler: dict[str, float] | None = None
    bad_steps: int = 0
    length: str = ""
    finished: bool = False


def load_state(path: Path) -> RunState:
    """Read where the run was, without its tensors.

    Raises:
        CheckpointError: it is missing, damaged, or of another version.
    """
    try:
        metadata = load_metadata(path)
        values = json.loads(metadata[STATE_KEY])
    except BundleError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({error}). Start the run again, or copy it again."
        ) from error
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {path} holds no state of a run ({error!r}). It is not a checkpoint of "
            "medmamba train."
        ) from error
    found = values.get("version") if isinstance(values, dict) else None
    if found != CHECKPOINT_VERSION:
        raise CheckpointError(
            f"checkpoint {path} has version {found}; this medmamba reads {CHECKPOINT_VERSION}. "
            "Finish the run with the version that began it."
        )
    return from_plain(RunState, values, what=f"checkpoint {path}", error=CheckpointError)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a log; a torn last line is left out."""
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
