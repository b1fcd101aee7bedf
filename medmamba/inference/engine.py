"""Many cases, none lost: each is committed by itself, and one that goes wrong costs no other.

Here everything happens in one process; ``supervision`` does the same with the networks in another,
which may die. What happens inside a case is ``casework``'s, how cases overlap ``overlap``'s; no
torch here.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

from medmamba.dataset import Case, Rejection
from medmamba.inference.assignment import Assignment, PredictionRun, Tally
from medmamba.inference.casework import CaseWork
from medmamba.inference.draining import DEFAULT_GRACE_S, DrainRequest, drain_on_signals
from medmamba.inference.history import records_of_run
from medmamba.inference.job import CasePredictor, Job
from medmamba.inference.journal import Run
from medmamba.inference.ledger import Ledger
from medmamba.inference.overlap import PREFETCH_BYTES, Work, take_from, work_through
from medmamba.inference.records import ModelIdentity
from medmamba.io import DEFAULT_GATE, Gate
from medmamba.io.dicom_seg import SegmentLabel

logger = logging.getLogger(__name__)

Overwrite = Literal["never", "stale", "always"]


def predict_cases(
    assignment: Assignment,
    folder: Path,
    predictor: CasePredictor,
    *,
    model: ModelIdentity,
    overwrite: Overwrite = "stale",
    grace_s: float = DEFAULT_GRACE_S,
    drain: DrainRequest | None = None,
    prefetch_bytes: int = PREFETCH_BYTES,
    gate: Gate = DEFAULT_GATE,
    segments: Sequence[SegmentLabel] = (),
    channel_names: Sequence[str] = (),
    orientation: str = "",
    budget_bytes: int | None = None,
) -> PredictionRun:
    """Write a mask and a commit record for each case, and a summary of the run.

    Args:
        assignment: what to predict, and whom to tell.
        folder: where masks and records go.
        predictor: the networks, with preprocessing and restoring.
        model: identity that goes into records and keys.
        overwrite: ``stale`` redoes a case whose input, model or parameters changed, or whose mask
            was edited; ``never`` keeps whatever is done; ``always`` redoes everything.
        grace_s: a case that will be done within this time after a signal is finished.
        drain: whether the run is asked to end, where the caller handles signals.
        prefetch_bytes: memory up to which the next case is read ahead.
        gate: limits and permissions of reading.
        segments: names, codes and colours of what DICOM outputs hold; by label names when empty.
        channel_names: what the model calls its channels.
        orientation: where axes must point for the networks; as stored when empty.
        budget_bytes: memory that a case may take; None for no limit.

    Raises:
        EnvironmentFault: the folder cannot be written.
        UsageError: the folder holds the inputs.
    """
    assignment.prepare_folder(folder)
    run = Run(folder, on_event=assignment.on_event)
    parameters = predictor.parameters()
    ledger = Ledger(
        folder, run=run, model=model, parameters=parameters, numerics=predictor.numerics(),
        overwrite=overwrite,
    )  # fmt: skip
    work = CaseWork(
        ledger, predictor, gate=gate, segments=segments, on_tiles=assignment.on_tiles,
        channel_names=channel_names, orientation=orientation, budget_bytes=budget_bytes,
    )  # fmt: skip
    tally = Tally(assignment)
    with run, nullcontext(drain) if drain else drain_on_signals(grace_s) as drain:
        run.log("started", **assignment.describe())
        _work_through(work, assignment.work, ledger, tally, drain, prefetch_bytes)
        exit_code = drain.exit_code or tally.exit_code
        finish_run(run, folder, exit_code, model, parameters, overwrite, assignment.request)
    return tally.outcome(run.run_id, folder, exit_code)


def finish_run(
    run: Run,
    folder: Path,
    exit_code: int,
    model: ModelIdentity,
    parameters: Mapping[str, Any],
    overwrite: str,
    request: Mapping[str, Any],
) -> None:
    """Seal the journal of a run and sum it up, whatever engine it had."""
    context = {
        "model": model, "parameters": parameters, "overwrite": overwrite, "request": request,
    }  # fmt: skip
    run.finish(records_of_run(folder, run.run_id), context=context, exit_code=exit_code)


def _work_through(
    work: CaseWork,
    cases: Iterable[Work],
    ledger: Ledger,
    tally: Tally,
    drain: DrainRequest,
    prefetch_bytes: int,
) -> None:
    """Work through all cases, then one by one through those that did not fit beside another."""
    short: list[Case] = []

    def settle(job: Job, *, last_try: bool = False) -> None:
        if job.short_of_memory and not last_try:
            short.append(job.case)
        elif job.record is not None:
            tally.report(job.record)

    def refuse(rejection: Rejection) -> None:
        tally.report(ledger.refuse(rejection))

    def may_go_on() -> bool:
        return not (drain.requested or tally.failed_too_often)

    go = partial(
        work_through, work, drain=drain, may_go_on=may_go_on, prefetch_bytes=prefetch_bytes
    )
    go(take_from(cases, refuse=refuse, may_go_on=may_go_on), settle=settle)
    for case in short:
        logger.warning("case %s: host memory ran out; trying once more, alone", case.id)
        again = take_from([case], refuse=refuse, may_go_on=may_go_on)
        go(again, settle=partial(settle, last_try=True))
