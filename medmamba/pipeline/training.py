"""train(): one fold of one network from a work folder, ending in a model folder."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medmamba.dataset import Split, split_for_fold
from medmamba.errors import CheckpointError, PlanError, UsageError
from medmamba.files import from_plain, read_json
from medmamba.pipeline.work import Work, choose_configuration, open_work
from medmamba.plans.plan import ConfigurationPlan, Plan

if TYPE_CHECKING:
    from medmamba.training.progress import EpochReport
    from medmamba.training.recipe import TrainingRecipe
    from medmamba.training.trainer import TrainingResult, TrainingSetup

PRECISIONS = ("auto", "bf16", "fp16", "fp32")
MODEL_FOLDER = "model"


@dataclass(frozen=True, kw_only=True)
class TrainOutcome:
    """Where a finished run left its model, and how it did on its validation patches."""

    run_folder: Path
    model: Path
    epochs: int
    dice: float


def train(
    work: Path | str,
    *,
    network: str = "lightm_unet_s",
    fold: int | str = 0,
    configuration: str | None = None,
    max_time: float | None = None,
    epochs: int | None = None,
    iterations: int | None = None,
    batch_size: int | None = None,
    loss: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    seed: int = 0,
    precision: str = "auto",
    device: str = "auto",
    deterministic: bool = False,
    on_epoch: "Callable[[EpochReport], None] | None" = None,
    on_message: Callable[[str], None] | None = None,
) -> TrainOutcome:
    """Train one fold and write a model folder that ``predict`` uses.

    Args:
        work: folder that :func:`plan` made.
        network: a network planned there.
        fold: number of the fold, or ``"all"`` to train on every case.
        configuration: 3d_fullres where it exists, else 2d, when None.
        max_time: seconds; the schedule is laid out to end with it. Excludes ``epochs``.
        epochs, iterations: length of the schedule instead of the preset's.
        batch_size, loss: instead of the plan's.
        resume: go on from the latest checkpoint.
        overwrite: start again although the run exists.
        precision: ``auto`` takes bf16 where the device has it natively.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        on_epoch: called after every epoch.
        on_message: called with what was chosen and why.

    Raises:
        UsageError: options that exclude each other, or names that do not exist.
        PlanError: no plan or no preprocessed data for this network.
        CheckpointError: nothing to resume, or a run that must not be overwritten.
        EnvironmentFault: no such device, or the disk is full.
        TrainingError: training could not go on; the last checkpoint is kept.
    """
    from medmamba.training.trainer import train_fold

    _check_options(max_time, epochs, precision, resume=resume, overwrite=overwrite)
    place = open_work(Path(work))
    decided = place.load_plan(network)
    name = choose_configuration(decided, configuration)
    branch = decided.configurations[name]
    setup = _make_setup(
        place, decided, name, fold,
        recipe=_adjust(branch.training, epochs, iterations, batch_size, loss),
        max_time_s=max_time, seed=seed, precision=precision, device=device,
        deterministic=deterministic,
    )  # fmt: skip
    _check_run(setup.run_folder, resume=resume, overwrite=overwrite)
    if on_message is not None:
        _announce(setup, network, name, on_message)
    result = train_fold(setup, resume=resume, on_progress=on_epoch)
    model = _write_model(place, decided, name, fold, setup, result)
    return TrainOutcome(
        run_folder=setup.run_folder, model=model, epochs=result.epochs, dice=result.dice
    )
