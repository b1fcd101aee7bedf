"""Prediction on a Ray cluster: workers that keep the model, and a driver that keeps the books.

The driver streams cases, a few ahead of the workers, writes the journal, and decides on second
tries: a process or machine that is lost is not the case's fault, and its cases go to another
worker; a case that has lost three workers is set aside as poison; what a worker says of a case is
final. Commit records are the only ledger: a case whose record holds is never computed again. No
torch here.
"""

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from medmamba import __version__
from medmamba.dataset import Case, Rejection
from medmamba.errors import BundleError, EnvironmentFault, MedMambaError
from medmamba.files import from_plain
from medmamba.inference.assignment import Assignment, OnReady, PredictionRun, Tally
from medmamba.inference.draining import DrainRequest
from medmamba.inference.engine import finish_run
from medmamba.inference.job import Job
from medmamba.inference.journal import Run, sweep_temporary_files
from medmamba.inference.ledger import Ledger
from medmamba.inference.overlap import Work
from medmamba.inference.records import CaseError, CommitRecord
from medmamba.inference.worker import WorkerSetup
from medmamba.pipeline.cluster import Needs
from medmamba.pipeline.cluster_worker import MakePredictor, Segmenter

logger = logging.getLogger(__name__)

LOSSES_ALLOWED = 3
"""Workers that a case may lose before it is taken for the cause."""
FAILED_STARTS_ALLOWED = 5
"""Workers in a row that may be lost while they load the model."""
HANDED_OUT = 2
"""Cases a worker holds: one in the network, one being read or written."""
POLL_S = 0.2
GROW_EVERY_S = 5.0
"""How often the driver looks whether the cluster has room for more workers."""


def predict_on_cluster(
    ray: ModuleType,
    assignment: Assignment,
    setup: WorkerSetup,
    make: MakePredictor,
    drain: DrainRequest,
    *,
    needs: Needs,
    timeout_s: float | None = None,
) -> PredictionRun:
    """Write a mask and a commit record for each case, as ``engine.predict_cases`` does.

    Args:
        ray: from ``cluster.ray_cluster``.
        assignment: what to predict, and whom to tell; not of tiles.
        setup: what workers are told; its ``run_folder`` is filled in here.
        make: makes the predictor in a worker; it must be importable there.
        drain: whether and by which signal the run is asked to end.
        needs: of one worker.
        timeout_s: a case that takes longer than this is given up with its worker.

    Raises:
        BundleError: workers differ from the driver or among each other.
        MedMambaError: what a worker met that concerns the whole run.
        EnvironmentFault: the folder cannot be written, or workers are lost before they begin.
    """
    assignment.prepare_folder(setup.folder)
    run = Run(setup.folder, on_event=assignment.on_event)
    tally = Tally(assignment)
    with run:
        run.log("started", **assignment.describe(), engine="ray")
        driver = _Driver(
            ray, replace(setup, run_folder=run.folder), make, drain, tally, run,
            needs=needs, timeout_s=timeout_s, on_ready=assignment.on_ready,
        )  # fmt: skip
        try:
            driver.run(assignment.work)
        finally:
            driver.close()
        exit_code = drain.exit_code or tally.exit_code
        finish_run(
            run, setup.folder, exit_code, setup.model, driver.parameters, setup.overwrite,
            assignment.request,
        )  # fmt: skip
    # What killed workers were writing; nobody does any more, unless another run is there.
    sweep_temporary_files(setup.folder)
    return tally.outcome(run.run_id, setup.folder, exit_code)


@dataclass(kw_only=True)
class _Task:
    """A case that is not decided; ``alone`` once it may have taken a worker with it."""

    case: Case
    alone: bool = False
    losses: int = 0


@dataclass(kw_only=True)
class _Worker:
    """A worker, by number, and what it has to do."""

    number: int
    actor: Any
    joining: Any
    ready: bool = False
    tasks: dict[Any, _Task] = field(default_factory=dict)
    since: float = 0.0


class _Driver:
    """The loop of `predict_on_cluster` and its state."""

    def __init__(
        self,
        ray: ModuleType,
        setup: WorkerSetup,
        make: MakePredictor,
        drain: DrainRequest,
        tally: Tally,
        run: Run,
        *,
        needs: Needs,
        timeout_s: float | None,
        on_ready: OnReady | None,
    ) -> None:
        self.parameters: dict[str, Any] = {}
        self._ray = ray
        self._setup = setup
        self._make = make
        self._drain = drain
        self._tally = tally
        self._run = run
        self._needs = needs
        self._timeout_s = timeout_s
        self._on_ready = on_ready
        self._workers: list[_Worker] = []
        self._started = 0
        self._failed_starts = 0
        self._looked = float("-inf")
        self._ledger: Ledger | None = None
        self._source: Iterator[Work] = iter(())
        self._exhausted = False
        self._again: deque[_Task] = deque()

    def run(self, work: Iterable[Work]) -> None:
        """Decide all cases, or as many as signals and failures allow."""
        self._source = iter(work)
        while self._may_go_on():
            self._grow()
            self._hand_out()
            busy = any(worker.tasks for worker in self._workers)
            if self._exhausted and not self._again and not busy:
                return
            self._listen()
            self._give_up_overdue()
        deadline = time.monotonic() + self._drain.grace_s
        while any(worker.tasks for worker in self._workers) and time.monotonic() < deadline:
            self._listen()

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            self._ray.kill(worker.actor)
        self._workers.clear()

    def _may_go_on(self) -> bool:
        return not (self._drain.requested or self._tally.failed_too_often)

    def _grow(self) -> None:
        """Have as many workers as the cluster has room for, one that waits for room at least."""
        if time.monotonic() - self._looked < GROW_EVERY_S and self._workers:
            return
        self._looked = time.monotonic()
        while len(self._workers) < max(1, self._room()):
            remote = self._ray.remote(Segmenter).options(
                num_cpus=self._needs.cpus, num_gpus=self._needs.gpus, max_restarts=0,
                max_task_retries=0, max_concurrency=HANDED_OUT,
            )  # fmt: skip
            actor = remote.remote()
            joining = actor.join.remote(self._setup, self._make, __version__)
            self._workers.append(_Worker(number=self._started, actor=actor, joining=joining))
            self._started += 1

    def _room(self) -> int:
        """Workers that fit on the machines of the cluster."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        wanted = (("CPU", self._needs.cpus), ("GPU", self._needs.gpus))
        return sum(
            min((int(found.get(name, 0.0) // need) for name, need in wanted if need), default=0)
            for found in nodes
        )

    def _hand_out(self) -> None:
        """Give every worker what it may hold; a suspect gets one to itself."""
        for worker in self._workers:
            while self._may_take(worker) and self._may_go_on():
                task = self._next(idle=not worker.tasks)
                if task is None:
                    break
                if not worker.tasks:
                    worker.since = time.monotonic()
                # Relative paths mean something else where a worker runs.
                paths = tuple(path.absolute() for path in task.case.images)
                case = replace(task.case, images=paths)
                worker.tasks[worker.actor.segment.remote(case)] = task

    def _may_take(self, worker: _Worker) -> bool:
        held = worker.tasks.values()
        return worker.ready and len(held) < HANDED_OUT and not any(task.alone for task in held)

    def _next(self, *, idle: bool) -> _Task | None:
        for task in self._again:
            if idle or not task.alone:
                self._again.remove(task)
                return task
        assert self._ledger is not None
        while not self._exhausted and self._may_go_on():
            item = next(self._source, StopIteration)
            if item is StopIteration:
                self._exhausted = True
            elif isinstance(item, Rejection):
                self._tally.report(self._ledger.refuse(item))
            elif isinstance(item, Case):
                return _Task(case=item)
            else:  # a stream that has nothing at the moment
                return None
        return None

    def _listen(self) -> None:
        """Take in what workers have done within a moment."""
        waited = {task: worker for worker in self._workers for task in worker.tasks}
        waited |= {worker.joining: worker for worker in self._workers if not worker.ready}
        if not waited:
            time.sleep(POLL_S)
            return
        ready, _ = self._ray.wait(list(waited), timeout=POLL_S)
        for reference in ready:
            worker = waited[reference]
            try:
                result = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                raise _cause(error) from None
            except self._ray.exceptions.RayError as error:
                self._bury(worker, type(error).__name__)
                return
            if reference is worker.joining:
                self._note_joined(worker, result)
            else:
                self._settle(worker, reference, result)

    def _note_joined(self, worker: _Worker, about: dict[str, Any]) -> None:
        worker.ready = True
        self._failed_starts = 0
        self._run.log("joined", worker=worker.number, pid=about["pid"], host=about["host"])
        if self._ledger is None:
            self.parameters = about["parameters"]
            self._ledger = Ledger(
                self._setup.folder, run=self._run, model=self._setup.model,
                parameters=self.parameters, numerics=about["numerics"],
                overwrite=self._setup.overwrite,
            )  # fmt: skip
            if self._on_ready is not None:
                self._on_ready(about["about"])
        elif about["parameters"] != self.parameters:
            raise BundleError(
                f"workers on {about['host']} compute with other parameters than the first one did. "
                "Use machines of one kind, or name --precision and --device.",
                code="E_VERSION_MIXED",
            )

    def _settle(self, worker: _Worker, reference: Any, result: dict[str, Any]) -> None:
        task = worker.tasks.pop(reference)
        worker.since = time.monotonic()
        for event, values in result["events"]:
            self._run.log(event, **values, worker=worker.number)
        if result["short_of_memory"] and not task.alone:
            logger.warning("case %s: host memory ran out; trying once more, alone", task.case.id)
            self._again.append(replace(task, alone=True))
        elif result["record"] is not None:
            self._tally.report(
                from_plain(CommitRecord, result["record"], what="record", error=MedMambaError)
            )

    def _bury(self, worker: _Worker, cause: str) -> None:
        """Take note of a worker that is lost; each of its cases goes on alone elsewhere."""
        self._forget(worker)
        names = [task.case.id for task in worker.tasks.values()]
        self._run.log("worker_died", worker=worker.number, cause=cause, cases=names)
        logger.warning("worker %d was lost (%s); its cases go on elsewhere", worker.number, cause)
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts > FAILED_STARTS_ALLOWED:
                raise EnvironmentFault(
                    f"workers are lost again and again while they load the model ({cause}). Free "
                    "memory there, or check the machines with 'medmamba doctor'.",
                    code="E_WORKER_DIED",
                )
        for task in worker.tasks.values():
            task.losses += 1
            task.alone = True
            if task.losses < LOSSES_ALLOWED:
                self._again.append(task)
                continue
            self._run.log("quarantined", case=task.case.id)
            self._fail(
                task, "E_POISON", f"{task.losses} workers were lost over it ({cause}), and no more "
                "are risked. Look at its image; predict it alone to see more.",
            )  # fmt: skip

    def _give_up_overdue(self) -> None:
        if self._timeout_s is None:
            return
        for worker in list(self._workers):
            if not worker.tasks or time.monotonic() - worker.since <= self._timeout_s:
                continue
            self._forget(worker)
            late, *others = worker.tasks.values()  # the one that was handed out first
            self._again.extendleft(reversed(others))
            self._run.log("timeout", case=late.case.id, worker=worker.number)
            self._fail(
                late, "E_TIMEOUT", f"took longer than {self._timeout_s:g} s, the time allowed per "
                "case. Allow more with --timeout-per-case, or look whether its file can be read.",
            )  # fmt: skip

    def _forget(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self._ray.kill(worker.actor)
        self._looked = float("-inf")

    def _fail(self, task: _Task, code: str, text: str) -> None:
        assert self._ledger is not None
        error = CaseError(code=code, stage="infer", message=f"case {task.case.id}: {text}")
        self._tally.report(self._ledger.end(Job(case=task.case), "failed", error))


def _cause(error: Exception) -> Exception:
    """What went wrong in a worker, as the error it was there."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, MedMambaError):
        return cause
    return RuntimeError(f"a worker failed: {error}")
