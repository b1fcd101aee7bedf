"""Scores that mean something: no subject and no image on both sides of a fold."""

from collections.abc import Mapping
from typing import Any

from medmamba.dataset import Split, read_subjects, shared_subjects
from medmamba.dataset.subjects import SUBJECTS_KEY
from medmamba.errors import DatasetError
from medmamba.preprocessing.store import CaseStore

SHOWN = 3


def require_no_leak(
    split: Split, description: Mapping[str, Any], store: CaseStore, *, fold: int | str
) -> None:
    """Refuse a fold that validates on what it trains on; fold "all" does so on purpose.

    Args:
        split: the fold.
        description: dataset.json, which may say which cases are of one subject.
        store: preprocessed cases, whose checksums tell copies of an image.
        fold: its name, for the message.

    Raises:
        DatasetError: (E_SPLIT_LEAK) naming subjects or cases.
    """
    cases = sorted({*split.train, *split.validation})
    shared = shared_subjects(split, read_subjects(description, cases))
    if shared:
        raise DatasetError(
            f"fold {fold}: cases of {_shown(shared)} both train and validate. Keep all cases of a "
            f"subject on one side: correct splits.json, or plan again, which does so by '"
            f"{SUBJECTS_KEY}' of dataset.json.",
            code="E_SPLIT_LEAK",
        )
    if split.train == split.validation:
        return
    trained = {store.content(case): case for case in split.train}
    copies = [
        f"{case} = {trained[found]}"
        for case in split.validation
        if (found := store.content(case)) in trained
    ]
    if copies:
        raise DatasetError(
            f"fold {fold}: validates on copies of images it trains on ({_shown(copies)}). Remove "
            f"them, or give copies one subject under '{SUBJECTS_KEY}' of dataset.json and plan "
            "again.",
            code="E_SPLIT_LEAK",
        )


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
