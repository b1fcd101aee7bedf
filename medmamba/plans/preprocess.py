"""Preprocessing as a plan says: the branch of one configuration handed to the layer below."""

from collections.abc import Callable
from pathlib import Path

from medmamba.dataset import Dataset
from medmamba.plans.plan import Plan
from medmamba.preprocessing.batch import preprocess_cases
from medmamba.preprocessing.store import CaseStore


def preprocess_dataset(
    dataset: Dataset,
    plan: Plan,
    configuration: str,
    store_folder: Path,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Preprocess every training case for one configuration; stored cases are left alone.

    Args:
        dataset: the raw dataset the plan was made for.
        plan: decides grid and recipe.
        configuration: key of ``plan.configurations``.
        store_folder: where cases go.
        workers: cases worked on at once; one a core, at most 8, when None.
        progress: called with (cases done, cases in all).

    Returns:
        How many cases were made anew.

    Raises:
        DatasetError: some cases could not be preprocessed.
    """
    chosen = plan.configurations[configuration]
    return preprocess_cases(
        dataset,
        CaseStore(store_folder),
        grid=chosen.grid,
        recipe=chosen.preprocessing,
        workers=workers,
        progress=progress,
    )
