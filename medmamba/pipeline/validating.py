"""Final validation: masks of whole validation cases, their scores, and pictures of some of them.

Cases come from the store, are predicted by sliding window and restored to the grid of their
label image, so that scores are those of the masks a user would get.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba.bundle import Bundle
from medmamba.errors import MedMambaError
from medmamba.evaluation.report import evaluate_case, write_evaluation
from medmamba.evaluation.scores import CaseScores, Evaluation
from medmamba.files import RECORD_CONFIG, from_plain, read_json, to_json, write_atomic
from medmamba.io import TRAINING_GATE, read_labels, suffix_of, write_labels
from medmamba.pipeline.predictors import make_predictor
from medmamba.pipeline.references import find_references
from medmamba.pipeline.work import Work
from medmamba.preprocessing.pipeline import PreprocessedCase
from medmamba.preprocessing.restore import on_working_grid, working_geometry
from medmamba.preprocessing.store import CaseStore
from medmamba.volume import Volume

VALIDATION_FOLDER = "validation"
RECORD_FILE = "validation.json"
OVERLAYS_FOLDER = "overlays"

OnValidated = Callable[[CaseScores, int, int], None]
"""Called with (scores of a case, cases done, cases in all)."""


@dataclass(frozen=True, kw_only=True)
class ValidationRecord:
    """What a final validation was done with, written last; it makes the validation exist.

    Args:
        model_sha256: of the model that predicted.
        mirror: whether flips were averaged.
        cases: that were predicted.
        dice: by label, and "foreground" for their mean.
        seconds: of prediction and scoring.
    """

    __pydantic_config__ = RECORD_CONFIG

    model_sha256: str
    mirror: bool
    cases: tuple[str, ...]
    dice: dict[str, float | None]
    seconds: float

    def covers(self, bundle: Bundle, cases: Sequence[str], *, mirror: bool) -> bool:
        """Whether these cases were predicted with this model, flips averaged or not."""
        same = (self.model_sha256, self.mirror) == (bundle.sha256, mirror)
        return same and set(cases) <= set(self.cases)


def validate_cases(
    bundle: Bundle,
    work: Work,
    cases: Sequence[str],
    run_folder: Path,
    *,
    device: str = "auto",
    mirror: bool = False,
    overlays: bool = True,
    on_case: OnValidated | None = None,
) -> ValidationRecord:
    """Predict and score cases with a model; nothing is done twice.

    Writes ``validation/<case>`` masks with nnU-Net's ``summary.json`` and ``metrics.csv``,
    ``validation/overlays/*.png`` of the worst, the median and the best case, and
    ``validation.json``.

    Raises:
        PlanError: label images are missing from the work folder.
        DatasetError: a case is not preprocessed.
        EnvironmentFault: memory or disk are full.
    """
    old = read_validation(run_folder)
    if old is not None and old.covers(bundle, cases, mirror=mirror):
        return old
    begun = time.monotonic()
    references = find_references(work, cases)
    stored = StoredCases.of(work, bundle)
    predictor = make_predictor(bundle, mirror=mirror, device=device)
    folder = run_folder / VALIDATION_FOLDER
    (run_folder / RECORD_FILE).unlink(missing_ok=True)
    scored = []
    for case in cases:
        labels = predictor.restore(predictor.infer(stored.prepare(case))).labels
        mask = write_mask(folder, case, labels, references[case])
        scores = evaluate_case(
            references[case], mask, label_map=bundle.plan.label_map, case_id=case
        )
        scored.append(scores)
        if on_case is not None:
            on_case(scores, len(scored), len(cases))
    evaluation = Evaluation(label_map=bundle.plan.label_map, cases=tuple(scored))
    write_evaluation(folder, evaluation)
    if overlays:
        draw_overlays(folder / OVERLAYS_FOLDER, evaluation, stored.fine, bundle)
    record = ValidationRecord(
        model_sha256=bundle.sha256,
        mirror=mirror,
        cases=tuple(cases),
        dice={**mean_dice(evaluation), "foreground": evaluation.foreground_dice},
        seconds=round(time.monotonic() - begun, 3),
    )
    write_atomic(run_folder / RECORD_FILE, to_json(record))
    return record


def read_validation(run_folder: Path) -> ValidationRecord | None:
    """Return the record of a finished validation, None where there is none to trust."""
    path = run_folder / RECORD_FILE
    if not path.is_file():
        return None
    try:
        content = read_json(path, what="validation", error=MedMambaError)
        return from_plain(ValidationRecord, content, what=str(path), error=MedMambaError)
    except MedMambaError:
        return None


@dataclass(frozen=True)
class StoredCases:
    """Preprocessed cases as a model takes them; those of a cascade on both of its grids."""

    fine: CaseStore
    coarse: CaseStore | None

    @classmethod
    def of(cls, work: Work, bundle: Bundle) -> "StoredCases":
        """Those of a work folder that a model of it needs."""
        fine = CaseStore(work.store(bundle.manifest.configuration, bundle.configuration))
        stage, first = bundle.configuration.previous_stage, bundle.previous
        if stage is None or first is None:
            return cls(fine, None)
        return cls(fine, CaseStore(work.store(stage, first)))

    def prepare(self, case_id: str) -> PreprocessedCase:
        """Read a case as prediction prepares it from its raw image.

        Raises:
            DatasetError: it is not preprocessed.
        """
        coarse = None if self.coarse is None else _read(self.coarse, case_id)
        return replace(_read(self.fine, case_id), coarse=coarse)


def _read(store: CaseStore, case_id: str) -> PreprocessedCase:
    stored = store.open(case_id)
    return PreprocessedCase(
        data=stored.data[:], labels=None, record=stored.record, class_locations={}
    )


def write_mask(folder: Path, case_id: str, labels: NDArray[Any], reference: Path) -> Path:
    """Write labels on the grid of a label image, in its format, and return where."""
    path = folder / f"{case_id}{suffix_of(reference)}"
    _, header = read_labels(reference, gate=TRAINING_GATE)
    write_labels(path, labels, header)
    return path


def mean_dice(evaluation: Evaluation) -> dict[str, float]:
    """Return the mean Dice of each label over the cases where it is defined."""
    return {name: evaluation.mean(name)["Dice"] for name in evaluation.label_map.foreground}


def draw_overlays(
    folder: Path, evaluation: Evaluation, store: CaseStore, bundle: Bundle
) -> tuple[Path, ...]:
    """Draw image, reference and prediction of the worst, the median and the best case.

    They are drawn on the working grid, from what the network saw.
    """
    from medmamba.evaluation.figures import overlay_figure

    ranked = sorted(evaluation.cases, key=lambda case: case.dice)
    picks = {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]}
    drawn = []
    for kind, case in dict(reversed(picks.items())).items():
        stored = store.open(case.case_id)
        path = folder / f"{kind}_{case.case_id}.png"
        mask, _ = read_labels(Path(case.prediction_file), gate=TRAINING_GATE)
        overlay_figure(
            Volume(array=stored.data[:1], geometry=working_geometry(stored.record)),
            None if stored.labels is None else np.maximum(stored.labels[:], 0),
            on_working_grid(mask.array[0], stored.record),
            bundle.plan.label_map,
            path,
            title=f"{case.case_id}: {kind} of {len(ranked)} validation cases, "
            f"mean Dice {case.dice:.3f}",
        )
        drawn.append(path)
    return tuple(drawn)
