"""What a run is asked to do, whom it tells, and how it ends: the same for every engine.

``engine`` works in one process, ``supervision`` with a child, ``cluster_prediction`` on many
machines. No torch here.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from medmamba.dataset import Case, Rejection
from medmamba.errors import SecurityError, UsageError
from medmamba.files import require_writable_folder
from medmamba.inference.casework import OnTiles
from medmamba.inference.history import records_of_run
from medmamba.inference.journal import OnEvent, sweep_temporary_files
from medmamba.inference.overlap import Work
from medmamba.inference.records import DONE, CommitRecord

logger = logging.getLogger(__name__)

FailOn = Literal["any", "all", "never"]

OnCase = Callable[[CommitRecord, int, int, float], None]
"""Called per finished case with (record, done, total, seconds left).

Where nobody knows how much is to come, the total is what is done.
"""

OnReady = Callable[[dict[str, Any]], None]
"""Called with what a worker says of its predictor, when the first one has loaded the model."""

EXIT_SOME_FAILED = 4
EXIT_NONE_SUCCEEDED = 5

UNSAFE = frozenset({"E_PATH_UNSAFE", "E_PATH_ESCAPE"})
"""Rejections that speak of somebody who means harm, or of a list that was put together wrongly."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """The cases of a run, and what its caller wants to know of them.

    Args:
        cases: what to predict; a stream is read a little ahead and never kept.
        rejected: cases turned away before, to be recorded with the rest.
        total: length of a stream, where somebody knows it.
        shard: which share of the work this is, as INDEX/COUNT; for the journal.
        request: what was asked for, and of which machine, as JSON values; for the run's manifest.
        fail_on: which failures show in the exit code.
        alert: end with the exit code of a security refusal where names or paths are unsafe.
        max_failures: stop after so many cases without a mask.
        on_case: called per finished case.
        on_tiles: called within a case, for those that take long.
        on_event: called with every event of the journal.
        on_ready: called once, when a worker has loaded the model.
    """

    cases: Iterable[Work]
    rejected: Sequence[Rejection] = ()
    total: int | None = None
    shard: str = ""
    request: Mapping[str, Any] = field(default_factory=dict)
    fail_on: FailOn = "any"
    alert: bool = False
    max_failures: int | None = None
    on_case: OnCase | None = None
    on_tiles: OnTiles | None = None
    on_event: OnEvent | None = None
    on_ready: OnReady | None = None

    @property
    def work(self) -> Iterator[Work]:
        """What was turned away, then the cases."""
        return chain(self.rejected, self.cases)

    @property
    def asked_for(self) -> int | None:
        """How many cases; of a stream, what its giver knows."""
        if isinstance(self.cases, Sequence):
            return len(self.cases) + len(self.rejected)
        return self.total

    def describe(self) -> dict[str, Any]:
        """What the journal says when the run begins."""
        return {"cases": self.asked_for, "rejected": len(self.rejected), "shard": self.shard}

    def prepare_folder(self, folder: Path) -> None:
        """Make an output folder ready for a run.

        Raises:
            EnvironmentFault: it cannot be written.
            UsageError: it holds the inputs.
        """
        if isinstance(self.cases, Sequence):  # a stream judges its cases one by one
            _require_apart(self.cases, folder)
        require_writable_folder(folder)
        sweep_temporary_files(folder)


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


class Tally:
    """The cases that were decided in a run.

    Args:
        assignment: what was asked for.
    """

    def __init__(self, assignment: Assignment) -> None:
        self.counts: Counter[str] = Counter()
        self._assignment = assignment
        self._total = assignment.asked_for
        self._unsafe = 0
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
            self._unsafe += record.error is not None and record.error.code in UNSAFE
            done = self.counts.total()
            worked = done - self.counts["skipped"]
            pace = (time.monotonic() - self._started) / max(1, worked)
            if self._assignment.on_case is not None:
                self._assignment.on_case(record, done, self.total, pace * (self.total - done))

    @property
    def failed_too_often(self) -> bool:
        """Whether no more cases are to be begun because too many had no mask."""
        if self._assignment.max_failures is None:
            return False
        return self.counts.total() - self._succeeded >= self._assignment.max_failures

    @property
    def _succeeded(self) -> int:
        return sum(self.counts[status] for status in DONE)

    @property
    def exit_code(self) -> int:
        """Of a run that was not interrupted."""
        fail_on = self._assignment.fail_on
        if fail_on == "never" or self._succeeded == self.counts.total():
            return 0
        if self._assignment.alert and self._unsafe:
            return SecurityError.exit_code
        if self._succeeded == 0:
            return EXIT_NONE_SUCCEEDED
        return EXIT_SOME_FAILED if fail_on == "any" else 0

    def outcome(self, run_id: str, folder: Path, exit_code: int) -> PredictionRun:
        """Return the run as a value."""
        if self.failed_too_often:
            failures = self._assignment.max_failures
            logger.warning("%s cases failed; stopped as asked", failures)
        return PredictionRun(
            folder=folder,
            run_id=run_id,
            counts=dict(self.counts),
            total=self.total,
            exit_code=exit_code,
            elapsed_s=time.monotonic() - self._started,
        )


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
