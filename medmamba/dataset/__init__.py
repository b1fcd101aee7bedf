"""Raw datasets: what a folder holds, whether it can be trained on, and its folds.

Also which cases a path to predict means. Voxels are read through ``medmamba.io``.
"""

from medmamba.dataset.case import Case, Dataset, grid_difference, load_case
from medmamba.dataset.raw import open_dataset
from medmamba.dataset.splits import (
    Split,
    make_splits,
    read_splits,
    split_for_fold,
    write_splits,
)

__all__ = [
    "Case",
    "Dataset",
    "Split",
    "grid_difference",
    "load_case",
    "make_splits",
    "open_dataset",
    "read_splits",
    "split_for_fold",
    "write_splits",
]
