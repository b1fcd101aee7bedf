"""Preprocessing a whole dataset: in parallel, resumable case by case.

Threads do the work, since reading, matrix products, filters and compression all release the
interpreter lock; there are no worker processes that could die unnoticed.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from math import prod
from typing import TypeVar

from medmamba.dataset import Case, Dataset, load_case
from medmamba.errors import DatasetError, MedMambaError
from medmamba.files import hash_file, hash_values
from medmamba.io import read_geometry
from medmamba.labels import LabelMap
from medmamba.preprocessing.memory_gate import free_memory_gate
from medmamba.preprocessing.pipeline import preprocess_case
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


def preprocess_cases(
    dataset: Dataset,
    store: CaseStore,
    *,
    grid: Grid,
    recipe: PreprocessingRecipe,
    workers: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Preprocess every training case that the store does not hold yet.

    Args:
        dataset: the raw dataset.
        store: where cases go; those made from the same files, grid and recipe are left alone.
        grid: working spacing, and the patch that chunks are fitted to.
        recipe: everything else.
        workers: cases worked on at once; one a core, at most 8, when None.
        progress: called with (cases done, cases in all).

    Returns:
        How many cases were made anew.

    Raises:
        DatasetError: cases that could not be preprocessed, all of them; the others are stored.
    """
    gate, channels = free_memory_gate(), len(recipe.channels)

    def work(case: Case) -> tuple[bool, str | None]:
        try:
            with gate.hold(case_bytes(case, channels, BYTES_PER_VOXEL)):
                return _preprocess_one(case, store, grid, recipe, dataset.label_map), None
        except MedMambaError as problem:
            return False, f"case {case.id}: {problem.message}"

    store.remove_leftovers()
    cases = dataset.training_cases
    made, problems = 0, []
    with ThreadPoolExecutor(worker_count(workers)) as pool:
        for done, (is_new, problem) in enumerate(map_bounded(pool, work, cases), start=1):
            made += is_new
            if problem is not None:
                problems.append(problem)
            if progress is not None:
                progress(done, len(cases))
    if problems:
        more = f" ({len(problems)} cases failed in all)" if len(problems) > 1 else ""
        raise DatasetError(problems[0] + more, code="E_DATASET_PREPROCESS")
    return made


def case_key(case: Case, grid: Grid, recipe: PreprocessingRecipe, label_map: LabelMap) -> str:
    """Hash everything a preprocessed case is made from; the patch size is not part of it."""
    files = [*case.images, *([case.labels] if case.labels else [])]
    hashes = [hash_file(path) for path in files]
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
    case: Case,
    store: CaseStore,
    grid: Grid,
    recipe: PreprocessingRecipe,
    label_map: LabelMap,
) -> bool:
    key = case_key(case, grid, recipe, label_map)
    if store.has(case.id, key):
        return False
    image, labels, _ = load_case(case)
    made = preprocess_case(image, labels, grid=grid, recipe=recipe, label_map=label_map)
    store.write(case.id, made, key=key, patch_size=grid.patch_size)
    return True
