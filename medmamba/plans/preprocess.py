"""Preprocessing as a plan says: the branches of its configurations handed to the layer below."""

from collections.abc import Callable, Mapping
from pathlib import Path

from medmamba.dataset import Dataset
from medmamba.plans.plan import Plan
from medmamba.preprocessing.batch import Target, preprocess_cases
from medmamba.preprocessing.store import CaseStore


def preprocess_dataset(
    dataset: Dataset,
    plan: Plan,
    folders: Mapping[str, Path],
    *,
    workers: int | None = None,
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Preprocess every training case in one pass; stored cases are left alone.

    Args:
        dataset: the raw dataset the plan was made for.
        plan: decides grids and recipes.
        folders: configuration of the plan -> where its cases go.
        workers: cases worked on at once; one a core, at most 8, when None.
        device: PyTorch device that resamples, with the same numbers; NumPy on the CPU when None.
        progress: called with (cases done, cases in all).

    Returns:
        How many arrays were made anew, over all configurations.

    Raises:
        DatasetError: some cases could not be preprocessed.
    """
    targets = [
        Target(
            store=CaseStore(folder),
            grid=plan.configurations[name].grid,
            recipe=plan.configurations[name].preprocessing,
        )
        for name, folder in folders.items()
    ]
    return preprocess_cases(dataset, targets, workers=workers, device=device, progress=progress)
