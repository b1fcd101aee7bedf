"""The process that holds the model: takes cases from its supervisor and says what became of each.

It keeps no books and decides on no second tries; ``supervision`` does. Messages are dictionaries
with one of these keys.

From the supervisor: ``setup`` (once, first), ``case``, ``drain``. When there are no more cases it
just ends the process.
To the supervisor: ``hello`` (with the token of temporary files, and the version), ``ready`` (the
predictor's parameters), ``stage``, ``tiles``, ``log``, ``settled``, ``ended``, ``fault``.
"""

import logging
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from medmamba import __version__
from medmamba.dataset import Case
from medmamba.errors import MedMambaError
from medmamba.files import PROCESS_TOKEN, RECORD_CONFIG, from_plain, to_plain
from medmamba.inference.casework import CaseWork
from medmamba.inference.draining import DrainRequest
from medmamba.inference.job import CasePredictor, Job
from medmamba.inference.journal import set_aside
from medmamba.inference.ledger import Ledger
from medmamba.inference.overlap import PREFETCH_BYTES, work_through
from medmamba.inference.records import ModelIdentity
from medmamba.inference.worker_process import EXIT_DEVICE_LOST, Supervisor
from medmamba.io import DEFAULT_GATE, Gate
from medmamba.io.dicom_seg import SegmentLabel

T = TypeVar("T")

TILES_EVERY_S = 0.5
"""Progress within a case is told no more often."""


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """What a worker is told once.

    Args:
        folder: where masks and records go.
        model: identity that goes into records.
        options: what the predictor is made from; the maker's affair.
        run_folder: where masks that no record vouches for are set aside; the supervisor's affair.
        overwrite: see ``engine.predict_cases``.
        gate: limits and permissions of reading.
        segments: what DICOM outputs hold.
        channel_names: what the model calls its channels.
        orientation: where axes must point for the networks; as stored when empty.
        budget_bytes: memory that a case may take; None for no limit.
        prefetch_bytes: memory up to which the next case is read ahead.
        grace_s: a case that will be done within this time after a signal is finished.
        log_level: of the worker's messages on standard error.
    """

    __pydantic_config__ = RECORD_CONFIG

    folder: Path
    model: ModelIdentity
    options: dict[str, Any]
    run_folder: Path = Path()
    overwrite: str = "stale"
    gate: Gate = DEFAULT_GATE
    segments: tuple[SegmentLabel, ...] = ()
    channel_names: tuple[str, ...] = ()
    orientation: str = ""
    budget_bytes: int | None = None
    prefetch_bytes: int = PREFETCH_BYTES
    grace_s: float = 0.0
    log_level: int = logging.WARNING


MakePredictor = Callable[[WorkerSetup], tuple[CasePredictor, dict[str, Any]]]
"""Loads a model; the second value is told to the supervisor."""


def serve(make: MakePredictor, supervisor: Supervisor) -> None:
    """Work for a supervisor until it says to stop."""
    supervisor.tell(hello=PROCESS_TOKEN, version=__version__)
    try:
        setup = from_plain(
            WorkerSetup, supervisor.hear()["setup"], what="worker", error=MedMambaError
        )
        logging.basicConfig(level=setup.log_level, format="%(levelname)s: %(message)s")
        _work(setup, *make(setup), supervisor)
    except MedMambaError as error:
        supervisor.tell(fault=type(error).__name__, message=error.message, code=error.code)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        supervisor.tell(fault="", message=text, trace=traceback.format_exc())
    else:
        supervisor.tell(ended=True)


def _work(
    setup: WorkerSetup, predictor: CasePredictor, about: dict[str, Any], supervisor: Supervisor
) -> None:
    parameters, numerics = predictor.parameters(), predictor.numerics()
    ledger = Ledger(
        setup.folder, run=_RemoteRun(supervisor, setup.run_folder), model=setup.model,
        parameters=parameters, numerics=numerics, overwrite=setup.overwrite,
    )  # fmt: skip
    work = CaseWork(
        ledger, predictor, gate=setup.gate, segments=setup.segments,
        on_tiles=_tiles_to(supervisor), channel_names=setup.channel_names,
        orientation=setup.orientation,
        budget_bytes=setup.budget_bytes,
    )  # fmt: skip
    supervisor.tell(ready=to_plain(parameters), numerics=to_plain(numerics), about=about)
    inbox = _Inbox(supervisor, DrainRequest(setup.grace_s))
    work_through(
        _Announced(work, supervisor),
        inbox.take,
        settle=lambda job: _settle(job, supervisor),
        drain=inbox.drain,
        may_go_on=lambda: not inbox.drain.requested,
        prefetch_bytes=setup.prefetch_bytes,
    )


def _settle(job: Job, supervisor: Supervisor) -> None:
    record = None if job.record is None else to_plain(job.record)
    supervisor.tell(settled=job.case.id, record=record, short_of_memory=job.short_of_memory)


def _tiles_to(supervisor: Supervisor) -> Callable[[str, int, int], None]:
    last = [0.0]

    def tell(case_id: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done >= total or now - last[0] >= TILES_EVERY_S:
            last[0] = now
            supervisor.tell(tiles=case_id, done=done, total=total)

    return tell


class _RemoteRun:
    """A run whose journal is written by the supervisor."""

    def __init__(self, supervisor: Supervisor, folder: Path) -> None:
        self._supervisor = supervisor
        self._folder = folder

    def log(self, event: str, **values: Any) -> None:
        """Note one event."""
        self._supervisor.tell(log=event, values=values)

    def set_aside(self, path: Path) -> None:
        """Keep a mask that no record vouches for as evidence."""
        set_aside(path, self._folder)


class _Inbox:
    """Cases and orders as they come; a thread of its own hears them, even amid a long case."""

    def __init__(self, supervisor: Supervisor, drain: DrainRequest) -> None:
        self.drain = drain
        self._supervisor = supervisor
        self._cases: queue.Queue[Case | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def take(self, wait: bool) -> Case | None:
        """Give the next case; see ``overlap.Take``."""
        try:
            case = self._cases.get(block=wait)
        except queue.Empty:
            return None
        if case is None:
            self._cases.put(None)  # there are no more, however often one asks
        return case

    def _listen(self) -> None:
        while True:
            message = self._supervisor.hear()
            if "case" in message:
                images: Sequence[str] = message["images"]
                case = Case(
                    id=message["case"],
                    images=tuple(map(Path, images)),
                    acquisition=message["acquisition"],
                )
                self._cases.put(case)
            elif "drain" in message:
                self.drain.signal_number = message["drain"]
                self._cases.put(None)


class _Announced:
    """The stages of a case, each told when it begins and when it ends."""

    def __init__(self, work: CaseWork, supervisor: Supervisor) -> None:
        self._work = work
        self._supervisor = supervisor

    def expected_bytes(self, case: Case) -> int:
        """Return the memory that reading a case will take; its file may be one that never ends."""
        return self._announce("read", case, lambda: self._work.expected_bytes(case))

    def read(self, case: Case) -> Job:
        """Read and preprocess."""
        return self._announce("read", case, lambda: self._work.read(case))

    def infer(self, job: Job, drain: DrainRequest) -> Job:
        """Run the networks."""
        job = self._announce("infer", job.case, lambda: self._work.infer(job, drain))
        if job.device_lost:
            os._exit(EXIT_DEVICE_LOST)  # only another process can use the device again
        return job

    def export(self, job: Job) -> Job:
        """Write mask and record."""
        return self._announce("export", job.case, lambda: self._work.export(job))

    def _announce(self, stage: str, case: Case, do: Callable[[], T]) -> T:
        self._supervisor.tell(stage=stage, case=case.id)
        result = do()
        self._supervisor.tell(stage="", case=case.id)
        return result
