"""nnU-Net's results folders: found, understood, and turned into a bundle that predicts the same.

::

    nnUNet_results/Dataset004_X/nnUNetTrainer__nnUNetPlans__3d_fullres/
      plans.json  dataset.json  fold_0/checkpoint_final.pth  fold_0/validation/summary.json ...

Plans and dataset.json are taken from the folder, not from the checkpoints, because nnU-Net predicts
by the folder's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmamba.bundle import Bundle
from medmamba.errors import BundleError
from medmamba.files import read_json
from medmamba.interop.checkpoint import ImportedFold, import_checkpoints, read_checkpoint

CHECKPOINT = "checkpoint_final.pth"
"""What nnU-Net predicts with unless told otherwise."""

PLANS_FILE = "plans.json"
DESCRIPTION_FILE = "dataset.json"
FOLD_PREFIX = "fold_"


@dataclass(frozen=True, kw_only=True)
class ResultsFolder:
    """One trained model of nnU-Net.

    Args:
        folder: named ``<trainer>__<plans>__<configuration>``.
        folds: names of the folds that have the wanted checkpoint, in order.
        checkpoint: name of the checkpoint file inside every fold.
    """

    folder: Path
    folds: tuple[str, ...]
    checkpoint: str = CHECKPOINT

    @property
    def checkpoints(self) -> tuple[Path, ...]:
        """One file per fold."""
        return tuple(self.folder / f"{FOLD_PREFIX}{fold}" / self.checkpoint for fold in self.folds)


def find_results(
    path: Path,
    *,
    configuration: str | None = None,
    folds: Sequence[str] | None = None,
    checkpoint: str = CHECKPOINT,
) -> ResultsFolder:
    """Find the one trained model that ``path`` means.

    Args:
        path: a model's folder, one of its folds, or a folder above it that holds one model.
        configuration: which one, where a folder above holds several.
        folds: use only these; all that have the checkpoint when None.
        checkpoint: file name inside the folds.

    Raises:
        BundleError: there is no such model, there are several, or a fold lacks the checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        raise BundleError(f"{path}: is not a folder. Give a folder that nnU-Net trained into.")
    if path.name.startswith(FOLD_PREFIX) and (path.parent / PLANS_FILE).is_file():
        folds = folds or [path.name.removeprefix(FOLD_PREFIX)]
        path = path.parent
    models = [path] if (path / PLANS_FILE).is_file() else _models_below(path)
    if configuration is not None:
        models = [model for model in models if model.name.rpartition("__")[2] == configuration]
    if len(models) != 1:
        raise BundleError(_which(path, models, configuration))
    return _with_folds(models[0], folds, checkpoint)


def import_results(results: ResultsFolder, folder: Path, *, name: str | None = None) -> Bundle:
    """Write a bundle of all folds; it predicts the labels that nnU-Net predicts.

    Args:
        results: from `find_results`.
        folder: of the bundle.
        name: of the bundle, for people.

    Raises:
        SecurityError: a checkpoint holds more than data; nothing of it was run.
        BundleError: parts are missing, or weights do not fit the network of the plans.
        PlanError: the plans cannot be used.
    """
    return import_checkpoints(
        results.checkpoints,
        folder,
        name=name,
        plans=read_description(results, PLANS_FILE),
        dataset_json=read_description(results, DESCRIPTION_FILE),
        scores=_scores(results),
    )


def read_results_fold(results: ResultsFolder, fold: str) -> ImportedFold:
    """Read one fold by the folder's plans and dataset.json.

    Raises:
        SecurityError: the checkpoint holds more than data; nothing of it was run.
        BundleError: parts are missing, or weights do not fit the network of the plans.
        PlanError: the plans cannot be used.
    """
    return read_checkpoint(
        results.checkpoints[results.folds.index(fold)],
        plans=read_description(results, PLANS_FILE),
        dataset_json=read_description(results, DESCRIPTION_FILE),
    )


def read_description(results: ResultsFolder, part: str) -> Any:
    """Read the plans or the dataset.json that lie beside the folds.

    Raises:
        BundleError: it is missing or no JSON.
    """
    return read_json(results.folder / part, what=f"{results.folder}", error=BundleError)


def _models_below(path: Path) -> list[Path]:
    found = [file.parent for pattern in ("*", "*/*") for file in path.glob(f"{pattern}/plans.json")]
    return sorted(folder for folder in found if any(folder.glob(f"{FOLD_PREFIX}*")))


def _which(path: Path, models: list[Path], configuration: str | None) -> str:
    if not models:
        wanted = f" of configuration '{configuration}'" if configuration else ""
        return (
            f"{path}: holds no model{wanted} that nnU-Net trained (a folder with plans.json and "
            "fold_0, fold_1, ...)."
        )
    listed = ", ".join(str(model.relative_to(path)) for model in models)
    return f"{path}: holds {len(models)} models ({listed}). Give one of these folders."


def _with_folds(model: Path, wanted: Sequence[str] | None, checkpoint: str) -> ResultsFolder:
    there = sorted(
        folder.name.removeprefix(FOLD_PREFIX)
        for folder in model.glob(f"{FOLD_PREFIX}*")
        if (folder / checkpoint).is_file()
    )
    if wanted is None and len(there) > 1 and "all" in there:
        # As nnU-Net does: a network trained on everything is not one of a cross-validation.
        there.remove("all")
    chosen = there if wanted is None else [str(fold) for fold in wanted]
    missing = [fold for fold in chosen if fold not in there]
    if missing or not chosen:
        raise BundleError(
            f"{model}: no {checkpoint} for fold {', '.join(missing) or '0 to 4'} "
            f"(it is there for: {', '.join(there) or 'none'}). Wait until training has ended, or "
            "name another checkpoint, such as checkpoint_best.pth."
        )
    return ResultsFolder(folder=model, folds=tuple(chosen), checkpoint=checkpoint)


def _scores(results: ResultsFolder) -> dict[str, Any]:
    """Mean foreground Dice of each fold's validation cases, where nnU-Net has computed them."""
    found = {}
    for fold in results.folds:
        path = results.folder / f"{FOLD_PREFIX}{fold}" / "validation" / "summary.json"
        if path.is_file():
            content = read_json(path, what=f"validation of fold {fold}", error=BundleError)
            found[fold] = content.get("foreground_mean", {}).get("Dice")
    return {"validation_dice": found} if found else {}
