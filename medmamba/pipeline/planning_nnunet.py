"""plan() on what nnU-Net has preprocessed already: its fingerprint, plans, folds and arrays."""

import os
import re
from pathlib import Path

from medmamba.dataset import VerificationReport, make_splits, write_splits
from medmamba.dataset.splits import FOLDS
from medmamba.errors import DatasetError
from medmamba.files import require_writable_folder
from medmamba.interop.nnunet_data import (
    NnunetDataset,
    case_ids,
    import_cases,
    open_preprocessed,
)
from medmamba.pipeline.plan_request import (
    PlanOutcome,
    PlanRequest,
    Progress,
    decide,
    stage,
    wanted_configurations,
)
from medmamba.pipeline.work import Work
from medmamba.plans.plan import Plan
from medmamba.preprocessing.store import CaseStore

RAW_VARIABLE = "nnUNet_raw"
"""Where nnU-Net's users keep raw datasets; honoured when set, never needed."""


def find_dataset(dataset: Path | str) -> Path:
    """Return the folder meant by a path, or by a name or number where ``nnUNet_raw`` is set."""
    folder = Path(dataset)
    root = os.environ.get(RAW_VARIABLE)
    if folder.exists() or not root:
        return folder
    number = re.fullmatch(r"\d{1,3}", str(dataset))
    pattern = f"Dataset{int(number[0]):03d}_*" if number else str(dataset)
    found = sorted(path for path in Path(root).glob(pattern) if path.is_dir())
    return found[0] if len(found) == 1 else folder


def plan_preprocessed(
    folder: Path, output: Path, request: PlanRequest, *, on_progress: Progress | None
) -> PlanOutcome:
    """Plan from nnU-Net's fingerprint, and bring its arrays into a work folder.

    Args:
        folder: such as ``nnUNet_preprocessed/Dataset004_X``.
        output: the work folder.
        request: what to plan; spacing and normalisation must be those nnU-Net preprocessed by.
        on_progress: called with (stage, done, total).

    Raises:
        DatasetError: files of nnU-Net are missing or damaged, or no arrays are on the grid that
            the plan asks for.
        PlanError: no plan fits the memory, or a configuration does not exist.
    """
    found = open_preprocessed(folder)
    work = Work(require_writable_folder(output))
    decided = decide(found.fingerprint, found.description, work, request)
    outcome = PlanOutcome(
        report=VerificationReport(
            dataset=decided.dataset_name, cases=len(found.fingerprint.spacings_mm)
        ),
        plan=decided,
        plan_path=work.plan(request.network),
    )
    if request.until == "plan":
        return outcome
    names = wanted_configurations(decided, request)
    sources = {name: _source(found, decided, name) for name in names}
    _write_splits(found, next(iter(sources.values())), work)
    stores = []
    for name, source in sources.items():
        branch = decided.configurations[name]
        stores.append(work.store(name, branch))
        import_cases(
            source,
            CaseStore(stores[-1]),
            grid=branch.grid,
            recipe=branch.preprocessing,
            workers=request.workers,
            progress=stage(on_progress, f"read {source.name}"),
        )
    return PlanOutcome(
        report=outcome.report, plan=decided, plan_path=outcome.plan_path, stores=tuple(stores)
    )


def _source(found: NnunetDataset, decided: Plan, name: str) -> Path:
    source = found.source_of(decided.configurations[name])
    if source is None:
        spacing = " x ".join(f"{v:g}" for v in decided.configurations[name].grid.spacing_mm)
        raise DatasetError(
            f"{found.folder}: nnU-Net has no arrays at {spacing} mm with this normalisation for "
            f"'{name}' (plans there: {', '.join(found.plans) or 'none'}). Preprocess that "
            "configuration with nnU-Net, or plan from the raw dataset.",
            code="E_NNUNET_ARRAYS",
        )
    return source


def _write_splits(found: NnunetDataset, source: Path, work: Work) -> None:
    cases = case_ids(source)
    if found.splits:
        write_splits(work.splits, found.splits)
    elif len(cases) >= FOLDS:
        write_splits(work.splits, make_splits(cases))
