"""Three places of work at once: a case is read, another is in the network, a third is written.

There is never more than one case ahead, and none where memory would not hold it.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from medmamba.dataset import Case, Rejection
from medmamba.inference.draining import DrainRequest
from medmamba.inference.job import Job

PREFETCH_BYTES = 2 * 2**30
"""The next case is read ahead only while those in work take less memory than this."""

Work = Case | Rejection | None
"""What a stream of work gives: a case, one that was turned away, or nothing at the moment."""

Take = Callable[[bool], Case | None]
"""Gives the next case. True: wait for it, None means that there are no more; False: None also
means that there is none yet."""


def take_from(
    work: Iterable[Work],
    *,
    refuse: Callable[[Rejection], None],
    may_go_on: Callable[[], bool],
) -> Take:
    """Give the cases of a list or stream one by one.

    Args:
        work: cases, and those turned away. A stream gives None when it has nothing at the moment;
            asked again at once, it may wait a little.
        refuse: called with what was turned away.
        may_go_on: once false, there are no more.
    """
    remaining = iter(work)

    def take(wait: bool) -> Case | None:
        while may_go_on():
            try:
                item = next(remaining)
            except StopIteration:
                return None
            if isinstance(item, Rejection):
                refuse(item)
            elif item is not None or not wait:
                return item
        return None

    return take


class Stages(Protocol):
    """The three stages of a case; ``casework.CaseWork``."""

    def expected_bytes(self, case: Case) -> int:
        """Return the memory that reading a case will take."""

    def read(self, case: Case) -> Job:
        """Bring a case to the working grid."""

    def infer(self, job: Job, drain: DrainRequest) -> Job:
        """Run the networks."""

    def export(self, job: Job) -> Job:
        """Write mask and record."""


def work_through(
    stages: Stages,
    take: Take,
    *,
    settle: Callable[[Job], None],
    drain: DrainRequest,
    may_go_on: Callable[[], bool],
    prefetch_bytes: int = PREFETCH_BYTES,
) -> None:
    """Take cases until there are no more or none may be begun.

    Args:
        stages: what is done with a case.
        take: gives the cases.
        settle: called with every job that came to its end, from the writer's thread.
        drain: whether the run was asked to end.
        may_go_on: asked before a case goes to the network.
        prefetch_bytes: memory up to which the next case is read ahead.
    """
    with ThreadPoolExecutor(1, "reader") as reader, ThreadPoolExecutor(1, "writer") as writer:
        ahead: Future[Job] | None = None
        waiting: Case | None = None
        exporting: Future[None] | None = None
        while may_go_on():
            case = waiting
            if ahead is None and case is None:
                if exporting is not None:
                    exporting.result()
                case = take(True)
                if case is None:
                    break
            if ahead is not None:
                job = ahead.result()
            else:
                assert case is not None
                job = stages.read(case)
            ahead, waiting = None, take(False)
            if waiting is not None and _fits_beside(stages, job, waiting, prefetch_bytes):
                ahead, waiting = reader.submit(stages.read, waiting), None
            job = stages.infer(job, drain)
            if exporting is not None:
                exporting.result()
            exporting = writer.submit(_export, stages, job, settle)
        if exporting is not None:
            exporting.result()
        if ahead is not None and ahead.result().over:
            settle(ahead.result())


def _export(stages: Stages, job: Job, settle: Callable[[Job], None]) -> None:
    settle(stages.export(job))


def _fits_beside(stages: Stages, job: Job, following: Case, limit: int) -> bool:
    return job.memory_bytes + stages.expected_bytes(following) < limit
