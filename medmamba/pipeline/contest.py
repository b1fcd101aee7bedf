"""One run of a comparison: train a network under the common conditions, and score whole cases.

Done in a process of its own (see ``apart``), so that its peak memory is its own and a crash costs
no other run.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmamba.errors import MedMambaError, PlanError, TrainingError, UsageError
from medmamba.files import RECORD_CONFIG, from_plain, hash_values, read_json, to_json, write_atomic
from medmamba.networks.spec import Mixer

if TYPE_CHECKING:
    from medmamba.plans.plan import Plan
    from medmamba.training.trainer import TrainingSetup

RESULT_FILE, SPEC_FILE = "result.json", "contest.json"
FEATURES = "features"
OPTION = "options."


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What every run of a comparison has in common.

    Args:
        work: the work folder.
        configuration: of all plans.
        frame: network whose plan gives spacing, patch and batch.
        recipe: by name; None for the one of each plan.
        max_time_s: equal wall-clock time for all; excludes ``epochs``.
    """

    __pydantic_config__ = RECORD_CONFIG

    work: Path
    configuration: str
    frame: str
    recipe: str | None = None
    epochs: int | None = None
    iterations: int | None = None
    max_time_s: float | None = None
    device: str = "auto"
    precision: str = "auto"


@dataclass(frozen=True, kw_only=True)
class ContestRun:
    """One network, fold and seed under the conditions.

    Args:
        changes: keys of the recipe, ``features`` (a factor) or ``options.<name>`` of the network.
        planned: what the plans made of it, in hashes; see ``with_plan``.
    """

    __pydantic_config__ = RECORD_CONFIG

    conditions: Conditions
    network: str
    mixer: Mixer
    fold: int
    seed: int
    changes: Mapping[str, Any] = field(default_factory=dict)
    planned: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Hash of everything that decides the result, but for where the work folder lies."""
        conditions = dataclasses.replace(self.conditions, work=Path())
        return hash_values(dataclasses.replace(self, conditions=conditions))[:8]


@dataclass(frozen=True, kw_only=True)
class ContestResult:
    """What a run came to.

    Args:
        dice: case -> label -> Dice; None where neither mask has the label.
        operations: of one forward pass over a patch, scans included.
        seconds: of training.
        prediction_s: per validation case.
        memory_gb: most memory the process held while training.
    """

    __pydantic_config__ = RECORD_CONFIG

    key: str
    dice: dict[str, dict[str, float | None]]
    parameters: int
    operations: int
    steps: int
    seconds: float
    prediction_s: float
    memory_gb: float
    precision: str
    device: str


def with_plan(run: ContestRun) -> ContestRun:
    """Return the run with the hashes of what its plan, split and arrays are now.

    Raises:
        PlanError: the network is not planned, or does not fit the common patch.
        UsageError: a change of something that does not exist.
    """
    _, setup = prepare(run, Path())
    return dataclasses.replace(run, planned={**setup.identity, "arrays": setup.store_folder.name})


def read_result(folder: Path, key: str) -> ContestResult | None:
    """Return the result of a finished run, None when it has to be done."""
    if not (folder / RESULT_FILE).is_file():
        return None
    content = read_json(folder / RESULT_FILE, what="result", error=MedMambaError)
    result = from_plain(ContestResult, content, what=str(folder / RESULT_FILE), error=MedMambaError)
    return result if result.key == key else None


def run_here(
    run: ContestRun, folder: Path, say: Callable[[str], None] = lambda text: None
) -> ContestResult:
    """Do a run in this process, going on from its checkpoint if it was interrupted.

    Raises:
        PlanError: the network is not planned, or does not fit the common patch.
        TrainingError: training had to stop.
    """
    from medmamba.bundle import MODEL_FOLDER, save_bundle
    from medmamba.networks.memory import count_parameters, operations
    from medmamba.pipeline.validating import validate_cases
    from medmamba.pipeline.work import open_work
    from medmamba.training.checkpoint import prediction_weights
    from medmamba.training.run_files import LOG, read_log
    from medmamba.training.trainer import train_fold

    decided, setup = prepare(run, folder)
    result = train_fold(
        setup,
        resume=(folder / LOG).exists(),
        on_progress=lambda report: say(
            f"{run.network}:{run.mixer} seed {run.seed} epoch {report.epoch + 1}/{report.epochs} "
            f"loss {report.loss:+.3f} Dice of patches {report.dice:.3f} "
            f"left {report.remaining_s:.0f} s"
        ),
    )
    bundle = save_bundle(
        folder / MODEL_FOLDER,
        plan=decided,
        configuration=run.conditions.configuration,
        weights=[prediction_weights(result.latest)],
        folds=[run.fold],
        precision=result.precision,
        reference_case=False,
    )
    place, cases = open_work(run.conditions.work), setup.split.validation
    begun = time.monotonic()
    validate_cases(bundle, place, cases, folder, device=run.conditions.device, overlays=False)
    seconds = (time.monotonic() - begun) / len(cases)
    epochs = [row for row in read_log(folder / LOG) if row.get("kind") == "epoch"]
    found = ContestResult(
        key=run.key,
        dice=_dice_by_case(folder, bundle.plan.label_map.foreground),
        parameters=count_parameters(setup.network),
        operations=operations(setup.network),
        steps=result.iterations,
        seconds=round(result.elapsed_s, 2),
        prediction_s=round(seconds, 3),
        memory_gb=round(max(row["memory_gb"] for row in epochs), 3),
        precision=result.precision,
        device=_device(run.conditions.device),
    )
    write_atomic(folder / RESULT_FILE, to_json(found))
    return found


def prepare(run: ContestRun, folder: Path) -> "tuple[Plan, TrainingSetup]":
    """Return the plan of a run as its model carries it, and what it is trained with.

    Raises:
        PlanError: the network is not planned, or does not fit the common patch.
        UsageError: a change of something that does not exist.
    """
    from medmamba.pipeline.recipes import RecipeChanges, choose_recipe
    from medmamba.pipeline.training import find_split, masked_channels
    from medmamba.pipeline.work import choose_configuration, open_work
    from medmamba.training.trainer import TrainingSetup

    conditions = run.conditions
    place = open_work(conditions.work)
    frame = place.load_plan(conditions.frame)
    name = choose_configuration(frame, conditions.configuration)
    decided = place.load_plan(run.network)
    choose_configuration(decided, name)
    common, own = frame.configurations[name], decided.configurations[name]
    network = _network(own.network, run, common.grid.patch_size)
    planned = dataclasses.replace(
        own.training,
        batch_size=common.training.batch_size,
        batch_dice=common.training.batch_dice,
        cpu_batch_size=common.training.cpu_batch_size,
    )
    changes = RecipeChanges(
        recipe=conditions.recipe, epochs=conditions.epochs, iterations=conditions.iterations
    )
    recipe = choose_recipe(planned, changes, dimension=common.grid.dimension)
    own_changes: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in run.changes.items()
        if key != FEATURES and not key.startswith(OPTION)
    }
    unknown = sorted(set(own_changes) - {item.name for item in dataclasses.fields(recipe)})
    if unknown:
        raise UsageError(f"'{unknown[0]}': is no key of a recipe, '{FEATURES}' or '{OPTION}...'.")
    recipe = dataclasses.replace(recipe, **own_changes)
    branch = dataclasses.replace(common, network=network, training=recipe)
    setup = TrainingSetup(
        run_folder=folder,
        network=network,
        grid=common.grid,
        recipe=recipe,
        label_map=frame.label_map,
        store_folder=place.store(name, common),
        split=find_split(place, name, common, run.fold),
        device=conditions.device,
        precision=conditions.precision,
        seed=run.seed,
        max_time_s=conditions.max_time_s,
        outside_is_zero_channels=masked_channels(common),
    )
    return dataclasses.replace(frame, network=network.name, configurations={name: branch}), setup


def _network(planned: Any, run: ContestRun, patch_size: tuple[int, ...]) -> Any:
    from medmamba.networks.registry import find_network

    factor = float(run.changes.get(FEATURES, 1))
    options = {
        key.removeprefix(OPTION): value
        for key, value in run.changes.items()
        if key.startswith(OPTION)
    }
    network = dataclasses.replace(
        planned,
        mixer=run.mixer,
        patch_size=patch_size,
        features=tuple(max(1, round(width * factor)) for width in planned.features),
        options={**planned.options, **options},
    )
    multiple = find_network(network.name).divisor(network)
    if any(size % step for size, step in zip(patch_size, multiple, strict=True)):
        raise PlanError(
            f"network {network.name}: the common patch {list(patch_size)} (of "
            f"{run.conditions.frame}) is no multiple of {list(multiple)}. Name first a network "
            "whose patch fits all."
        )
    return network


def _dice_by_case(
    folder: Path, foreground: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[str, float | None]]:
    from medmamba.evaluation.scores import label_key
    from medmamba.pipeline.validating import VALIDATION_FOLDER

    path = folder / VALIDATION_FOLDER / "summary.json"
    summary = read_json(path, what="scores", error=TrainingError)
    found = {}
    for case in summary["metric_per_case"]:
        name = Path(case["reference_file"]).name
        found[name.partition(".")[0]] = {
            label: case["metrics"][label_key(values)]["Dice"]
            for label, values in foreground.items()
        }
    return found


def _device(wanted: str) -> str:
    from medmamba.training.precision import describe_cpu, resolve_device

    device = resolve_device(wanted)
    return f"CPU ({describe_cpu()})" if device.type == "cpu" else str(device)
