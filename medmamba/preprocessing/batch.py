"""Preprocessing a whole dataset: in parallel, resumable case by case.

Threads do the work, since reading, matrix products, filters and compression all release the
interpreter lock; there are no worker processes that could die unnoticed.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import TypeVar

from medmamba.dataset import Case, Dataset, load_case
from medmamba.errors import DatasetError, EnvironmentFault, MedMambaError
from medmamba.files import hash_file, hash_values
from medmamba.io import read_geometry
from medmamba.labels import LabelMap
from medmamba.preprocessing.memory_gate import free_memory_gate
from medmamba.preprocessing.pipeline import PreparedCase, prepare_case, resample_case
from medmamba.preprocessing.recipe import PreprocessingRecipe
from medmamba.preprocessing.store import CaseStore
from medmamba.volume import Grid

MOST_WORKERS = 8
"""More cases at once cost memory and gain nothing: the disk is the limit then."""

BYTES_PER_VOXEL = 24
"""Float32 as read and as cropped, and one channel in float64 on both grids, roughly."""

PREPROCESSING_FORMAT = 2
"""Raised when the same inputs would give other arrays, so that stored cases are made anew."""

Progress = Callable[[int, int], None]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Target:
    """One working grid that cases are brought to, and where they are kept."""

    store: CaseStore
    grid: Grid
    recipe: PreprocessingRecipe


def preprocess_cases(
    dataset: Dataset,
    targets: Sequence[Target],
    *,
    workers: int | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> int:
    """Preprocess every training case that its stores do not hold yet, reading each case once.

    Args:
        dataset: the raw dataset.
        targets: working grids, such as those of 2D and 3D; a stored case that was made from the
            same files, spacing and recipe is left alone.
        workers: cases worked on at once; one a core, at most 8, when None.
        device: PyTorch device that resamples, with the same numbers; NumPy on the CPU when None.
        progress: called with (cases done, cases in all).

    Returns:
        How many arrays were made anew, over all targets.

    Raises:
        DatasetError: cases that could not be preprocessed, all of them; the others are stored.
        EnvironmentFault: the disk is full or cannot be written; ends it at once, and what is
            finished stays.
    """
    gate = free_memory_gate()
    channels = max(len(target.recipe.channels) for target in targets)

    def work(case: Case) -> tuple[int, str | None]:
        try:
            with gate.hold(case_bytes(case, channels, BYTES_PER_VOXEL)):
                return _preprocess_one(case, targets, dataset.label_map, device), None
        except EnvironmentFault:
            # No other case would fare better.
            raise
        except MedMambaError as problem:
            return 0, _named(case.id, problem.message)

    for target in targets:
        target.store.remove_leftovers()
    cases = dataset.training_cases
    made, problems = 0, []
    with ThreadPoolExecutor(worker_count(workers)) as pool:
        try:
            for done, (is_new, problem) in enumerate(map_bounded(pool, work, cases), start=1):
                made += is_new
                if problem is not None:
                    problems.append(problem)
                if progress is not None:
                    progress(done, len(cases))
        except EnvironmentFault:
            pool.shutdown(cancel_futures=True)
            raise
    if problems:
        raise DatasetError(
            f"{dataset.name}: {len(problems)} of {len(cases)} cases could not be preprocessed; "
            "the others are stored.\n  " + "\n  ".join(problems),
            code="E_DATASET_PREPROCESS",
        )
    return made


def case_key(case: Case, grid: Grid, recipe: PreprocessingRecipe, label_map: LabelMap) -> str:
    """Hash everything a preprocessed case is made from; the patch size is not part of it."""
    return _key(_file_hashes(case), grid, recipe, label_map)


def _file_hashes(case: Case) -> list[str]:
    return [hash_file(path) for path in (*case.images, *([case.labels] if case.labels else []))]


def _key(hashes: list[str], grid: Grid, recipe: PreprocessingRecipe, label_map: LabelMap) -> str:
    made_from = [PREPROCESSING_FORMAT, hashes, list(grid.spacing_mm), recipe, label_map]
    return hash_values(made_from)


def case_bytes(case: Case, channels: int, bytes_per_voxel: int) -> int:
    """Estimate the memory that working on a case takes, from the header of its first file."""
    return prod(read_geometry(case.images[0]).shape) * channels * bytes_per_voxel


def worker_count(workers: int | None) -> int:
    """Return how many cases to work on at once: one a core, at most 8, unless asked otherwise."""
    if workers is not None:
        return max(1, workers)
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(MOST_WORKERS, available or 1)


def map_bounded(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Sequence[Item]
) -> Iterator[Result]:
    """Yield results in order; only a few wait at any time, however many items there are."""
    upcoming = iter(items)
    waiting = [pool.submit(work, item) for item in islice(upcoming, 2 * MOST_WORKERS)]
    while waiting:
        result = waiting.pop(0).result()
        waiting.extend(pool.submit(work, item) for item in islice(upcoming, 1))
        yield result


def _preprocess_one(
    case: Case, targets: Sequence[Target], label_map: LabelMap, device: str | None
) -> int:
    hashes = _file_hashes(case)
    keys = [_key(hashes, target.grid, target.recipe, label_map) for target in targets]
    missing = [
        (target, key)
        for target, key in zip(targets, keys, strict=True)
        if not target.store.has(case.id, key)
    ]
    if not missing:
        return 0
    image, labels, _ = load_case(case)
    prepared: dict[str, PreparedCase] = {}
    for target, key in missing:
        recipe = target.recipe
        # All configurations of a plan turn, crop and normalise alike.
        likeness = hash_values([list(recipe.transpose_forward), list(recipe.channels)])
        if likeness not in prepared:
            prepared[likeness] = prepare_case(image, labels, recipe=recipe)
        made = resample_case(
            prepared[likeness], grid=target.grid, recipe=recipe, label_map=label_map, device=device
        )
        target.store.write(case.id, made, key=key, patch_size=target.grid.patch_size)
    return len(missing)


def _named(case_id: str, message: str) -> str:
    return message if message.startswith(f"case {case_id}") else f"case {case_id}: {message}"
