"""select(): the network or pair of networks, and the postprocessing, that cross-validation favours.

Every candidate has predicted each training case with the fold that did not train on it; the best
mean Dice over all of them wins, as in nnU-Net. The result is one bundle.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from medmamba.bundle import Bundle, load_bundle, save_bundle, save_ensemble
from medmamba.dataset import read_splits
from medmamba.errors import PlanError, UsageError
from medmamba.evaluation.postprocessing import determine_postprocessing
from medmamba.evaluation.report import evaluate_folder, write_evaluation
from medmamba.evaluation.scores import Evaluation
from medmamba.files import to_json, write_atomic
from medmamba.pipeline.predictors import make_predictor
from medmamba.pipeline.references import find_references
from medmamba.pipeline.validating import (
    VALIDATION_FOLDER,
    StoredCases,
    mean_dice,
    validate_cases,
    write_mask,
)
from medmamba.pipeline.work import Work, open_work

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One network and configuration, or a pair of them, with its cross-validated scores.

    Args:
        models: per member, one bundle a fold.
        masks: folder of the masks of all training cases.
    """

    name: str
    models: tuple[tuple[Bundle, ...], ...]
    masks: Path
    evaluation: Evaluation

    @property
    def dice(self) -> float:
        """Mean over labels and cases."""
        return self.evaluation.foreground_dice


@dataclass(frozen=True, kw_only=True)
class SelectOutcome:
    """What was chosen and why.

    Args:
        candidates: all that were complete, the best first.
        incomplete: run and what it lacks.
        steps: label values whose largest component alone is kept, in order.
        dice_after: of the best, after postprocessing.
    """

    bundle: Bundle
    candidates: tuple[Candidate, ...]
    incomplete: tuple[tuple[str, str], ...]
    steps: tuple[tuple[int, ...], ...]
    dice_after: float

    def to_plain(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "model": str(self.bundle.folder),
            "chosen": self.candidates[0].name,
            "candidates": [
                {"name": one.name, "dice": one.dice, "by_label": mean_dice(one.evaluation)}
                for one in self.candidates
            ],
            "incomplete": dict(self.incomplete),
            "keep_largest_component_of": [list(step) for step in self.steps],
            "dice_after_postprocessing": self.dice_after,
        }


def select(
    work: Path | str,
    *,
    networks: Sequence[str] = (),
    configurations: Sequence[str] = (),
    ensembles: bool = True,
    output: Path | str | None = None,
    device: str = "auto",
    on_message: Say | None = None,
) -> SelectOutcome:
    """Choose by cross-validated Dice, and write one bundle to predict with.

    Args:
        work: folder in which all folds of the candidates are trained.
        networks: to choose from; all that are trained when empty.
        configurations: to choose from; all when empty.
        ensembles: also try every pair.
        output: the bundle; ``WORK/bundles/<name of the best>`` when None.
        device: for validations that are missing, and for pairs.
        on_message: called with what is done.

    Raises:
        PlanError: no candidate has all folds; says what each lacks.
        BundleError, SecurityError: a model is damaged.
    """
    say = on_message or (lambda text: None)
    place = open_work(Path(work))
    if not place.splits.is_file():
        raise UsageError(f"{place.folder}: too few cases for folds; there is nothing to select by.")
    splits = read_splits(place.splits)
    singles, incomplete = [], []
    for network, configuration in _trained(place, networks, configurations):
        folders = [place.run(network, configuration, k) for k in range(len(splits))]
        missing = [str(k) for k, f in enumerate(folders) if not (f / "model").is_dir()]
        if missing:
            lack = f"fold {', '.join(missing)} not trained"
            incomplete.append((f"{network} {configuration}", lack))
            continue
        say(f"{network} {configuration}: gathering validation masks of {len(splits)} folds")
        models = tuple(load_bundle(folder) for folder in folders)
        for model, split, folder in zip(models, splits, folders, strict=True):
            validate_cases(model, place, split.validation, folder, device=device)
        masks = _gather(place, f"{network}-{configuration}", folders)
        singles.append(_candidate(place, f"{network} {configuration}", (models,), masks))
    if not singles:
        lacks = "; ".join(f"{name}: {lack}" for name, lack in incomplete) or "nothing is trained"
        raise PlanError(
            f"{place.folder}: no network has all {len(splits)} folds ({lacks}). Train them: "
            f"`medmamba train {place.folder} --network NAME --folds all`.",
            code="E_FOLDS_MISSING",
        )
    pairs = [
        _pair(place, first, second, splits, device, say)
        for first, second in combinations(singles if ensembles else (), 2)
    ]
    # Sorting is stable: of equal ones a single network wins over a pair.
    ranked = sorted([*singles, *pairs], key=lambda one: -one.dice)
    say(f"postprocessing of {ranked[0].name}")
    return _finish(place, ranked, tuple(incomplete), output)


def _trained(
    place: Work, networks: Sequence[str], configurations: Sequence[str]
) -> list[tuple[str, str]]:
    found = sorted((path.parent.name, path.name) for path in place.folder.glob("runs/*/*"))
    unknown = sorted(set(networks) - {network for network, _ in found})
    if unknown:
        raise UsageError(
            f"network '{unknown[0]}' is not trained in {place.folder}; "
            f"trained are {', '.join(sorted({n for n, _ in found})) or 'none'}."
        )
    return [
        (network, configuration)
        for network, configuration in found
        if (not networks or network in networks)
        and (not configurations or configuration in configurations)
    ]


def _gather(place: Work, name: str, runs: Sequence[Path]) -> Path:
    """Copy the validation masks of all folds into one folder, made anew."""
    folder = place.folder / "selection" / name / "masks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for run in runs:
        for mask in (run / VALIDATION_FOLDER).iterdir():
            if mask.is_file() and mask.suffix not in (".json", ".csv"):
                shutil.copy2(mask, folder)
    return folder


def _candidate(
    place: Work, name: str, models: tuple[tuple[Bundle, ...], ...], masks: Path
) -> Candidate:
    evaluation = evaluate_folder(
        place.references, masks, label_map=models[0][0].plan.label_map, allow_missing=True
    )
    write_evaluation(masks, evaluation)
    return Candidate(name=name, models=models, masks=masks, evaluation=evaluation)


def _pair(
    place: Work,
    first: Candidate,
    second: Candidate,
    splits: Sequence[Any],
    device: str,
    say: Say,
) -> Candidate:
    """Predict every case with both members of its fold, as ``predict`` will."""
    from medmamba.inference.ensemble import EnsemblePredictor

    name = f"{first.name} + {second.name}"
    say(f"{name}: predicting")
    folder = place.folder / "selection" / name.replace(" ", "-") / "masks"
    shutil.rmtree(folder, ignore_errors=True)
    references = find_references(place, [c for split in splits for c in split.validation])
    models = (first.models[0], second.models[0])
    for fold, split in enumerate(splits):
        members = [make_predictor(model[fold], device=device).members[0] for model in models]
        stores = [StoredCases.of(place, model[fold]) for model in models]
        both = EnsemblePredictor(members)
        for case in split.validation:
            prepared, *others = (store.prepare(case) for store in stores)
            labels = both.restore(both.infer(replace(prepared, siblings=tuple(others)))).labels
            write_mask(folder, case, labels, references[case])
    return _candidate(place, name, models, folder)


def _finish(
    place: Work,
    ranked: Sequence[Candidate],
    incomplete: tuple[tuple[str, str], ...],
    output: Path | str | None,
) -> SelectOutcome:
    best = ranked[0]
    choice = determine_postprocessing(
        place.references, best.masks, label_map=best.models[0][0].plan.label_map
    )
    steps = choice.postprocessing.steps
    slug = best.name.replace(" ", "-")
    folder = Path(output) if output is not None else place.folder / "bundles" / slug
    folder.parent.mkdir(parents=True, exist_ok=True)
    cleaned = choice.after.foreground_dice
    scores = {
        "cross_validated_dice": {**mean_dice(choice.after), "foreground": cleaned},
        "before_postprocessing": best.dice,
        "cases": len(best.evaluation.cases),
        "candidates": {one.name: one.dice for one in ranked},
    }
    plain = choice.to_plain() if steps else None
    if len(best.models) == 1:
        bundle = _save_folds(folder, best.models[0], scores, plain)
    else:
        parts = place.folder / "selection" / slug / "members"
        members = [parts / str(number) for number in range(len(best.models))]
        for part, models in zip(members, best.models, strict=True):
            _save_folds(part, models, {}, None)
        bundle = save_ensemble(
            folder,
            members,
            name=f"{best.models[0][0].plan.dataset_name} {best.name}",
            training={"members": [_provenance(models) for models in best.models]},
            scores=scores,
            postprocessing=plain,
        )
    outcome = SelectOutcome(
        bundle=bundle,
        candidates=tuple(ranked),
        incomplete=incomplete,
        steps=steps,
        dice_after=cleaned,
    )
    write_atomic(place.folder / "selection" / "selection.json", to_json(outcome.to_plain()))
    return outcome


def _save_folds(
    folder: Path,
    models: Sequence[Bundle],
    scores: dict[str, Any],
    postprocessing: dict[str, Any] | None,
) -> Bundle:
    from medmamba.networks.weights import load_weights

    first = models[0]
    entries = [(model, entry) for model in models for entry in model.manifest.weights]
    earlier = [(model, entry) for model in models for entry in model.manifest.previous_weights]
    folder.parent.mkdir(parents=True, exist_ok=True)
    return save_bundle(
        folder,
        plan=first.plan,
        configuration=first.manifest.configuration,
        weights=[load_weights(model.folder / entry.file) for model, entry in entries],
        previous_weights=[load_weights(model.folder / entry.file) for model, entry in earlier],
        folds=[fold for model in models for fold in model.folds],
        precision=first.manifest.precision,
        training=_provenance(models),
        scores=scores,
        postprocessing=postprocessing,
        usual_volumes=first.manifest.usual_volumes,
        orientation=first.manifest.orientation,
    )


def _provenance(models: Sequence[Bundle]) -> dict[str, Any]:
    return {
        f"fold {', '.join(model.folds)}": {**model.manifest.training, "model_sha256": model.sha256}
        for model in models
    }
