"""evaluate(): score a folder of masks and write the scores."""

import logging
from pathlib import Path

import numpy as np

from medmamba.dataset import read_label_map
from medmamba.errors import DatasetError, UsageError
from medmamba.evaluation.report import (
    SUMMARY_FILE,
    evaluate_folder,
    find_masks,
    write_evaluation,
)
from medmamba.evaluation.scores import DEFAULT_TOLERANCE_MM, Evaluation
from medmamba.inference.records import read_record
from medmamba.io import TRAINING_GATE, read_labels
from medmamba.labels import BACKGROUND_NAME, LabelMap

logger = logging.getLogger(__name__)


def evaluate(
    reference: Path | str,
    prediction: Path | str,
    *,
    dataset_json: Path | str | None = None,
    output: Path | str | None = None,
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
    allow_missing: bool = False,
    workers: int | None = None,
) -> Evaluation:
    """Score masks against references; write ``summary.json`` and ``metrics.csv``.

    Args:
        reference: folder of label images, or one.
        prediction: folder of masks with the same names, or one.
        dataset_json: what label values mean. When None, a dataset.json in the folder of the
            predictions, of the references, or above those is used; without one, every value that
            occurs in the references is a label of its own.
        output: folder for the two files; beside the predictions when None.
        tolerance_mm: of the normalised surface distance.
        allow_missing: score what is there although predictions are missing.
        workers: threads; one per processor when None.

    Raises:
        DatasetError: no masks, missing predictions, or an unusable dataset.json.
        GeometryError: a prediction is on another grid than its reference.
        InputError: a mask cannot be read.
        EnvironmentFault: the scores cannot be written.
        UsageError: they would replace the record of a case that is called summary.
    """
    truth, guess = Path(reference), Path(prediction)
    folder = Path(output) if output is not None else _folder(guess)
    if read_record(folder / SUMMARY_FILE) is not None:
        raise UsageError(
            f"{folder / SUMMARY_FILE}: is the record of a case, which scores would replace. "
            "Name another folder for them with --output."
        )
    description = (
        Path(dataset_json) if dataset_json is not None else _find_description(truth, guess)
    )
    label_map = read_label_map(description) if description else _labels_found(truth)
    evaluation = evaluate_folder(
        truth,
        guess,
        label_map=label_map,
        tolerance_mm=tolerance_mm,
        allow_missing=allow_missing,
        workers=workers,
    )
    write_evaluation(folder, evaluation)
    return evaluation


def _find_description(reference: Path, prediction: Path) -> Path | None:
    folders = (_folder(prediction), _folder(reference), _folder(reference).resolve().parent)
    for folder in folders:
        if (folder / "dataset.json").is_file():
            return folder / "dataset.json"
    return None


def _folder(place: Path) -> Path:
    return place.parent if place.is_file() else place


def _labels_found(reference: Path) -> LabelMap:
    values: set[int] = set()
    for path in find_masks(reference).values():
        labels, _ = read_labels(path, gate=TRAINING_GATE)
        values.update(int(value) for value in np.unique(labels.array))
    foreground = sorted(values - {0})
    if not foreground:
        raise DatasetError(
            f"{reference}: the references hold no label but 0; nothing can be scored."
        )
    logger.warning("no dataset.json found: scoring the values %s of the references", foreground)
    named = {f"label {value}": (value,) for value in foreground}
    return LabelMap(values={BACKGROUND_NAME: (0,), **named})
