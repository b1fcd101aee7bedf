"""Label images of the training cases, kept in the work folder to score whole cases against."""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from medmamba.dataset import Dataset
from medmamba.errors import PlanError
from medmamba.files import replace_atomic
from medmamba.io import suffix_of
from medmamba.pipeline.work import Work


def keep_references(raw: Dataset, work: Work) -> None:
    """Copy the label images that are not there yet, or have changed, as they are.

    Raises:
        EnvironmentFault: the work folder cannot be written.
    """
    for case in raw.training_cases:
        if case.labels is None:
            continue
        target = work.references / f"{case.id}{suffix_of(case.labels)}"
        if not _same(case.labels, target):
            replace_atomic(target, partial(shutil.copy2, case.labels))


def find_references(work: Work, cases: Sequence[str]) -> dict[str, Path]:
    """Return the label image of each case.

    Raises:
        PlanError: some are not there; says how to bring them in.
    """
    from medmamba.evaluation.report import find_masks

    known = find_masks(work.references) if work.references.is_dir() else {}
    missing = [case for case in cases if case not in known]
    if missing:
        raise PlanError(
            f"{work.references}: {len(missing)} label images are missing ({', '.join(missing[:3])})"
            f". Run `medmamba plan DATASET -o {work.folder}` again; it copies them there.",
            code="E_NO_REFERENCES",
        )
    return {case: known[case] for case in cases}


def _same(source: Path, target: Path) -> bool:
    if not target.is_file():
        return False
    found, wanted = target.stat(), source.stat()
    return (found.st_size, found.st_mtime_ns) == (wanted.st_size, wanted.st_mtime_ns)
