"""Many cases, none lost: read ahead, predict, export behind, and commit each case by itself.

While the network runs on one case, a thread reads and preprocesses the next and another restores
and writes the previous one; there is never more than one case ahead. A case that goes wrong is
recorded and costs no other. What happens inside a case is ``casework``'s; no torch here.
"""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medmamba.dataset import Case, Rejection
from medmamba.errors import UsageError
from medmamba.files import require_writable_folder
from medmamba.inference.casework import CaseWork, OnTiles
from medmamba.inference.draining import DEFAULT_GRACE_S, DrainRequest, drain_on_signals
from medmamba.inference.job import CasePredictor, Job
from medmamba.inference.journal import Run, sweep_temporary_files
from medmamba.inference.records import CommitRecord, ModelIdentity
from medmamba.io import DEFAULT_GATE, Gate
from medmamba.io.dicom_seg import SegmentLabel

logger = logging.getLogger(__name__)

Overwrite = Literal["never", "stale", "always"]
FailOn = Literal["any", "all", "never"]

OnCase = Callable[[CommitRecord, int, int, float], None]
"""Called per finished case with (record, done, total, seconds left)."""

EXIT_SOME_FAILED = 4
EXIT_NONE_SUCCEEDED = 5

PREFETCH_BYTES = 2 * 2**30
"""The next case is read ahead only while those in work take less memory than this."""


@dataclass(frozen=True, kw_only=True)
class PredictionRun:
    """What a run did.

    Args:
        folder: where the masks are.
        run_id: its folder is ``run/<run_id>``.
        records: one per case that was decided, in order of completion.
        total: cases asked for.
        exit_code: of a process that did this and nothing else.
        elapsed_s: seconds in all.
    """

    folder: Path
    run_id: str
    records: tuple[CommitRecord, ...]
    total: int
    exit_code: int
    elapsed_s: float

    @property
    def succeeded(self) -> int:
        """Cases that have a mask."""
        return sum(record.succeeded for record in self.records)


def predict_cases(
    cases: Sequence[Case],
    folder: Path,
    predictor: CasePredictor,
    *,
    model: ModelIdentity,
    rejected: Sequence[Rejection] = (),
    overwrite: Overwrite = "stale",
    fail_on: FailOn = "any",
    max_failures: int | None = None,
    grace_s: float = DEFAULT_GRACE_S,
    prefetch_bytes: int = PREFETCH_BYTES,
    gate: Gate = DEFAULT_GATE,
    segments: Sequence[SegmentLabel] = (),
    on_case: OnCase | None = None,
    on_tiles: OnTiles | None = None,
) -> PredictionRun:
    """Write a mask and a commit record for each case, and a summary of the run.

    Args:
        cases: what to predict.
        folder: where masks and records go.
        predictor: the networks, with preprocessing and restoring.
        model: identity that goes into records and keys.
        rejected: cases turned away before, to be recorded with the rest.
        overwrite: ``stale`` redoes a case whose input, model or parameters changed, or whose mask
            was edited; ``never`` keeps whatever is done; ``always`` redoes everything.
        fail_on: which failures show in the exit code.
        max_failures: stop after so many cases without a mask.
        grace_s: a case that will be done within this time after a signal is finished.
        prefetch_bytes: memory up to which the next case is read ahead.
        gate: limits and permissions of reading.
        segments: names, codes and colours of what DICOM outputs hold; by label names when empty.
        on_case: called per finished case.
        on_tiles: called within a case, for those that take long.

    Raises:
        EnvironmentFault: the folder cannot be written.
        UsageError: the folder holds the inputs.
    """
    start = time.monotonic()
    _require_apart(cases, folder)
    require_writable_folder(folder)
    sweep_temporary_files(folder)
    run = Run(folder)
    work = CaseWork(
        folder,
        predictor,
        model=model,
        run=run,
        overwrite=overwrite,
        gate=gate,
        segments=segments,
        on_tiles=on_tiles,
    )
    total = len(cases) + len(rejected)
    context = {"model": model, "parameters": predictor.parameters(), "overwrite": overwrite}
    with run, drain_on_signals(grace_s) as drain:
        run.log("started", cases=total, rejected=len(rejected))
        batch = _Batch(
            work,
            drain,
            total=total,
            on_case=on_case,
            max_failures=max_failures,
            prefetch_bytes=prefetch_bytes,
        )
        batch.run(cases, rejected)
        exit_code = drain.exit_code or _exit_code(batch.records, fail_on)
        run.finish(batch.records, context=context, exit_code=exit_code)
    return PredictionRun(
        folder=folder,
        run_id=run.run_id,
        records=tuple(batch.records),
        total=total,
        exit_code=exit_code,
        elapsed_s=time.monotonic() - start,
    )


class _Batch:
    """The loop over cases and its three places of work: reader, network, writer."""

    def __init__(
        self,
        work: CaseWork,
        drain: DrainRequest,
        *,
        total: int,
        on_case: OnCase | None,
        max_failures: int | None,
        prefetch_bytes: int,
    ) -> None:
        self.records: list[CommitRecord] = []
        self._work = work
        self._drain = drain
        self._total = total
        self._on_case = on_case
        self._max_failures = max_failures
        self._prefetch_bytes = prefetch_bytes
        self._started = time.monotonic()
        self._short_of_memory: list[Case] = []

    def run(self, cases: Sequence[Case], rejected: Sequence[Rejection]) -> None:
        """Work through all cases, then alone through those that did not fit beside another."""
        for rejection in rejected:
            self.report(self._work.refuse(rejection))
        with ThreadPoolExecutor(1, "reader") as reader, ThreadPoolExecutor(1, "writer") as writer:
            self._overlapped(list(cases), reader, writer)
        for case in self._short_of_memory:
            if self._may_go_on():
                logger.warning("case %s: host memory ran out; trying once more, alone", case.id)
                job = self._work.infer(self._work.read(case), self._drain)
                self._settle(self._work.export(job), last_try=True)

    def report(self, record: CommitRecord) -> None:
        """Count a decided case and tell whoever wants to know."""
        self.records.append(record)
        if self._on_case is not None:
            done = len(self.records)
            worked = sum(known.status != "skipped" for known in self.records)
            pace = (time.monotonic() - self._started) / max(1, worked)
            self._on_case(record, done, self._total, pace * (self._total - done))

    def _overlapped(
        self, cases: list[Case], reader: ThreadPoolExecutor, writer: ThreadPoolExecutor
    ) -> None:
        upcoming: Future[Job] | None = None
        exporting: Future[Job] | None = None
        for index, case in enumerate(cases):
            if not self._may_go_on():
                break
            job = upcoming.result() if upcoming else self._work.read(case)
            upcoming = None
            following = cases[index + 1] if index + 1 < len(cases) else None
            if following is not None and self._fits_beside(job, following):
                upcoming = reader.submit(self._work.read, following)
            job = self._work.infer(job, self._drain)
            if exporting is not None:
                self._settle(exporting.result())
            exporting = writer.submit(self._work.export, job)
        if exporting is not None:
            self._settle(exporting.result())

    def _fits_beside(self, job: Job, following: Case) -> bool:
        return job.memory_bytes + self._work.expected_bytes(following) < self._prefetch_bytes

    def _settle(self, job: Job, *, last_try: bool = False) -> None:
        if job.short_of_memory and not last_try:
            self._short_of_memory.append(job.case)
        elif job.record is not None:
            self.report(job.record)

    def _may_go_on(self) -> bool:
        failures = sum(not record.succeeded for record in self.records)
        if self._max_failures is not None and failures >= self._max_failures:
            logger.warning("%d cases failed; stopping as asked", failures)
            return False
        return not self._drain.requested


def _exit_code(records: Sequence[CommitRecord], fail_on: FailOn) -> int:
    succeeded = sum(record.succeeded for record in records)
    if fail_on == "never" or succeeded == len(records):
        return 0
    if succeeded == 0:
        return EXIT_NONE_SUCCEEDED
    return EXIT_SOME_FAILED if fail_on == "any" else 0


def _require_apart(cases: Sequence[Case], folder: Path) -> None:
    """Masks must never land among, above or instead of the inputs."""
    target = folder.resolve()
    images = {path for case in cases for path in case.images}
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
