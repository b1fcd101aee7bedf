"""Which cases train and which validate: nnU-Net's five folds, or those of a splits_final.json."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from medmamba.errors import DatasetError
from medmamba.files import RECORD_CONFIG, read_json, write_atomic

SPLITS_FILE = "splits_final.json"
FOLDS = 5
SEED = 12345
"""nnU-Net's, so that folds are comparable."""
RANDOM_TRAINING_SHARE = 0.8


@dataclass(frozen=True, kw_only=True)
class Split:
    """One fold: ids of cases to train on and to validate on, ascending."""

    __pydantic_config__ = RECORD_CONFIG

    train: tuple[str, ...]
    validation: tuple[str, ...]


def make_splits(
    case_ids: Sequence[str], subjects: Mapping[str, str] | None = None
) -> tuple[Split, ...]:
    """Divide cases into five folds as nnU-Net does (shuffled once, consecutive parts validate).

    Fewer than five cases, where nnU-Net gives up, make as many folds as there are cases. Where
    subjects have several cases, subjects are divided so and bring all their cases.

    Args:
        case_ids: of the training cases.
        subjects: case -> subject; every case its own when None.

    Raises:
        DatasetError: a single case or subject, or an id that occurs twice.
    """
    ids = _unique_sorted(case_ids)
    owner = subjects or {}
    if len({owner.get(name, name) for name in ids}) < len(ids):
        groups = sorted({owner.get(name, name) for name in ids})
        return tuple(
            Split(
                train=tuple(name for name in ids if owner.get(name, name) in split.train),
                validation=tuple(name for name in ids if owner.get(name, name) in split.validation),
            )
            for split in make_splits(groups)
        )
    if len(ids) < 2:
        raise DatasetError(
            f"{len(ids)} training case cannot be divided into folds. "
            "Train with fold 'all', or add cases."
        )
    order = np.arange(len(ids))
    np.random.RandomState(SEED).shuffle(order)
    splits = []
    for part in np.array_split(order, min(FOLDS, len(ids))):
        held_out = {int(index) for index in part}
        splits.append(
            Split(
                train=tuple(name for index, name in enumerate(ids) if index not in held_out),
                validation=tuple(ids[index] for index in sorted(held_out)),
            )
        )
    return tuple(splits)


def split_for_fold(splits: Sequence[Split], fold: int | str, case_ids: Sequence[str]) -> Split:
    """Return the split of a fold; beyond the last one a random 80:20 split, for "all" every case.

    Args:
        splits: from ``make_splits`` or ``read_splits``.
        fold: number, or ``"all"``.
        case_ids: every training case.

    Raises:
        DatasetError: not a fold, or the split names cases that are not there.
    """
    ids = _unique_sorted(case_ids)
    if fold == "all":
        return Split(train=tuple(ids), validation=tuple(ids))
    try:
        number = int(fold)
    except ValueError:
        number = -1
    if number < 0:
        raise DatasetError(f"fold {fold!r}: a number from 0 or 'all' is needed.")
    if number >= len(splits):
        return _random_split(ids, number)
    split = splits[number]
    missing = sorted({*split.train, *split.validation} - set(ids))
    if missing:
        raise DatasetError(
            f"fold {number}: {len(missing)} cases of the split are not in the dataset "
            f"({', '.join(missing[:3])}). Correct {SPLITS_FILE} or restore the cases."
        )
    return split


def _random_split(ids: list[str], number: int) -> Split:
    random = np.random.RandomState(SEED + number)
    count = int(len(ids) * RANDOM_TRAINING_SHARE)
    chosen = {int(index) for index in random.choice(len(ids), count, replace=False)}
    return Split(
        train=tuple(name for index, name in enumerate(ids) if index in chosen),
        validation=tuple(name for index, name in enumerate(ids) if index not in chosen),
    )


def read_splits(path: Path) -> tuple[Split, ...]:
    """Read a splits_final.json in nnU-Net's form.

    Raises:
        DatasetError: missing, damaged, or a case both trains and validates.
    """
    value = read_json(path, what=path.name, error=DatasetError)
    if not isinstance(value, list) or not value:
        raise DatasetError(f"{path}: a list of folds is needed. Delete it to get default folds.")
    return tuple(_as_split(path, number, entry) for number, entry in enumerate(value))


def write_splits(path: Path, splits: Sequence[Split]) -> None:
    """Write splits in nnU-Net's form."""
    value = [{"train": list(split.train), "val": list(split.validation)} for split in splits]
    write_atomic(path, json.dumps(value, indent=4) + "\n")


def _as_split(path: Path, number: int, entry: Any) -> Split:
    lists = (entry.get("train"), entry.get("val")) if isinstance(entry, dict) else (None, None)
    if not isinstance(lists[0], list) or not isinstance(lists[1], list):
        raise DatasetError(f"{path}: fold {number} needs the lists 'train' and 'val'.")
    train, validation = {str(name) for name in lists[0]}, {str(name) for name in lists[1]}
    both = sorted(train & validation)
    if both and train != validation:
        raise DatasetError(
            f"{path}: fold {number} both trains and validates on {', '.join(both[:3])}. "
            "Remove them from one of the lists."
        )
    return Split(train=tuple(sorted(train)), validation=tuple(sorted(validation)))


def _unique_sorted(case_ids: Sequence[str]) -> list[str]:
    ids = sorted(case_ids)
    twice = sorted({name for name, following in pairwise(ids) if name == following})
    if twice:
        raise DatasetError(f"case {twice[0]} occurs twice. Case ids must be unique.")
    return ids
