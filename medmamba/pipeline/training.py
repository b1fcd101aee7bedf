"""train(): one fold of one network from a work folder, ending in a model folder."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medmamba.bundle import MODEL_FOLDER, load_bundle, save_bundle
from medmamba.dataset import Split, read_splits, split_for_fold
from medmamba.errors import CheckpointError, PlanError, UsageError
from medmamba.pipeline.cascade import (
    PreviousStage,
    find_previous_stage,
    predict_previous_stage,
)
from medmamba.pipeline.leaks import require_no_leak
from medmamba.pipeline.recipes import RecipeChanges, choose_recipe, short_recipe
from medmamba.pipeline.starting import Beginning
from medmamba.pipeline.training_images import common_orientation, measure_usual_volumes
from medmamba.pipeline.work import Work, choose_configuration, open_work
from medmamba.plans.plan import ConfigurationPlan, Plan
from medmamba.preprocessing.store import CaseStore

if TYPE_CHECKING:
    from medmamba.training.progress import EpochReport, StepReport
    from medmamba.training.trainer import TrainingResult, TrainingSetup


@dataclass(frozen=True, kw_only=True)
class TrainOutcome:
    """Where a finished run left its model, and how it did on its validation patches.

    Args:
        rank: of this process among those that trained together; 0 wrote the files.
    """

    run_folder: Path
    model: Path
    epochs: int
    dice: float
    rank: int = 0


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
    recipe: str | None = None,
    augmentation: str | None = None,
    mirror: str | None = None,
    dummy_2d: str | None = None,
    pretrained: Path | str | None = None,
    pretrained_mode: str = "exact",
    freeze_epochs: int | None = None,
    init: Path | str | None = None,
    init_form: bool = False,
    resume: bool = False,
    extend: bool = False,
    overwrite: bool = False,
    seed: int = 0,
    precision: str = "auto",
    device: str = "auto",
    deterministic: bool = False,
    cuda_graph: bool = False,
    validate: bool = True,
    tensorboard: bool = False,
    on_epoch: "Callable[[EpochReport], None] | None" = None,
    on_step: "Callable[[StepReport], None] | None" = None,
    on_message: Callable[[str], None] | None = None,
) -> TrainOutcome:
    """Train one fold and write a model folder that ``predict`` uses.

    Processes that ``torchrun`` started train it together, each on a part of every batch.

    Args:
        work: folder that :func:`plan` made.
        network: a network planned there.
        fold: number of the fold, or ``"all"`` to train on every case.
        configuration: 3d_fullres where it exists, else 2d, when None.
        max_time: seconds; the schedule is laid out to end with it. Excludes ``epochs``.
        epochs: length of the schedule instead of the recipe's.
        iterations: steps per epoch instead of the recipe's.
        batch_size: patches per step instead of the plan's.
        loss: key of ``medmamba.training.losses.LOSSES`` instead of the recipe's.
        recipe: recipe to train by instead of the plan's: a name that
            ``medmamba.plans.presets.recipe_names`` lists, or a ``.toml`` file. When None, a
            CPU that is given an hour or less uses the preset's ``short_recipe`` if it has one.
        augmentation: ``default``, ``strong`` or ``none``.
        mirror: axes that may be flipped: ``all``, ``none``, ``in-plane`` or numbers.
        dummy_2d: whether the first axis is augmented apart: ``auto``, ``on``, ``off``.
        pretrained: VMamba-T weights for the encoder of a Swin-UMamba; see
            ``medmamba.pipeline.starting.pretrained_start``.
        pretrained_mode: ``exact`` or ``corrected``.
        freeze_epochs: epochs for which a pretrained encoder stays fixed, or with ``init`` all but
            heads and first layers.
        init: begin with the weights of a trained model: bundle or run folder, a folder that
            nnU-Net trained into, or a checkpoint file; see ``pipeline.starting.donated_start``.
        init_form: train the network as that model has it (widths, strides, blocks, options)
            instead of as planned.
        resume: go on from the latest checkpoint.
        extend: with ``resume``, accept another length than the run began with.
        overwrite: start again although the run exists.
        seed: of weights, patches and augmentation.
        precision: ``auto`` takes bf16 where the device has it natively.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        deterministic: bit-exact on GPUs too; CPU runs always are.
        cuda_graph: replay steps on a GPU from a CUDA graph where they fit into its memory twice;
            new, and tried step by step rather than in whole runs.
        validate: at the end, predict and score the fold's validation cases as wholes.
        tensorboard: also write curves for TensorBoard (extra ``tensorboard``).
        on_epoch: called after every epoch.
        on_step: called after every step and batch of validation.
        on_message: called with what was chosen and why.

    Raises:
        UsageError: options that exclude each other, or names that do not exist.
        PlanError: no plan or no preprocessed data for this network.
        CheckpointError: nothing to resume, or a run that must not be overwritten.
        EnvironmentFault: no such device, or the disk is full.
        TrainingError: training could not go on; the last checkpoint is kept.
        BundleError: pretrained weights that do not fit the network.
        SecurityError: a file of pretrained weights that holds more than data.
    """
    from medmamba.training.board import require_tensorboard
    from medmamba.training.precision import resolve_device
    from medmamba.training.team import first_of_team, join_team
    from medmamba.training.trainer import TrainingSetup, train_fold

    tell = on_message if first_of_team() else None

    on_cpu = resolve_device(device).type == "cpu"
    short = short_recipe(network, max_time, on_cpu=on_cpu) if recipe is None else None
    changes = RecipeChanges(
        recipe=recipe or short,
        epochs=epochs,
        iterations=iterations,
        batch_size=batch_size,
        loss=loss,
        augmentation=augmentation,
        mirror=mirror,
        dummy_2d=dummy_2d,
    )
    _check_options(max_time, changes, resume=resume, overwrite=overwrite)
    if tensorboard:
        require_tensorboard()
    beginning = Beginning(
        pretrained=None if pretrained is None else Path(pretrained),
        pretrained_mode=pretrained_mode,
        init=None if init is None else Path(init),
        init_form=init_form,
        freeze_epochs=freeze_epochs,
    )
    place = open_work(Path(work))
    decided = place.load_plan(network)
    name = choose_configuration(decided, configuration)
    branch = decided.configurations[name]
    split = find_split(place, name, branch, fold)
    store = CaseStore(place.store(name, branch))
    require_no_leak(split, place.load_description(), store, fold=fold)
    previous = find_previous_stage(place, decided, name, fold, split)
    spec, start = beginning.start(decided, name, fold, tell)
    setup = TrainingSetup(
        run_folder=place.run(network, name, fold),
        network=spec,
        grid=branch.grid,
        recipe=choose_recipe(branch.training, changes, dimension=branch.grid.dimension),
        label_map=decided.label_map,
        store_folder=place.store(name, branch),
        split=split,
        device=device,
        precision=precision,
        seed=seed,
        max_time_s=max_time,
        deterministic=deterministic,
        cuda_graph=cuda_graph,
        extend=extend,
        start=start,
        tensorboard=tensorboard,
        outside_is_zero_channels=masked_channels(branch),
        previous_folder=None if previous is None else previous.folder,
        previous_identity="" if previous is None else previous.identity,
    )
    _check_run(setup.run_folder, resume=resume, overwrite=overwrite)
    with join_team(resolve_device(device)) as team:
        if tell is not None:
            _announce(setup, name, fold, team.size, tell)
            if short is not None:
                tell(
                    f"recipe {short} instead of the plan's, which needs more steps than a CPU "
                    f"makes in {setup.length}; --recipe {network} trains by the plan's all the same"
                )
        if previous is not None:
            if team.leads:
                predict_previous_stage(
                    place, decided, name, previous, device=device, on_message=tell
                )
            team.wait()
        result = train_fold(setup, resume=resume, on_progress=on_epoch, on_step=on_step, team=team)
        model = setup.run_folder / MODEL_FOLDER
        if team.leads:
            _write_model(model, decided, name, fold, setup, result, previous)
            if validate and fold != "all":
                _validate(place, setup, model, tell)
        return TrainOutcome(
            run_folder=setup.run_folder,
            model=model,
            epochs=result.epochs,
            dice=result.dice,
            rank=team.rank,
        )


def _check_options(
    max_time: float | None, changes: RecipeChanges, *, resume: bool, overwrite: bool
) -> None:
    if max_time is not None and changes.epochs is not None:
        raise UsageError("--max-time and --epochs exclude each other: give one of them.")
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other: give one of them.")


def find_split(place: Work, name: str, branch: ConfigurationPlan, fold: int | str) -> Split:
    """Return the training and validation cases of a fold that are preprocessed.

    Raises:
        PlanError: no case is preprocessed for this configuration.
        UsageError: there are too few cases for folds.
    """
    store = place.store(name, branch)
    stored = CaseStore(store).case_ids() if store.is_dir() else ()
    if not stored:
        raise PlanError(
            f"{store}: no preprocessed cases for configuration '{name}'. Run `medmamba plan "
            f"DATASET -o {place.folder} --network {branch.network.name} -c {name}`."
        )
    if fold == "all":
        return split_for_fold((), "all", stored)
    if not place.splits.is_file():
        raise UsageError(
            f"fold {fold}: too few cases ({len(stored)}) to divide into folds; use --fold all."
        )
    return split_for_fold(read_splits(place.splits), fold, stored)


def masked_channels(branch: ConfigurationPlan) -> tuple[int, ...]:
    """Return the channels that are normalised inside a mask and zero outside it."""
    channels = branch.preprocessing.channels
    return tuple(index for index, channel in enumerate(channels) if channel.use_mask)


def _check_run(folder: Path, *, resume: bool, overwrite: bool) -> None:
    exists = (folder / "log.jsonl").exists()
    if exists and not resume and not overwrite:
        raise CheckpointError(
            f"{folder}: a run is there already. Go on with --resume, or start again with "
            "--overwrite.",
            code="E_RUN_EXISTS",
        )


def _announce(
    setup: "TrainingSetup",
    name: str,
    fold: int | str,
    processes: int,
    say: Callable[[str], None],
) -> None:
    from medmamba.training.feeding import batch_size_on
    from medmamba.training.precision import choose_precision, describe_cpu, resolve_device

    device = resolve_device(setup.device)
    where = f"CPU ({describe_cpu()})" if device.type == "cpu" else str(device)
    if processes > 1:
        where = f"{processes} processes, the first on {where},"
    batch = batch_size_on(setup.recipe, device)
    planned = f" (planned {setup.recipe.batch_size})" if batch != setup.recipe.batch_size else ""
    say(
        f"training {setup.network.name} {name} fold {fold} for {setup.length} on {where} in "
        f"{choose_precision(device, setup.precision)}: {len(setup.split.train)} cases, "
        f"patch {'x'.join(str(size) for size in setup.grid.patch_size)}, batch {batch}{planned}, "
        f"{setup.recipe.loss}, {setup.recipe.optimizer}, "
        f"{setup.recipe.augmentation if setup.recipe.augmentation != 'none' else 'no'} augmentation"
    )


def _validate(
    place: Work, setup: "TrainingSetup", model: Path, say: Callable[[str], None] | None
) -> None:
    """Score whole validation cases; a work folder without label images gets a message instead."""
    from medmamba.pipeline.validating import validate_cases

    tell = say or (lambda text: None)
    if not place.references.is_dir():
        tell("no validation of whole cases: plan the dataset again to copy its label images")
        return
    tell(f"validating {len(setup.split.validation)} whole cases")
    found = validate_cases(
        load_bundle(model),
        place,
        setup.split.validation,
        setup.run_folder,
        device=setup.device,
        on_case=lambda scores, done, total: tell(
            f"  {done}/{total} {scores.case_id}: Dice {scores.dice:.4f}"
        ),
    )
    scores = ", ".join(
        f"{name} {'-' if dice is None else format(dice, '.4f')}"
        for name, dice in found.dice.items()
    )
    tell(f"Dice of whole validation cases: {scores} ({found.seconds:.0f} s)")


def _write_model(
    folder: Path,
    decided: Plan,
    name: str,
    fold: int | str,
    setup: "TrainingSetup",
    result: "TrainingResult",
    previous: PreviousStage | None,
) -> None:
    from medmamba.networks.weights import load_weights
    from medmamba.training.checkpoint import prediction_weights

    # The plan of the bundle says how it was trained, flips included, whatever was planned.
    branch = dataclasses.replace(
        decided.configurations[name], training=setup.recipe, network=setup.network
    )
    branches = {**decided.configurations, name: branch}
    earlier = []
    if previous is not None:
        first = previous.model
        branches[previous.configuration] = dataclasses.replace(
            first.configuration,
            next_stage=decided.configurations[previous.configuration].next_stage,
        )
        earlier = [load_weights(first.folder / entry.file) for entry in first.manifest.weights]
    trained = dataclasses.replace(decided, configurations=branches)
    store = CaseStore(setup.store_folder)
    save_bundle(
        folder,
        plan=trained,
        configuration=name,
        weights=[prediction_weights(result.latest)],
        previous_weights=earlier,
        folds=[fold],
        precision=result.precision,
        training={
            "length": setup.length,
            "epochs": result.epochs,
            "iterations": result.iterations,
            "seconds": round(result.elapsed_s, 1),
            "seed": setup.seed,
            "training_cases": len(setup.split.train),
            **({"started_from": setup.start.source} if setup.start is not None else {}),
        },
        scores={"validation_patch_dice": round(result.dice, 4)},
        usual_volumes=measure_usual_volumes(store, setup.split.train, decided.label_map),
        orientation=common_orientation(store, setup.split.train),
    )
