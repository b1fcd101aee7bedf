"""Raw datasets: what a folder holds, whether it can be trained on, and its folds.

Also which cases a path to predict means. Voxels are read through ``medmamba.io``.
"""

from medmamba.dataset.acquisitions import split_acquisitions
from medmamba.dataset.case import Case, Dataset, grid_difference, load_case
from medmamba.dataset.inputs import CaseListing, Rejection, find_cases, safe_id
from medmamba.dataset.problems import Problem, VerificationReport
from medmamba.dataset.raw import open_dataset, read_label_map, survey_dataset
from medmamba.dataset.splits import (
    Split,
    make_splits,
    read_splits,
    split_for_fold,
    write_splits,
)
from medmamba.dataset.subjects import read_subjects, shared_subjects
from medmamba.dataset.verification import verify
from medmamba.io import orientation_code

__all__ = [
    "Case",
    "CaseListing",
    "Dataset",
    "Problem",
    "Rejection",
    "Split",
    "VerificationReport",
    "find_cases",
    "grid_difference",
    "load_case",
    "make_splits",
    "open_dataset",
    "orientation_code",
    "read_label_map",
    "read_splits",
    "read_subjects",
    "safe_id",
    "shared_subjects",
    "split_acquisitions",
    "split_for_fold",
    "survey_dataset",
    "verify",
    "write_splits",
]
