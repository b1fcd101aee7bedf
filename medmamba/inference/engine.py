"""Many cases, none lost: each is committed by itself, and one that goes wrong costs no other.

Here everything happens in one process; ``supervision`` does the same with the networks in another,
which may die. What happens inside a case is ``casework``'s, how cases overlap ``overlap``'s; no
torch here.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from medmamba.dataset import Case, Rejection
from medmamba.errors import UsageError
from medmamba.files import require_writable_folder
from medmamba.inference.casework import CaseWork, OnTiles
from medmamba.inference.draining import DEFAULT_GRACE_S, DrainRequest, drain_on_signals
from medmamba.inference.history import records_of_run
from medmamba.inference.job import CasePredictor, Job
from medmamba.inference.journal import OnEvent, Run, sweep_temporary_files
from medmamba.inference.ledger import Ledger
from medmamba.inference.overlap import PREFETCH_BYTES, Work, take_from, work_through
from medmamba.inference.records import DONE, CommitRecord, ModelIdentity
from medmamba.io import DEFAULT_GATE, Gate
from medmamba.io.dicom_seg import SegmentLabel

logger = logging.getLogger(__name__)

Overwrite = Literal["never", "stale", "always"]
FailOn = Literal["any", "all", "never"]

OnCase = Callable[[CommitRecord, int, int, float], None]
"""Called per finished case with (record, done, total, seconds left).

Where nobody knows how much is to come, the total is what is done.
"""

EXIT_SOME_FAILED = 4
EXIT_NONE_SUCCEEDED = 5


@dataclass(frozen=True, kw_only=True)
class PredictionRun:
    """What a run did.

    Args:
        folder: where the masks are.
        run_id: its folder is ``run/<run_id>``.
        counts: cases that were decided, by status.
        total: cases asked for.
        exit_code: of a process that did this and nothing else.
        elapsed_s: seconds in all.
    """

    folder: Path
    run_id: str
    counts: dict[str, int]
    total: int
    exit_code: int
    elapsed_s: float

    @property
    def records(self) -> tuple[CommitRecord, ...]:
        """One per case that was decided, sorted by case; read from disk anew."""
        return tuple(records_of_run(self.folder, self.run_id))

    @property
    def succeeded(self) -> int:
        """Cases that have a mask."""
        return sum(self.counts.get(status, 0) for status in DONE)


def predict_cases(
    cases: Iterable[Work],
    folder: Path,
    predictor: CasePredictor,
    *,
    model: ModelIdentity,
    rejected: Sequence[Rejection] = (),
    total: int | None = None,
    shard: str = "",
    overwrite: Overwrite = "stale",
    fail_on: FailOn = "any",
    max_failures: int | None = None,
    grace_s: float = DEFAULT_GRACE_S,
    drain: DrainRequest | None = None,
    prefetch_bytes: int = PREFETCH_BYTES,
    gate: Gate = DEFAULT_GATE,
    segments: Sequence[SegmentLabel] = (),
    on_case: OnCase | None = None,
    on_tiles: OnTiles | None = None,
    on_event: OnEvent | None = None,
    channel_names: Sequence[str] = (),
    budget_bytes: int | None = None,
) -> PredictionRun:
    """Write a mask and a commit record for each case, and a summary of the run.

    Args:
        cases: what to predict; a stream is read one case ahead and never kept.
        folder: where masks and records go.
        predictor: the networks, with preprocessing and restoring.
        model: identity that goes into records and keys.
        rejected: cases turned away before, to be recorded with the rest.
        total: length of a stream, where somebody knows it.
        shard: which share of the work this is, as INDEX/COUNT; for the journal.
        overwrite: ``stale`` redoes a case whose input, model or parameters changed, or whose mask
            was edited; ``never`` keeps whatever is done; ``always`` redoes everything.
        fail_on: which failures show in the exit code.
        max_failures: stop after so many cases without a mask.
        grace_s: a case that will be done within this time after a signal is finished.
        drain: whether the run is asked to end, where the caller handles signals.
        prefetch_bytes: memory up to which the next case is read ahead.
        gate: limits and permissions of reading.
        segments: names, codes and colours of what DICOM outputs hold; by label names when empty.
        on_case: called per finished case.
        on_tiles: called within a case, for those that take long.
        on_event: called with every event of the journal.
        channel_names: what the model calls its channels.
        budget_bytes: memory that a case may take; None for no limit.

    Raises:
        EnvironmentFault: the folder cannot be written.
        UsageError: the folder holds the inputs.
    """
    prepare_folder(cases, folder)
    run = Run(folder, on_event=on_event)
    parameters = predictor.parameters()
    ledger = Ledger(
        folder, run=run, model=model, parameters=parameters, numerics=predictor.numerics(),
        overwrite=overwrite,
    )  # fmt: skip
    work = CaseWork(
        ledger, predictor, gate=gate, segments=segments, on_tiles=on_tiles,
        channel_names=channel_names, budget_bytes=budget_bytes,
    )  # fmt: skip
    total = count_work(cases, rejected, total)
    tally = Tally(total, on_case=on_case, max_failures=max_failures)
    with run, nullcontext(drain) if drain else drain_on_signals(grace_s) as drain:
        run.log("started", cases=total, rejected=len(rejected), shard=shard)
        _work_through(work, chain(rejected, cases), ledger, tally, drain, prefetch_bytes)
        exit_code = drain.exit_code or tally.exit_code(fail_on)
        finish_run(run, folder, exit_code, model, parameters, overwrite)
    return tally.outcome(run, folder, exit_code)


def finish_run(
    run: Run,
    folder: Path,
    exit_code: int,
    model: ModelIdentity,
    parameters: Mapping[str, Any],
    overwrite: str,
) -> None:
    """Seal the journal of a run and sum it up, whatever engine it had."""
    context = {"model": model, "parameters": parameters, "overwrite": overwrite}
    run.finish(records_of_run(folder, run.run_id), context=context, exit_code=exit_code)


def count_work(
    cases: Iterable[Work], rejected: Sequence[Rejection], total: int | None
) -> int | None:
    """Return how many cases are asked for; of a stream, what its giver knows."""
    return len(cases) + len(rejected) if isinstance(cases, Sequence) else total


def prepare_folder(cases: Iterable[Work], folder: Path) -> None:
    """Make an output folder ready for a run.

    Raises:
        EnvironmentFault: it cannot be written.
        UsageError: it holds the inputs.
    """
    if isinstance(cases, Sequence):  # a stream judges its cases one by one
        _require_apart(cases, folder)
    require_writable_folder(folder)
    sweep_temporary_files(folder)


class Tally:
    """The cases that were decided in a run.

    Args:
        total: cases asked for, where it is known.
        on_case: called per decided case.
        max_failures: stop after so many cases without a mask.
    """

    def __init__(
        self, total: int | None, *, on_case: OnCase | None = None, max_failures: int | None = None
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._total = total
        self._on_case = on_case
        self._max_failures = max_failures
        self._started = time.monotonic()
        self._lock = threading.Lock()

    @property
    def total(self) -> int:
        """Cases asked for, as far as is known."""
        return self.counts.total() if self._total is None else self._total

    def report(self, record: CommitRecord) -> None:
        """Count a decided case and tell whoever wants to know."""
        with self._lock:
            self.counts[record.status] += 1
            done = self.counts.total()
            worked = done - self.counts["skipped"]
            pace = (time.monotonic() - self._started) / max(1, worked)
            if self._on_case is not None:
                self._on_case(record, done, self.total, pace * (self.total - done))

    @property
    def failed_too_often(self) -> bool:
        """Whether no more cases are to be begun because too many had no mask."""
        if self._max_failures is None:
            return False
        return self.counts.total() - self._succeeded >= self._max_failures

    @property
    def _succeeded(self) -> int:
        return sum(self.counts[status] for status in DONE)

    def exit_code(self, fail_on: FailOn) -> int:
        """Of a run that was not interrupted."""
        if fail_on == "never" or self._succeeded == self.counts.total():
            return 0
        if self._succeeded == 0:
            return EXIT_NONE_SUCCEEDED
        return EXIT_SOME_FAILED if fail_on == "any" else 0

    def outcome(self, run: Run, folder: Path, exit_code: int) -> PredictionRun:
        """Return the run as a value."""
        if self.failed_too_often:
            logger.warning("%s cases failed; stopped as asked", self._max_failures)
        return PredictionRun(
            folder=folder,
            run_id=run.run_id,
            counts=dict(self.counts),
            total=self.total,
            exit_code=exit_code,
            elapsed_s=time.monotonic() - self._started,
        )


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


def _require_apart(cases: Sequence[Work], folder: Path) -> None:
    """Masks must never land among, above or instead of the inputs."""
    target = folder.resolve()
    images = {path for case in cases if isinstance(case, Case) for path in case.images}
    for series in filter(Path.is_dir, images):
        if target.is_relative_to(series.resolve()):
            raise UsageError(
                f"output folder {folder}: lies inside an input series ({series}). "
                "Choose another folder for the masks."
            )
    for place in {path.parent for path in images}:
        if place.resolve().is_relative_to(target):
            raise UsageError(
                f"output folder {folder}: it holds the input images ({place}). "
                "Choose another folder for the masks."
            )
