"""What the first stage of a cascade says of every case that the second is trained on.

A case is predicted by the fold that did not train on it, so that the second stage learns from
labels as good as those it will be given for new cases.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medmamba.bundle import MODEL_FOLDER, Bundle, load_bundle, load_networks
from medmamba.dataset import Split, read_splits
from medmamba.errors import PlanError
from medmamba.files import hash_values
from medmamba.pipeline.work import Work
from medmamba.plans.plan import Plan
from medmamba.preprocessing.pipeline import PreprocessedCase, UndoRecord
from medmamba.preprocessing.previous import between_grids
from medmamba.preprocessing.store import CaseStore, PreviousStore

if TYPE_CHECKING:
    from medmamba.inference.predictor import Predictor


@dataclass(frozen=True, kw_only=True)
class PreviousStage:
    """The first stage as one run of the second needs it.

    Args:
        configuration: of the first stage.
        folder: where its labels are, or will be.
        models: one bundle per fold it was trained in, as far as this run needs it.
        fold_of: case -> fold of the first stage that predicts it.
        fold: of the first stage that predicts new cases together with this run.
    """

    configuration: str
    folder: Path
    models: Mapping[int | str, Bundle]
    fold_of: Mapping[str, int | str]
    fold: int | str

    @property
    def identity(self) -> str:
        """Hash of what the labels are made by."""
        return hash_values({name: self.key(name) for name in self.fold_of})

    @property
    def model(self) -> Bundle:
        """The first stage of the model that this run becomes."""
        return self.models[self.fold]

    def key(self, case_id: str) -> str:
        """Return the hash of the model that predicts a case."""
        return self.models[self.fold_of[case_id]].sha256


def find_previous_stage(
    place: Work, decided: Plan, configuration: str, fold: int | str, split: Split
) -> PreviousStage | None:
    """Find the trained first stage of a cascade; None for any other configuration.

    Raises:
        PlanError: folds of the first stage are not trained, naming the commands that do.
        BundleError, SecurityError: a model of it cannot be used.
    """
    stage = decided.configurations[configuration].previous_stage
    if stage is None:
        return None
    cases = sorted({*split.train, *split.validation})
    fold_of = _folds_by_case(place, fold, cases)
    needed = sorted({fold, *fold_of.values()}, key=str)
    folders = {k: place.run(decided.network, stage, k) / MODEL_FOLDER for k in needed}
    missing = [k for k, folder in folders.items() if not folder.is_dir()]
    if missing:
        raise PlanError(
            f"configuration '{configuration}' is the second stage of a cascade and needs its first "
            f"one, '{stage}', trained in fold {', '.join(map(str, missing))}: run `medmamba train "
            f"{place.folder} --network {decided.network} -c {stage} --fold {missing[0]}`"
            f"{' and so on' if len(missing) > 1 else ''}.",
            code="E_PREVIOUS_STAGE",
        )
    return PreviousStage(
        configuration=stage,
        folder=place.previous(decided.network, configuration, fold),
        models={k: load_bundle(folder) for k, folder in folders.items()},
        fold_of=fold_of,
        fold=fold,
    )


def _folds_by_case(place: Work, fold: int | str, cases: Sequence[str]) -> dict[str, int | str]:
    if fold == "all":
        # Every case trained it; there is no fold that has not seen it.
        return dict.fromkeys(cases, "all")
    held_out = {
        case: number
        for number, split in enumerate(read_splits(place.splits))
        for case in split.validation
    }
    return {case: held_out.get(case, fold) for case in cases}


def predict_previous_stage(
    place: Work,
    decided: Plan,
    configuration: str,
    previous: PreviousStage,
    *,
    device: str,
    on_message: Callable[[str], None] | None = None,
) -> None:
    """Predict what is not there yet, case by case; an interrupted run goes on.

    Raises:
        PlanError: cases are not preprocessed for the first stage.
        EnvironmentFault: memory or disk are full.
    """
    fine, coarse = (
        decided.configurations[name] for name in (configuration, previous.configuration)
    )
    target = PreviousStore(previous.folder)
    todo = [case for case in previous.fold_of if not target.has(case, previous.key(case))]
    if not todo:
        return
    if on_message is not None:
        on_message(f"first stage {previous.configuration}: predicting {len(todo)} training cases")
    fine_store = CaseStore(place.store(configuration, fine))
    coarse_store = CaseStore(place.store(previous.configuration, coarse))
    _require_cases(place, decided.network, previous.configuration, coarse_store, todo)
    for fold, bundle in previous.models.items():
        mine = [case for case in todo if previous.fold_of[case] == fold]
        predictor = _predictor(bundle, device) if mine else None
        for case in mine:
            assert predictor is not None
            record = fine_store.open(case).record
            labels = _predict(predictor, coarse_store, case, record)
            target.write(case, labels, key=previous.key(case), patch_size=fine.grid.patch_size)


def _predict(
    predictor: "Predictor",
    store: CaseStore,
    case_id: str,
    fine: UndoRecord,
) -> NDArray[np.unsignedinteger[Any]]:
    stored = store.open(case_id)
    prepared = PreprocessedCase(
        data=stored.data[:], labels=None, record=stored.record, class_locations={}
    )
    inferred = predictor.infer(prepared, onto=between_grids(stored.record, fine))
    return predictor.restore(inferred).labels


def _predictor(bundle: Bundle, device: str) -> "Predictor":
    from medmamba.inference.predictor import PredictionSettings, Predictor
    from medmamba.training.precision import choose_precision, has_native_bf16, resolve_device

    branch, place = bundle.configuration, resolve_device(device)
    reduced = bundle.manifest.precision != "fp32" and has_native_bf16(place)
    settings = PredictionSettings(
        device=place,
        precision=choose_precision(place, "auto") if reduced else "fp32",
        features=branch.network.features[0],
    )
    return Predictor(
        load_networks(bundle),
        grid=branch.grid,
        preprocessing=branch.preprocessing,
        label_map=bundle.plan.label_map,
        settings=settings,
    )


def _require_cases(
    place: Work, network: str, configuration: str, store: CaseStore, cases: Sequence[str]
) -> None:
    missing = sorted(set(cases) - set(store.case_ids()))
    if missing:
        raise PlanError(
            f"{store.folder}: {len(missing)} cases are not preprocessed for '{configuration}' "
            f"({', '.join(missing[:3])}). Run `medmamba plan DATASET -o {place.folder} --network "
            f"{network} -c {configuration}`."
        )
