"""Prediction in a worker process that may die, hang or be killed without harm to the run.

The supervisor hands out cases, keeps the books and the time. A worker that ends over its cases is
replaced, and each case that it had begun is tried once more, alone; a case that is alone with its
worker when that ends again is given up. One that takes too long is given up at once, with its
worker. No torch here, so that nothing the supervisor does can crash or run out of memory.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from medmamba import __version__, errors
from medmamba.dataset import Case, Rejection
from medmamba.errors import EnvironmentFault, MedMambaError
from medmamba.files import from_plain, remove_leftovers, to_plain
from medmamba.inference.assignment import Assignment, PredictionRun, Tally
from medmamba.inference.draining import DrainRequest
from medmamba.inference.engine import finish_run
from medmamba.inference.job import Job
from medmamba.inference.journal import Run
from medmamba.inference.ledger import Ledger
from medmamba.inference.records import CaseError, CommitRecord
from medmamba.inference.worker import WorkerSetup
from medmamba.inference.worker_process import Message, WorkerDiedError, WorkerProcess

logger = logging.getLogger(__name__)

STALL_S = 3600.0
"""A case in which nothing has happened for so long (no tile, no next stage) hangs."""

HANDED_OUT = 4
"""Cases a worker holds at once: read, predicted, written, and the next."""

MAX_FAILED_STARTS = 2
"""A worker that dies so often while it loads the model will not do better the next time."""

POLL_S = 0.1
DRAIN_MARGIN_S = 1.0
"""What a worker may take beyond the grace period to say good-bye."""


def predict_supervised(
    assignment: Assignment,
    setup: WorkerSetup,
    start: Callable[[], WorkerProcess],
    drain: DrainRequest,
    *,
    timeout_s: float | None = None,
) -> PredictionRun:
    """Write a mask and a commit record for each case, as ``engine.predict_cases`` does.

    Args:
        assignment: what to predict, and whom to tell.
        setup: what workers are told; its ``run_folder`` is filled in here.
        start: starts a worker process.
        drain: whether and by which signal the run is asked to end.
        timeout_s: a case that takes longer than this is given up; None for no limit.

    Raises:
        MedMambaError: what a worker met that concerns the whole run, such as a broken model.
        EnvironmentFault: the folder cannot be written, or workers die before they begin.
        UsageError: the folder holds the inputs.
    """
    assignment.prepare_folder(setup.folder)
    run = Run(setup.folder, on_event=assignment.on_event)
    tally = Tally(assignment)
    with run:
        run.log("started", **assignment.describe())
        supervision = _Supervision(
            assignment, replace(setup, run_folder=run.folder), start, drain, tally, run,
            timeout_s=timeout_s,
        )  # fmt: skip
        try:
            supervision.run()
        finally:
            supervision.close()
        exit_code = drain.exit_code or tally.exit_code
        finish_run(
            run, setup.folder, exit_code, setup.model, supervision.parameters, setup.overwrite,
            assignment.request,
        )  # fmt: skip
    return tally.outcome(run.run_id, setup.folder, exit_code)


@dataclass(kw_only=True)
class _Task:
    """A case that is not decided.

    Args:
        alone: nothing else may be in work beside it, for it may have killed a worker or needs all
            the memory there is.
        deaths: workers that ended while the case was in work.
        stage: what the worker does with it now; empty while it waits.
        spent_s: seconds in the stages before.
        since: when the stage began, by the monotonic clock.
        heard: when it last showed a sign of life.
    """

    case: Case
    alone: bool = False
    deaths: int = 0
    begun: bool = False
    stage: str = ""
    spent_s: float = 0.0
    since: float = 0.0
    heard: float = 0.0

    def enter(self, stage: str, now: float) -> None:
        """Begin a stage, or end the one before with an empty name."""
        if self.stage:
            self.spent_s += now - self.since
        self.begun = True
        self.stage, self.since, self.heard = stage, now, now

    def overdue(self, now: float, timeout_s: float | None) -> str:
        """Say in what way the case takes too long; empty when it does not."""
        if not self.stage:
            return ""
        if timeout_s is not None and self.spent_s + now - self.since > timeout_s:
            return f"took longer than {timeout_s:g} s, the time allowed per case"
        if now - self.heard > STALL_S:
            return f"showed no progress for {STALL_S / 60:.0f} minutes"
        return ""


@dataclass
class _Worker:
    """A worker process and what it has to do."""

    process: WorkerProcess
    ready: bool = False
    token: str = ""
    tasks: dict[str, _Task] = field(default_factory=dict)


class _Supervision:
    """The loop of `predict_supervised` and its state."""

    def __init__(
        self,
        assignment: Assignment,
        setup: WorkerSetup,
        start: Callable[[], WorkerProcess],
        drain: DrainRequest,
        tally: Tally,
        run: Run,
        *,
        timeout_s: float | None,
    ) -> None:
        self.parameters: dict[str, Any] = {}
        self._setup = setup
        self._start = start
        self._drain = drain
        self._tally = tally
        self._run = run
        self._timeout_s = timeout_s
        self._assignment = assignment
        self._worker: _Worker | None = None
        self._ledger: Ledger | None = None
        self._source = assignment.work
        self._exhausted = False
        self._queue: deque[_Task] = deque()
        self._failed_starts = 0

    def run(self) -> None:
        """Decide all cases, or as many as signals and failures allow."""
        worker = self._started()
        while not worker.ready:
            if self._drain.requested:
                return  # nothing has begun
            worker = self._listen()
        while self._may_go_on():
            self._fill_queue()
            in_work = self._worker is not None and self._worker.tasks
            if self._exhausted and not self._queue and not in_work:
                return
            self._hand_out()
            self._listen()
            self._give_up_overdue()
        self._let_finish()

    def _fill_queue(self) -> None:
        """Take from the stream what will be handed out soon, and refuse what was turned away."""
        assert self._ledger is not None
        while not self._exhausted and len(self._queue) < HANDED_OUT and self._may_go_on():
            try:
                item = next(self._source)
            except StopIteration:
                self._exhausted = True
                return
            if item is None:  # a stream that has nothing at the moment
                return
            if isinstance(item, Rejection):
                self._tally.report(self._ledger.refuse(item))
            else:
                self._queue.append(_Task(case=item))

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.process.close()
            remove_leftovers(self._setup.folder, self._worker.token or "none")
            self._worker = None

    def _may_go_on(self) -> bool:
        return not (self._drain.requested or self._tally.failed_too_often)

    def _started(self) -> _Worker:
        if self._worker is None:
            self._worker = _Worker(self._start())
            self._worker.process.send({"setup": to_plain(self._setup)})
        return self._worker

    def _hand_out(self) -> None:
        worker = self._started()
        while self._queue and worker.ready and len(worker.tasks) < HANDED_OUT:
            alone = self._queue[0].alone or any(task.alone for task in worker.tasks.values())
            if alone and worker.tasks:
                return
            task = self._queue.popleft()
            task.begun, task.stage, task.spent_s = False, "", 0.0
            worker.tasks[task.case.id] = task
            worker.process.send(
                {
                    "case": task.case.id,
                    "images": [str(path) for path in task.case.images],
                    "acquisition": task.case.acquisition,
                }
            )

    def _listen(self) -> _Worker:
        """Take in what the worker says within a moment."""
        worker = self._started()
        try:
            message = worker.process.receive(POLL_S)
            while message is not None:
                self._take_in(message, worker)
                message = worker.process.receive(0.0)
        except WorkerDiedError as death:
            self._bury(worker, death.cause)
        return worker

    def _take_in(self, message: Message, worker: _Worker) -> None:
        task = worker.tasks.get(str(message.get("case") or message.get("tiles")))
        now = time.monotonic()
        if "hello" in message:
            worker.token = message["hello"]
            _require_same("medmamba", __version__, message["version"])
        elif "ready" in message:
            self._note_ready(message, worker)
        elif "stage" in message and task is not None:
            if not task.begun:
                self._run.log("begun", case=task.case.id)
            task.enter(message["stage"], now)
        elif "tiles" in message and task is not None:
            task.heard = now
            if self._assignment.on_tiles is not None:
                self._assignment.on_tiles(task.case.id, message["done"], message["total"])
        elif "log" in message:
            self._run.log(message["log"], **message["values"])
        elif "settled" in message:
            self._settle(message, worker.tasks.pop(message["settled"]))
        elif "fault" in message:
            raise _fault(message)

    def _note_ready(self, message: Message, worker: _Worker) -> None:
        worker.ready = True
        self._failed_starts = 0
        if self._ledger is None:
            self.parameters = message["ready"]
            self._ledger = Ledger(
                self._setup.folder, run=self._run, model=self._setup.model,
                parameters=self.parameters, numerics=message["numerics"],
                overwrite=self._setup.overwrite,
            )  # fmt: skip
            if self._assignment.on_ready is not None:
                self._assignment.on_ready(message["about"])
        for name, value in self.parameters.items():
            _require_same(name, value, message["ready"].get(name))

    def _settle(self, message: Message, task: _Task) -> None:
        if message["short_of_memory"] and not task.alone:
            logger.warning("case %s: host memory ran out; trying once more, alone", task.case.id)
            self._queue.append(_Task(case=task.case, alone=True, deaths=task.deaths))
        elif message["record"] is not None:
            self._tally.report(
                from_plain(CommitRecord, message["record"], what="record", error=MedMambaError)
            )

    def _bury(self, worker: _Worker, cause: str) -> None:
        """Take note of a worker that ended over its cases, and put them back."""
        begun = [task for task in worker.tasks.values() if task.begun]
        self._run.log("worker_died", cause=cause, cases=[task.case.id for task in begun])
        logger.warning("the worker process died: %s", cause)
        self._take_back(worker)
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise EnvironmentFault(
                    f"the worker process dies while it loads the model: {cause}. Free memory, or "
                    "check the installation with 'medmamba doctor'.",
                    code="E_WORKER_DIED",
                )
        for task in begun:
            task.deaths += 1
            if task.alone and task.deaths > 1:
                self._queue.remove(task)
                self._fail(
                    task, "E_WORKER_DIED", f"the worker process died over it twice: {cause}. Use "
                    "a machine with more memory; if that is not it, report the image's size and "
                    "model.",
                )  # fmt: skip
            else:
                task.alone = True

    def _give_up_overdue(self) -> None:
        worker, now = self._worker, time.monotonic()
        if worker is None:
            return
        late = [
            (task, reason)
            for task in worker.tasks.values()
            if (reason := task.overdue(now, self._timeout_s))
        ]
        if not late:
            return
        self._take_back(worker)
        for task, reason in late:
            self._queue.remove(task)
            stage = task.stage
            self._run.log("timeout", case=task.case.id, stage=stage)
            self._fail(
                task, "E_TIMEOUT", f"{reason} (it was in '{stage}'). Allow more with "
                "--timeout-per-case, or look whether its file can be read.",
            )  # fmt: skip

    def _take_back(self, worker: _Worker) -> None:
        """Be rid of a worker, and put its cases back in their order before all others."""
        worker.process.close()
        self._worker = None
        remove_leftovers(self._setup.folder, worker.token or "none")
        self._queue.extendleft(reversed(worker.tasks.values()))

    def _fail(self, task: _Task, code: str, text: str) -> None:
        assert self._ledger is not None
        stage = task.stage or "read"
        error = CaseError(code=code, stage=stage, message=f"case {task.case.id}: {text}")
        self._tally.report(self._ledger.end(Job(case=task.case), "failed", error))

    def _let_finish(self) -> None:
        """Give a worker the grace period for the cases it has begun; no others begin."""
        worker = self._worker
        if worker is None or not any(task.begun for task in worker.tasks.values()):
            return
        worker.process.send({"drain": self._drain.signal_number or 0})
        end = time.monotonic() + self._setup.grace_s + DRAIN_MARGIN_S
        while time.monotonic() < end:
            try:
                message = worker.process.receive(POLL_S)
            except WorkerDiedError as death:
                self._run.log("worker_died", cause=death.cause, cases=list(worker.tasks))
                return
            if message is not None and "ended" in message:
                return
            if message is not None:
                self._take_in(message, worker)
        self._run.log("abandoned", cases=list(worker.tasks))


def _require_same(what: str, expected: object, found: object) -> None:
    """Let no worker go on that would compute otherwise than the run began.

    Raises:
        EnvironmentFault: it would; the installation or the machine has changed meanwhile.
    """
    if found != expected:
        raise EnvironmentFault(
            f"a worker process has {what} {found}, the run {expected}: the installation or the "
            "machine changed while it went on. Run again.",
            code="E_VERSION_MIXED",
        )


def _fault(message: Message) -> Exception:
    """Make the error that a worker met; of a bug its traceback, too."""
    kind = getattr(errors, message["fault"], None)
    if isinstance(kind, type) and issubclass(kind, MedMambaError):
        return kind(message["message"], code=message["code"])
    bug = RuntimeError(f"in the worker process: {message['message']}")
    bug.add_note(message.get("trace", ""))
    return bug
