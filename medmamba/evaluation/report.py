"""Scores of a folder of predictions, and the files that hold them.

Reads masks through ``medmamba.io`` and composes ``overlap`` and ``surface`` into ``scores``; prints
nothing.
"""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba.errors import DatasetError, GeometryError, InputError
from medmamba.evaluation.overlap import count_overlap, region_mask
from medmamba.evaluation.scores import (
    DEFAULT_TOLERANCE_MM,
    METRICS,
    CaseScores,
    Evaluation,
    LabelScores,
)
from medmamba.evaluation.surface import score_surfaces, union_box
from medmamba.files import to_csv, to_json, write_atomic
from medmamba.io import TRAINING_GATE, read_labels, suffix_of
from medmamba.labels import LabelMap
from medmamba.volume import Geometry

logger = logging.getLogger(__name__)

SUMMARY_FILE = "summary.json"

NAMES_SHOWN = 5
"""Cases named in a message; the rest are counted."""


def evaluate_folder(
    reference: Path,
    prediction: Path,
    *,
    label_map: LabelMap,
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
    allow_missing: bool = False,
    workers: int | None = None,
    on_case: Callable[[CaseScores], None] | None = None,
) -> Evaluation:
    """Score every prediction against the reference mask of the same name.

    Args:
        reference: folder of masks, or one mask.
        prediction: folder of masks, or one mask.
        label_map: what to score.
        tolerance_mm: tolerance of the NSD.
        allow_missing: score what is there although predictions are missing.
        workers: threads; one per processor when omitted.
        on_case: called as cases are scored, in order of their names.

    Raises:
        DatasetError: no mask found, none of the names agree, or predictions are missing.
        GeometryError: a prediction is on another grid than its reference.
        InputError: a mask cannot be read.
    """
    references, predictions = find_masks(reference), find_masks(prediction)
    if reference.is_file() and prediction.is_file():
        predictions = dict(zip(references, predictions.values(), strict=True))
    missing = tuple(sorted(references.keys() - predictions.keys()))
    unknown = tuple(sorted(predictions.keys() - references.keys()))
    _require_pairs(references, prediction, missing, allow_missing=allow_missing)
    for kind, names in (("prediction", missing), ("reference", unknown)):
        if names:
            logger.warning("%d cases have no %s: %s", len(names), kind, _listed(names))

    def score(name: str) -> CaseScores:
        return evaluate_case(
            references[name],
            predictions[name],
            label_map=label_map,
            case_id=name,
            tolerance_mm=tolerance_mm,
        )

    return Evaluation(
        label_map=label_map,
        cases=_in_threads(score, sorted(references.keys() & predictions.keys()), workers, on_case),
        missing=missing,
        unknown=unknown,
        tolerance_mm=tolerance_mm,
    )


def _in_threads(
    score: Callable[[str], CaseScores],
    names: list[str],
    workers: int | None,
    on_case: Callable[[CaseScores], None] | None,
) -> tuple[CaseScores, ...]:
    scored = []
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        futures = [pool.submit(score, name) for name in names]
        try:
            for future in futures:
                scored.append(future.result())
                if on_case is not None:
                    on_case(scored[-1])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return tuple(scored)


def _require_pairs(
    references: dict[str, Path],
    prediction: Path,
    missing: tuple[str, ...],
    *,
    allow_missing: bool,
) -> None:
    if len(missing) == len(references):
        raise DatasetError(
            f"{prediction}: no mask is named like a reference (looked for {_listed(missing)}). "
            "Check the two folders.",
            code="E_EVAL_MISSING",
        )
    if missing and not allow_missing:
        raise DatasetError(
            f"{prediction}: {len(missing)} of {len(references)} references have no prediction "
            f"({_listed(missing)}). Predict them, or allow missing predictions.",
            code="E_EVAL_MISSING",
        )


def evaluate_case(
    reference: Path,
    prediction: Path,
    *,
    label_map: LabelMap,
    case_id: str,
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
) -> CaseScores:
    """Score one prediction.

    Raises:
        GeometryError: the two are on different grids; names both.
        InputError: one of them cannot be read.
    """
    truth, _ = read_labels(reference, gate=TRAINING_GATE)
    guess, _ = read_labels(prediction, gate=TRAINING_GATE)
    if not truth.geometry.same_grid_as(guess.geometry):
        raise GeometryError(
            f"case {case_id}: {prediction} and {reference} are on different grids "
            f"(shape {guess.geometry.shape} and {truth.geometry.shape}, spacing "
            f"{_rounded(guess.geometry)} and {_rounded(truth.geometry)} mm). "
            "Predict on the grid of the reference, or resample one of them.",
            code="E_GEOM_GRID",
        )
    labels = score_labels(
        truth.array[0],
        guess.array[0],
        label_map=label_map,
        geometry=truth.geometry,
        tolerance_mm=tolerance_mm,
    )
    return CaseScores(
        case_id=case_id,
        reference_file=str(reference),
        prediction_file=str(prediction),
        labels=labels,
    )


def score_labels(
    reference: NDArray[Any],
    prediction: NDArray[Any],
    *,
    label_map: LabelMap,
    geometry: Geometry,
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
) -> dict[str, LabelScores]:
    """Score every label and region of two label arrays (D, H, W) on the same grid."""
    voxels = reference.size
    if label_map.ignore_value is not None:
        ignored = reference == label_map.ignore_value
        voxels -= int(np.count_nonzero(ignored))
        reference = np.where(ignored, 0, reference)
        prediction = np.where(ignored, 0, prediction)
    box = tuple(slice(*pair) for pair in union_box(reference != 0, prediction != 0))
    truth, guess = reference[box], prediction[box]
    scores = {}
    for name, values in label_map.foreground.items():
        masks = region_mask(truth, values), region_mask(guess, values)
        scores[name] = LabelScores(
            overlap=count_overlap(*masks, voxels=voxels),
            surface=score_surfaces(
                *masks, spacing_mm=geometry.spacing_mm, tolerance_mm=tolerance_mm
            ),
            voxel_volume_ml=geometry.voxel_volume_ml,
        )
    return scores


def write_evaluation(folder: Path, evaluation: Evaluation) -> tuple[Path, Path]:
    """Write ``summary.json`` and ``metrics.csv``, and return their paths.

    Raises:
        EnvironmentFault: the folder cannot be written.
    """
    rows = [
        [case.case_id, name, *(scores.metrics()[metric] for metric in METRICS)]
        for case in evaluation.cases
        for name, scores in case.labels.items()
    ]
    summary, table = folder / SUMMARY_FILE, folder / "metrics.csv"
    write_atomic(summary, to_json(_finite(evaluation.summary())))
    write_atomic(table, to_csv(["case", "label", *METRICS], rows))
    return summary, table


def find_masks(place: Path) -> dict[str, Path]:
    """Return masks by case id, from a folder or a single file.

    Raises:
        DatasetError: there is none, or two files belong to one case.
    """
    if not place.exists():
        raise DatasetError(f"{place}: does not exist. Give a folder of masks, or one mask.")
    found: dict[str, Path] = {}
    for path in [place] if place.is_file() else sorted(place.iterdir()):
        try:
            suffix = suffix_of(path)
        except InputError:
            if path == place:
                raise
            continue
        if path.name.startswith(".") or not path.is_file():
            continue
        name = path.name[: -len(suffix)]
        if name in found:
            raise DatasetError(
                f"{place}: {found[name].name} and {path.name} are both masks of case {name}. "
                "Keep one of them."
            )
        found[name] = path
    if not found:
        raise DatasetError(f"{place}: holds no masks. Files of masks end in .nii.gz and the like.")
    return found


def _rounded(geometry: Geometry) -> tuple[float, ...]:
    return tuple(round(value, 4) for value in geometry.spacing_mm)


def _finite(value: object) -> object:
    """JSON has no infinity: it becomes null, like NaN."""
    if isinstance(value, float) and not np.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return f"{shown} and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else shown
