"""plan(): verify a raw dataset, fingerprint it, decide, and preprocess."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from medmamba.dataset import (
    Dataset,
    VerificationReport,
    make_splits,
    open_dataset,
    read_splits,
    read_subjects,
    survey_dataset,
    verify,
    write_splits,
)
from medmamba.dataset.splits import FOLDS
from medmamba.errors import DatasetError
from medmamba.files import remove_leftovers, require_writable_folder, to_json, write_atomic
from medmamba.interop.nnunet_data import is_nnunet_preprocessed
from medmamba.interop.nnunet_export import export_to_nnunet
from medmamba.networks.spec import Mixer, OptionValue
from medmamba.pipeline.plan_request import (
    PlanOutcome,
    PlanRequest,
    Progress,
    Step,
    decide,
    stage,
    wanted_configurations,
)
from medmamba.pipeline.planning_nnunet import find_dataset, plan_preprocessed
from medmamba.pipeline.references import keep_references
from medmamba.pipeline.work import Work, check_network_name, open_work
from medmamba.plans.budget import Budget
from medmamba.plans.fingerprint import (
    Fingerprint,
    Sampling,
    compute_fingerprint,
    fingerprint_to_nnunet,
)
from medmamba.plans.plan import Plan
from medmamba.plans.preprocess import preprocess_dataset
from medmamba.preprocessing.store import CaseStore


def plan(
    dataset: Path | str,
    output: Path | str,
    *,
    network: str = "lightm_unet_s",
    memory_gb: float | None = None,
    device: Literal["cuda", "cpu"] = "cuda",
    configurations: tuple[str, ...] = (),
    spacing_mm: tuple[float, ...] | None = None,
    planner: str | None = None,
    plans_name: str | None = None,
    mixer: Mixer | None = None,
    options: Mapping[str, OptionValue] | None = None,
    sampling: Sampling = "exact",
    preprocess: bool = True,
    until: Step = "preprocess",
    nnunet_folder: Path | str | None = None,
    resample_on: str | None = None,
    workers: int | None = None,
    on_verified: Callable[[VerificationReport], None] | None = None,
    on_progress: Progress | None = None,
) -> PlanOutcome:
    """Verify, fingerprint, plan and preprocess a dataset into a work folder.

    Args:
        dataset: nnU-Net v2 raw folder, Medical Segmentation Decathlon task folder, or a folder
            that nnU-Net has preprocessed; a dataset's name or number where ``nnUNet_raw`` is set.
        output: the work folder; made if needed, continued if interrupted.
        network: key of the shipped presets.
        memory_gb: memory of the target device; the preset's reference when None.
        device: ``cpu`` bounds the patch of Mamba networks by time as well.
        configurations: what to preprocess, in one pass; the preferred one when empty.
        spacing_mm: target spacing (z, y, x) instead of the dataset's median.
        planner: nnU-Net planner whose rules apply instead of the preset's.
        plans_name: name of the plan in nnU-Net's folders; the planner's own when None.
        mixer: ``mamba``, or a twin, ``identity`` or ``dwconv``, in place of the Mamba layers.
        options: of the network, such as ``{"order": "bidirectional"}``, over the preset's.
        sampling: ``compatible`` draws nnU-Net's random samples for intensity statistics.
        preprocess: False stops after the plan is written.
        until: last step: ``verify``, ``fingerprint``, ``plan`` or ``preprocess``.
        nnunet_folder: nnU-Net's folder of preprocessed datasets, to be filled as well, so that
            nnU-Net can train from the plan.
        resample_on: PyTorch device that resamples, with the same numbers; NumPy when None.
        workers: cases worked on at once; one a core, at most 8, when None.
        on_verified: called with the verification report before anything is decided.
        on_progress: called with (stage, done, total).

    Raises:
        DatasetError: the dataset has fatal problems; ``verification.json`` lists them all.
        UsageError: the network does not exist.
        PlanError: no plan fits the memory, or a configuration does not exist.
        EnvironmentFault: the work folder cannot be written.
    """
    check_network_name(network)
    request = PlanRequest(
        network=network,
        budget=Budget(memory_gb=memory_gb, spacing_mm=spacing_mm, device=device, planner=planner),
        plans_name=plans_name,
        mixer=mixer,
        options=options or {},
        configurations=configurations,
        sampling=sampling,
        until=until if preprocess or until != "preprocess" else "plan",
        workers=workers,
        device=resample_on,
    )
    folder = find_dataset(dataset)
    if is_nnunet_preprocessed(folder):
        return plan_preprocessed(folder, Path(output), request, on_progress=on_progress)
    raw = survey_dataset(folder)
    work = Work(require_writable_folder(Path(output)))
    for place in (work.folder, work.cases, work.plans):
        remove_leftovers(place)
    report = verify(raw, workers=workers, progress=stage(on_progress, "verify"))
    write_atomic(work.verification, to_json(report))
    if on_verified is not None:
        on_verified(report)
    if report.fatal:
        raise DatasetError(_first_fatal(report, work.verification))
    outcome = PlanOutcome(report=report)
    if request.until == "verify":
        return outcome
    fingerprint = _fingerprint(raw, work, request, on_progress)
    if request.until == "fingerprint":
        return outcome
    deciding = stage(on_progress, "plan") or _unseen
    deciding(0, 1)  # sizing a Mamba network takes up to a minute
    decided = decide(fingerprint, raw.description, work, request)
    deciding(1, 1)
    _write_splits(raw, work)
    keep_references(raw, work)
    outcome = replace(outcome, plan=decided, plan_path=work.plan(network))
    if request.until == "plan":
        return outcome
    stores = _preprocess(raw, work, decided, request, on_progress)
    outcome = replace(outcome, stores=tuple(stores.values()))
    if nnunet_folder is None:
        return outcome
    exported = export_to_nnunet(
        raw,
        decided,
        fingerprint,
        {name: CaseStore(store) for name, store in stores.items()},
        Path(nnunet_folder),
        splits=read_splits(work.splits) if work.splits.is_file() else (),
        progress=stage(on_progress, "write for nnU-Net"),
    )
    return replace(outcome, nnunet_folder=exported)


def _unseen(done: int, total: int) -> None:
    """Progress that nobody looks at."""


def preprocess(
    dataset: Path | str,
    work: Path | str,
    *,
    network: str = "lightm_unet_s",
    configurations: tuple[str, ...] = (),
    workers: int | None = None,
    resample_on: str | None = None,
    on_progress: Progress | None = None,
) -> tuple[Path, ...]:
    """Preprocess by the plan that the work folder holds, without deciding anything anew.

    Args:
        dataset: the raw dataset the plan was made for.
        work: folder that `plan` made; its plan file may have been edited since.
        network: whose plan.
        configurations: of the plan, in one pass; the preferred one when empty.
        workers: cases worked on at once; one a core, at most 8, when None.
        resample_on: PyTorch device that resamples, with the same numbers; NumPy when None.
        on_progress: called with (stage, done, total).

    Returns:
        The folders that hold the cases.

    Raises:
        DatasetError: cases could not be preprocessed, all of them named; the others are stored.
        PlanError: there is no plan, or it has no such configuration.
    """
    place = open_work(Path(work))
    request = PlanRequest(
        network=network,
        budget=Budget(),
        configurations=configurations,
        workers=workers,
        device=resample_on,
    )
    raw, decided = open_dataset(find_dataset(dataset)), place.load_plan(network)
    return tuple(_preprocess(raw, place, decided, request, on_progress).values())


def _fingerprint(
    raw: Dataset, work: Work, request: PlanRequest, on_progress: Progress | None
) -> Fingerprint:
    fingerprint = compute_fingerprint(
        raw,
        workers=request.workers,
        folder=work.cases,
        progress=stage(on_progress, "fingerprint"),
        sampling=request.sampling,
    )
    write_atomic(work.fingerprint, to_json(fingerprint))
    write_atomic(work.nnunet_fingerprint, to_json(fingerprint_to_nnunet(fingerprint)))
    write_atomic(work.dataset_json, to_json(raw.description))
    return fingerprint


def _write_splits(raw: Dataset, work: Work) -> None:
    """Folds of the raw folder where it brings some, else nnU-Net's five where cases suffice.

    Raises:
        DatasetError: the work folder holds other folds than the raw folder brings.
    """
    if not raw.splits:
        if len(raw.training_cases) >= FOLDS:
            ids = [case.id for case in raw.training_cases]
            write_splits(work.splits, make_splits(ids, read_subjects(raw.description, ids)))
        return
    if work.splits.is_file() and read_splits(work.splits) != raw.splits and work.has_runs:
        raise DatasetError(
            f"{work.splits}: networks were trained by these folds, but the dataset brings others. "
            "Plan into another work folder.",
            code="E_SPLIT_CONFLICT",
        )
    write_splits(work.splits, raw.splits)


def _preprocess(
    raw: Dataset, work: Work, decided: Plan, request: PlanRequest, on_progress: Progress | None
) -> dict[str, Path]:
    """Preprocess every wanted configuration in one pass over the raw files."""
    names = wanted_configurations(decided, request)
    stores = {name: work.store(name, decided.configurations[name]) for name in names}
    preprocess_dataset(
        raw,
        decided,
        stores,
        workers=request.workers,
        device=request.device,
        progress=stage(on_progress, f"preprocess {', '.join(names)}"),
    )
    return stores


def _first_fatal(report: VerificationReport, path: Path) -> str:
    fatal = [problem for problem in report.problems if problem.severity == "fatal"]
    first = fatal[0]
    where = f"case {first.case}: " if first.case else ""
    return f"{where}{first.message} ({len(fatal)} fatal problem(s) in all, listed in {path}.)"
