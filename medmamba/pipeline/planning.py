"""plan(): verify a raw dataset, fingerprint it, decide, and preprocess."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medmamba.dataset import (
    Dataset,
    VerificationReport,
    make_splits,
    open_dataset,
    verify,
    write_splits,
)
from medmamba.dataset.splits import FOLDS
from medmamba.errors import DatasetError
from medmamba.files import require_writable_folder, to_json, to_plain, write_atomic
from medmamba.pipeline.work import Work, check_network_name, choose_configuration
from medmamba.plans.budget import Budget
from medmamba.plans.fingerprint import compute_fingerprint
from medmamba.plans.nnunet_schema import save_plan
from medmamba.plans.plan import Plan
from medmamba.plans.planner import make_plan
from medmamba.plans.preprocess import preprocess_dataset
from medmamba.plans.presets import load_preset

Progress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all)."""


@dataclass(frozen=True, kw_only=True)
class PlanOutcome:
    """What plan() decided and where it put things."""

    plan: Plan
    plan_path: Path
    stores: tuple[Path, ...]
    report: VerificationReport

    def summary(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "dataset": self.plan.dataset_name,
            "network": self.plan.network,
            "plan": str(self.plan_path),
            "preprocessed": [str(store) for store in self.stores],
            "reasons": [to_plain(reason) for reason in self.plan.reasons],
            "problems": [to_plain(problem) for problem in self.report.problems],
        }


def plan(
    dataset: Path | str,
    output: Path | str,
    *,
    network: str = "lightm_unet_s",
    memory_gb: float | None = None,
    device: Literal["cuda", "cpu"] = "cuda",
    configurations: tuple[str, ...] = (),
    spacing_mm: tuple[float, ...] | None = None,
    preprocess: bool = True,
    workers: int | None = None,
    on_verified: Callable[[VerificationReport], None] | None = None,
    on_progress: Progress | None = None,
) -> PlanOutcome:
    """Verify, fingerprint, plan and preprocess a raw dataset into a work folder.

    Args:
        dataset: nnU-Net v2 raw folder or Medical Segmentation Decathlon task folder.
        output: the work folder; made if needed, continued if interrupted.
        network: key of the shipped presets.
        memory_gb: memory of the target device; the preset's reference when None.
        device: ``cpu`` bounds the patch of Mamba networks by time as well.
        configurations: what to preprocess; the preferred one when empty.
        spacing_mm: target spacing (z, y, x) instead of the dataset's median.
        preprocess: False stops after the plan is written.
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
    raw = open_dataset(Path(dataset))
    work = Work(require_writable_folder(Path(output)))
    report = verify(raw, workers=workers, progress=_stage(on_progress, "verify"))
    write_atomic(work.verification, to_json(report))
    if on_verified is not None:
        on_verified(report)
    if report.fatal:
        raise DatasetError(_first_fatal(report, work.verification))
    budget = Budget(memory_gb=memory_gb, spacing_mm=spacing_mm, device=device)
    decided = _decide(raw, work, network, budget, workers=workers, on_progress=on_progress)
    stores: tuple[Path, ...] = ()
    if preprocess:
        wanted = configurations or (choose_configuration(decided, None),)
        stores = tuple(
            _preprocess(
                raw, work, decided, choose_configuration(decided, name), workers, on_progress
            )
            for name in wanted
        )
    return PlanOutcome(plan=decided, plan_path=work.plan(network), stores=stores, report=report)


def _decide(
    raw: Dataset,
    work: Work,
    network: str,
    budget: Budget,
    *,
    workers: int | None,
    on_progress: Progress | None,
) -> Plan:
    fingerprint = compute_fingerprint(
        raw,
        workers=workers,
        folder=work.folder / "fingerprint",
        progress=_stage(on_progress, "fingerprint"),
    )
    write_atomic(work.fingerprint, to_json(fingerprint))
    write_atomic(work.dataset_json, to_json(raw.description))
    decided = make_plan(fingerprint, raw.description, load_preset(network), budget)
    _write_splits(raw, work)
    save_plan(work.plan(network), decided)
    return decided


def _write_splits(raw: Dataset, work: Work) -> None:
    """Folds of the raw folder where it brings some, else nnU-Net's five where cases suffice."""
    if raw.splits:
        write_splits(work.splits, raw.splits)
    elif len(raw.training_cases) >= FOLDS:
        write_splits(work.splits, make_splits([case.id for case in raw.training_cases]))


def _preprocess(
    raw: Dataset,
    work: Work,
    decided: Plan,
    configuration: str,
    workers: int | None,
    on_progress: Progress | None,
) -> Path:
    store = work.store(configuration, decided.configurations[configuration])
    preprocess_dataset(
        raw,
        decided,
        configuration,
        store,
        workers=workers,
        progress=_stage(on_progress, f"preprocess {configuration}"),
    )
    return store


def _stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(name, done, total)


def _first_fatal(report: VerificationReport, path: Path) -> str:
    fatal = [problem for problem in report.problems if problem.severity == "fatal"]
    first = fatal[0]
    where = f"case {first.case}: " if first.case else ""
    return f"{where}{first.message} ({len(fatal)} fatal problem(s) in all, listed in {path}.)"
