"""train_folds(): the folds of one network, one after another here or side by side on a cluster."""

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from medmamba import __version__
from medmamba.dataset import read_splits
from medmamba.errors import MedMambaError, TrainingError, UsageError
from medmamba.pipeline.cluster import ENGINES, Engine, Needs, largest_node, ray_cluster, run_jobs
from medmamba.pipeline.training import train
from medmamba.pipeline.work import choose_configuration, open_work

if TYPE_CHECKING:
    from medmamba.training.progress import EpochReport, StepReport


OnEpoch = Callable[[int, "EpochReport"], None]
"""Called with the fold and the report of one of its epochs."""

OnStep = Callable[[int, "StepReport"], None]
"""Called with the fold and where in an epoch it is."""


@dataclass(frozen=True, kw_only=True)
class FoldOutcome:
    """How one fold went.

    Args:
        fold: its number.
        model: the model folder it left; None when it failed.
        dice: of validation patches after the last epoch.
        problem: why there is no model.
        code, exit_code: of that problem.
        losses: processes it lost on the way and did not need to start over for.
    """

    fold: int
    model: str | None = None
    epochs: int = 0
    dice: float = float("nan")
    problem: str = ""
    code: str = ""
    exit_code: int = 0
    losses: int = 0


def train_folds(
    work: Path | str,
    *,
    folds: Sequence[int] | Literal["all"] = "all",
    engine: Engine | str = "local",
    address: str | None = None,
    cpus: float | None = None,
    network: str = "lightm_unet_s",
    configuration: str | None = None,
    resume: bool = False,
    on_epoch: OnEpoch | None = None,
    on_step: OnStep | None = None,
    on_message: Callable[[str], None] | None = None,
    **options: Any,
) -> tuple[FoldOutcome, ...]:
    """Train the folds of a cross-validation; a fold that fails does not end the others.

    Args:
        work: folder that :func:`plan` made; on a cluster, one that all machines see at this path.
        folds: their numbers, or ``"all"`` of the split.
        engine: ``local`` trains one after another in this process, ``ray`` each as a task of a Ray
            cluster. A task whose process or machine is lost goes on from its last checkpoint.
        address: of the cluster; None for the one this machine belongs to, ``local`` for a new one.
        cpus: processor cores of a task; None divides a machine's among the folds.
        network: a network planned there.
        configuration: 3d_fullres where it exists, else 2d, when None.
        resume: go on from what folds have saved; finished ones are left as they are.
        on_epoch: called after every epoch of a fold, while they run here.
        on_step: likewise after every step.
        on_message: called with what was chosen, and on a cluster with what happens.
        options: as of :func:`train`.

    Returns:
        One outcome a fold, in their order.

    Raises:
        UsageError: no such folds or engine.
        PlanError: no plan here.
        EnvironmentFault: no cluster.
        TrainingError: a signal asked to stop; what folds have saved is kept.
    """
    if engine not in ENGINES:
        raise UsageError(f"engine '{engine}' does not exist. Choose one of {', '.join(ENGINES)}.")
    place = open_work(Path(work).resolve())
    name = choose_configuration(place.load_plan(network), configuration)
    numbers = _fold_numbers(place.splits, folds)
    chosen = {"network": network, "configuration": name, **options}
    say = on_message or (lambda text: None)
    if engine == "local":
        return tuple(
            _train_here(
                place.folder,
                fold,
                chosen,
                resume=resume,
                on_epoch=None if on_epoch is None else partial(on_epoch, fold),
                on_step=None if on_step is None else partial(on_step, fold),
                say=say,
            )
            for fold in numbers
        )
    runs = {fold: place.run(network, name, fold) for fold in numbers}
    return _train_on_cluster(place.folder, runs, chosen, address, cpus, resume=resume, say=say)


def _fold_numbers(splits: Path, folds: Sequence[int] | Literal["all"]) -> tuple[int, ...]:
    if not splits.is_file():
        raise UsageError("folds: too few cases to divide into folds; train with --fold all.")
    count = len(read_splits(splits))
    numbers = tuple(range(count)) if folds == "all" else tuple(dict.fromkeys(folds))
    wrong = [number for number in numbers if not 0 <= number < count]
    if wrong or not numbers:
        raise UsageError(f"folds {wrong or 'none'}: the split has folds 0 to {count - 1}.")
    return numbers


def _train_here(
    work: Path,
    fold: int,
    options: Mapping[str, Any],
    *,
    resume: bool,
    on_epoch: "Callable[[EpochReport], None] | None",
    on_step: "Callable[[StepReport], None] | None",
    say: Callable[[str], None],
) -> FoldOutcome:
    try:
        done = train(
            work,
            fold=fold,
            resume=resume,
            on_epoch=on_epoch,
            on_step=on_step,
            on_message=say,
            **options,
        )
    except MedMambaError as error:
        if error.exit_code >= SIGNALLED:
            raise
        say(f"fold {fold}: [{error.code}] {error.message}")
        return _failed(fold, error)
    return FoldOutcome(fold=fold, model=str(done.model), epochs=done.epochs, dice=done.dice)


SIGNALLED = 128
"""Exit codes from here on mean that a signal asked to stop."""


def _failed(fold: int, error: MedMambaError) -> FoldOutcome:
    return FoldOutcome(fold=fold, problem=error.message, code=error.code, exit_code=error.exit_code)


def _train_on_cluster(
    work: Path,
    runs: Mapping[int, Path],
    options: Mapping[str, Any],
    address: str | None,
    cpus: float | None,
    *,
    resume: bool,
    say: Callable[[str], None],
) -> tuple[FoldOutcome, ...]:
    from medmamba.training.interruption import stop_on_signals

    jobs = {
        f"fold {fold}": partial(fold_job, str(work), fold, dict(options), resume, __version__)
        for fold in runs
    }
    follower = EpochFollower(runs, say)
    with ray_cluster(address) as ray, stop_on_signals() as stop:
        needs = _needs(
            largest_node(ray), len(runs), cpus, device=str(options.get("device", "auto"))
        )
        say(f"{len(runs)} folds as Ray tasks of {needs.cpus:g} CPUs and {needs.gpus:g} GPUs each")
        ended = run_jobs(
            ray,
            jobs,
            needs=needs,
            stopping=lambda: stop.signal_number is not None,
            on_poll=follower.look,
            on_event=say,
        )
        follower.look()
        if stop.signal_number is not None:
            raise stop.error(str(work / "runs"))
    outcomes = []
    for fold in runs:
        end = ended[f"fold {fold}"]
        if end.problem:
            error = TrainingError(f"fold {fold}: {end.problem}", code="E_TRAIN_TASK")
            say(f"[{error.code}] {error.message}")
            outcomes.append(_failed(fold, error))
        else:
            outcomes.append(FoldOutcome(**{**end.value, "losses": end.losses}))
    return tuple(outcomes)


def _needs(largest: Needs, folds: int, cpus: float | None, *, device: str) -> Needs:
    gpus = 1.0 if largest.gpus >= 1 and device != "cpu" else 0.0
    share = max(1.0, largest.cpus // max(1.0, largest.gpus if gpus else folds))
    return Needs(cpus=share if cpus is None else cpus, gpus=gpus)


def fold_job(
    work: str, fold: int, options: dict[str, Any], resume: bool, version: str, losses: int
) -> dict[str, Any]:
    """Train one fold where a task runs; what the user can cause is returned, not raised.

    Args:
        work: work folder, as the driver sees it.
        fold: its number.
        options: as of :func:`train`.
        resume: go on from what is saved.
        version: of the driver's medmamba.
        losses: processes that worked on this fold before and were lost.
    """
    import torch

    # A task's share of the machine, which Ray hands down in this variable.
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    host = socket.gethostname()
    resume = resume or losses > 0
    # What a lost process has begun anew is not begun anew again.
    options = {**options, "overwrite": bool(options.get("overwrite")) and not resume}
    try:
        _require_alike(work, version, host)
        done = train(work, fold=fold, resume=resume, **options)
    except MedMambaError as error:
        return {
            "fold": fold,
            "problem": f"on {host}: {error.message}",
            "code": error.code,
            "exit_code": error.exit_code,
        }
    return {"fold": fold, "model": str(done.model), "epochs": done.epochs, "dice": done.dice}


def _require_alike(work: str, version: str, host: str) -> None:
    if version != __version__:
        raise UsageError(
            f"{host} has medmamba {__version__}, the driver {version}. Install the same version "
            "on all machines.",
            code="E_VERSION_MIXED",
        )
    if not Path(work).is_dir():
        raise UsageError(
            f"{work} does not exist on {host}. Put the work folder where all machines see it "
            "under one path."
        )


class EpochFollower:
    """Says which epochs of several runs have ended since it was last asked, from their logs."""

    def __init__(self, runs: Mapping[int, Path], say: Callable[[str], None]) -> None:
        self._logs = {fold: run / "log.jsonl" for fold, run in runs.items()}
        self._read = {fold: _size(log) for fold, log in self._logs.items()}
        self._say = say

    def look(self) -> None:
        """Read what is new; a log that a resumed run has cut back goes on from its new end."""
        for fold, log in self._logs.items():
            size = _size(log)
            if size <= self._read[fold]:
                self._read[fold] = size
                continue
            with log.open("rb") as file:
                file.seek(self._read[fold])
                new = file.read(size - self._read[fold])
            whole = new[: new.rfind(b"\n") + 1]
            self._read[fold] += len(whole)
            for line in whole.splitlines():
                if EPOCH_ROW in line:
                    self._say(f"fold {fold}  {_describe_epoch(json.loads(line))}")


EPOCH_ROW = b'"kind":"epoch"'


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _describe_epoch(row: Mapping[str, Any]) -> str:
    loss, dice = (float("nan") if row[key] is None else row[key] for key in ("loss", "dice"))
    return f"epoch {row['epoch'] + 1:>4}/{row['epochs']:<4} loss {loss:+.4f}  Dice {dice:.4f}"
