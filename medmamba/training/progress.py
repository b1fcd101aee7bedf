"""What a run tells: a report per epoch, ``log.jsonl``, and ``run.json``."""

import contextlib
import json
import logging
import math
import os
import platform
import resource
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch

from medmamba.errors import EnvironmentFault
from medmamba.files import to_json, write_atomic

logger = logging.getLogger(__name__)

BYTES_PER_GB = 2**30
RECORDED_PACKAGES = ("medmamba", "torch", "monai", "numpy", "blosc2")


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """How an epoch went.

    Args:
        epoch: counted from 0.
        epochs: of the whole run.
        iteration: optimiser steps so far.
        dice: mean validation Dice of patches over classes; NaN when no class occurred.
        dice_per_class: by name of class or region.
        ema_dice: smoothed ``dice``, by which the best checkpoint is chosen.
        gradient_norm: mean L2 norm before clipping.
        skipped_steps: steps whose loss or gradient was not finite.
        patches_per_s: while training, validation left out.
        loading_share: part of the training time spent waiting for batches.
        memory_gb: most memory held so far, of the GPU when there is one.
    """

    epoch: int
    epochs: int
    iteration: int
    loss: float
    validation_loss: float
    dice: float
    dice_per_class: dict[str, float]
    ema_dice: float
    is_best: bool
    learning_rate: float
    gradient_norm: float
    skipped_steps: int
    seconds: float
    elapsed_s: float
    remaining_s: float
    patches_per_s: float
    loading_share: float
    memory_gb: float


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Where the loop is within an epoch.

    Args:
        epoch: counted from 0.
        validating: steps are validation batches; else those of training.
        step, steps: done in this epoch, of how many; an estimate under a time budget.
        loss: mean over the steps of the epoch so far.
        patches_per_s: while training.
        memory_gb: most memory held so far.
    """

    epoch: int
    epochs: int
    validating: bool
    step: int
    steps: int
    loss: float
    patches_per_s: float
    memory_gb: float
    remaining_s: float


class Log(Protocol):
    """Where the rows of a run go."""

    def write(self, row: dict[str, Any]) -> None:
        """Take one row."""

    def sync(self) -> int:
        """Bring all rows to disk and return the length of ``log.jsonl``."""

    def close(self) -> None:
        """End it."""


class RunLog:
    """Appends rows to ``log.jsonl``; a resumed run cuts it back to its checkpoint first."""

    def __init__(self, path: Path, *, keep_bytes: int) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            self._file.truncate(min(keep_bytes, self._file.tell()))
            self._file.seek(0, os.SEEK_END)
        except OSError as error:
            raise _unwritable(path, error) from error
        if self._file.tell() < keep_bytes:
            logger.warning("%s is shorter than its checkpoint says; rows are missing", path)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; numbers that are not finite become null."""
        clean = {key: _finite(value) for key, value in row.items()}
        try:
            self._file.write(json.dumps(clean, separators=(",", ":")).encode() + b"\n")
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def sync(self) -> int:
        """Bring all rows to disk and return the length of the file."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _unwritable(self.path, error) from error
        return self._file.tell()

    def close(self) -> None:
        """Flush and close; a full disk was or will be reported by what was to be saved."""
        with contextlib.suppress(OSError):
            self._file.close()


class SilentLog:
    """Stands where the log is on ranks that do not lead, and writes nothing."""

    def write(self, row: dict[str, Any]) -> None:
        """See ``RunLog``."""

    def sync(self) -> int:
        """See ``RunLog``."""
        return 0

    def close(self) -> None:
        """See ``RunLog``."""


def _unwritable(path: Path, error: OSError) -> EnvironmentFault:
    return EnvironmentFault(
        f"{path}: cannot be written ({error.strerror or error}). "
        "Check permissions and free space of the folder.",
        code="E_IO_WRITE",
    )


def memory_gb(device: torch.device) -> float:
    """Return the most memory this process held, on the GPU when it trains there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / BYTES_PER_GB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / BYTES_PER_GB


def write_run_record(
    path: Path, *, device: torch.device, identity: dict[str, str], settings: dict[str, Any]
) -> None:
    """Write ``run.json``: how this run was started, with what, where."""
    record = {
        "command": sys.argv,
        "process": {"host": platform.node(), "pid": os.getpid()},
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **_versions()},
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "identity": identity,
        **settings,
    }
    write_atomic(path, to_json(record))


def _versions() -> dict[str, str]:
    found = {}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return f"{device} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return value
