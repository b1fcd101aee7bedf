"""Which cases belong to one person, so that folds keep them together.

dataset.json may say so under ``subjects``: a map case -> subject, or a regular expression whose
first group is the subject (``"^(.+)_[LR]$"``). A case that neither names is a subject of its own.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from medmamba.dataset.splits import Split
from medmamba.errors import DatasetError

SUBJECTS_KEY = "subjects"


def read_subjects(description: Mapping[str, Any], case_ids: Sequence[str]) -> dict[str, str]:
    """Return the subject of every case.

    Raises:
        DatasetError: the entry is neither a map of texts nor a regular expression with a group.
    """
    entry = description.get(SUBJECTS_KEY)
    if entry is None:
        return {case: case for case in case_ids}
    if isinstance(entry, Mapping) and all(isinstance(name, str) for name in entry.values()):
        return {case: entry.get(case, case) for case in case_ids}
    try:
        pattern = re.compile(entry)
        if pattern.groups < 1:
            raise ValueError("it has no group")
    except (re.error, TypeError, ValueError) as error:
        raise DatasetError(
            f"dataset.json: '{SUBJECTS_KEY}' is {entry!r} ({error}); a map case -> subject is "
            "needed, or a regular expression whose first group is the subject."
        ) from error
    found = {case: pattern.search(case) for case in case_ids}
    return {case: match.group(1) if match else case for case, match in found.items()}


def shared_subjects(split: Split, subjects: Mapping[str, str]) -> list[str]:
    """Name subjects with cases on both sides of a fold; none where it trains on every case."""
    if split.train == split.validation:
        return []
    train = {subjects.get(case, case) for case in split.train}
    return sorted(train & {subjects.get(case, case) for case in split.validation})
