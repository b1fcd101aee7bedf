"""Removing islands where that helps on validation cases, and remembering the choice as JSON.

nnU-Net's rule: keep the largest component of all foreground together if the mean Dice rises and no
label falls; then of each label alone if its own Dice rises. The file is nnU-Net's
``postprocessing.json``; its pickled twin is never read.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba.errors import PlanError
from medmamba.evaluation.components import keep_largest_component
from medmamba.evaluation.report import evaluate_folder, find_masks
from medmamba.evaluation.scores import Evaluation
from medmamba.files import read_json, to_json, write_atomic
from medmamba.io import TRAINING_GATE, read_labels, write_labels
from medmamba.labels import LabelMap

LARGEST_COMPONENT = "remove_all_but_largest_component_from_segmentation"
"""nnU-Net's name of the only step there is."""


@dataclass(frozen=True, kw_only=True)
class Postprocessing:
    """Steps in order; each keeps the largest component of its label values taken together."""

    steps: tuple[tuple[int, ...], ...] = ()

    def apply(self, labels: NDArray[np.integer]) -> NDArray[np.integer]:
        """Return the cleaned label array."""
        for values in self.steps:
            labels = keep_largest_component(labels, values)
        return labels


@dataclass(frozen=True, kw_only=True)
class PostprocessingChoice:
    """What was chosen, and the scores before and after."""

    postprocessing: Postprocessing
    before: Evaluation
    after: Evaluation

    def to_plain(self) -> dict[str, Any]:
        """Return the content of nnU-Net's ``postprocessing.json``."""
        steps = self.postprocessing.steps
        return {
            "input_folder": _means(self.before),
            "postprocessed": _means(self.after),
            "postprocessing_fns": [LARGEST_COMPONENT] * len(steps),
            "postprocessing_kwargs": [
                {"labels_or_regions": step[0] if len(step) == 1 else list(step)} for step in steps
            ],
        }


def determine_postprocessing(
    reference: Path, prediction: Path, *, label_map: LabelMap, workers: int | None = None
) -> PostprocessingChoice:
    """Choose the steps that raise the Dice on the predictions of validation cases.

    Raises:
        DatasetError: the folders do not hold the same cases.
        GeometryError: a prediction is on another grid than its reference.
    """

    def score(folder: Path) -> Evaluation:
        return evaluate_folder(
            reference, folder, label_map=label_map, allow_missing=True, workers=workers
        )

    before = best = score(prediction)
    chosen = Postprocessing()
    regions = tuple(label_map.foreground.items())
    everything = tuple(sorted({value for _, values in regions for value in values}))
    with tempfile.TemporaryDirectory() as scratch:
        candidate = Postprocessing(steps=(everything,))
        found = score(apply_to_folder(candidate, prediction, Path(scratch) / "all"))
        if _rises_everywhere(found, best):
            chosen, best = candidate, found
        for number, (name, values) in enumerate(regions if len(regions) > 1 else ()):
            candidate = Postprocessing(steps=(*chosen.steps, values))
            found = score(apply_to_folder(candidate, prediction, Path(scratch) / str(number)))
            if found.mean(name)["Dice"] > best.mean(name)["Dice"]:
                chosen, best = candidate, found
    return PostprocessingChoice(postprocessing=chosen, before=before, after=best)


def apply_to_folder(postprocessing: Postprocessing, source: Path, target: Path) -> Path:
    """Clean every mask of ``source`` into ``target``, and return ``target``."""
    for path in find_masks(source).values():
        volume, header = read_labels(path, gate=TRAINING_GATE)
        array: NDArray[Any] = volume.array[0]
        write_labels(target / path.name, postprocessing.apply(array), header)
    return target


def save_postprocessing(path: Path, choice: PostprocessingChoice) -> None:
    """Write ``postprocessing.json``.

    Raises:
        EnvironmentFault: the folder cannot be written.
    """
    write_atomic(path, to_json(choice.to_plain()))


def load_postprocessing(path: Path) -> Postprocessing:
    """Read ``postprocessing.json``, ours or nnU-Net's.

    Raises:
        PlanError: the file is missing or damaged, or names a step that does not exist.
    """
    content = read_json(path, what="postprocessing", error=PlanError)
    try:
        names = content["postprocessing_fns"]
        values = [entry["labels_or_regions"] for entry in content["postprocessing_kwargs"]]
        steps = tuple(_as_values(value) for value in values)
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"{path}: is no postprocessing file ({error!r}). Make it again.") from error
    unknown = [name for name in names if name != LARGEST_COMPONENT]
    if unknown or len(names) != len(steps):
        raise PlanError(
            f"{path}: postprocessing step {unknown[:1] or names} does not exist; "
            f"only '{LARGEST_COMPONENT}' does."
        )
    return Postprocessing(steps=steps)


def _rises_everywhere(found: Evaluation, best: Evaluation) -> bool:
    if not _foreground(found) > _foreground(best):
        return False
    names = found.label_map.foreground
    return not any(found.mean(name)["Dice"] < best.mean(name)["Dice"] for name in names)


def _foreground(evaluation: Evaluation) -> float:
    means = _means(evaluation)
    return float(means["foreground_mean"]["Dice"])


def _means(evaluation: Evaluation) -> dict[str, Any]:
    summary = evaluation.summary(extra=False)
    del summary["metric_per_case"]
    return summary


def _as_values(value: object) -> tuple[int, ...]:
    """Label values of a step: nnU-Net writes a label, labels, or regions (lists of labels)."""
    members = value if isinstance(value, list) else [value]
    flat: list[Any] = [
        item for member in members for item in (member if isinstance(member, list) else [member])
    ]
    if not all(type(item) is int for item in flat):
        raise ValueError(f"labels_or_regions is {value!r}")
    return tuple(sorted(set(flat)))
