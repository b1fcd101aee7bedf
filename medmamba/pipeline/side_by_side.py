"""The runs of a comparison, one after another or several at once on processors of their own."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

from medmamba.errors import UsageError
from medmamba.pipeline.contest import ContestResult, ContestRun, read_result

Share = frozenset[int]
"""Numbers of the processors a run may use; empty for all of them."""


def processor_shares(jobs: int) -> tuple[Share, ...]:
    """Divide the processors this process may use into equal shares; one share is all of them.

    Raises:
        UsageError: fewer processors than shares, or no way to bind a process to some.
    """
    if jobs == 1:
        return (Share(),)
    if not hasattr(os, "sched_getaffinity"):
        raise UsageError(f"--jobs {jobs}: this system cannot divide its processors; use --jobs 1.")
    every = sorted(os.sched_getaffinity(0))
    size = len(every) // jobs if jobs > 0 else 0
    if size == 0:
        raise UsageError(f"--jobs {jobs}: from 1 to the {len(every)} processors there are.")
    return tuple(Share(every[at * size : (at + 1) * size]) for at in range(jobs))


def run_contests(
    runs: Sequence[tuple[str, ContestRun]],
    folder: Path,
    shares: Sequence[Share],
    work: Callable[[ContestRun, Path], ContestResult],
    say: Callable[[str], None] | None,
    stop: Callable[[], None] = lambda: None,
) -> list[ContestResult]:
    """Return a result per run, in order: that of a finished one, or a new one.

    Args:
        runs: (name of the contestant, run), started in this order.
        folder: of the comparison.
        shares: as many runs go at once, each on one share.
        work: does a run in its folder; in another process where there are several shares.
        say: called with what starts.
        stop: ends the runs under way; called when a signal ends this one.

    Raises:
        TrainingError: a run failed; those under way have ended, no other has begun.
    """
    free: SimpleQueue[Share] = SimpleQueue()
    for share in shares:
        free.put(share)

    def bind() -> None:
        os.sched_setaffinity(0, free.get())  # of this thread, and of the processes it starts

    def do(numbered: tuple[int, tuple[str, ContestRun]]) -> ContestResult:
        number, (name, run) = numbered
        key = f"{run.network}-{run.mixer}-fold{run.fold}-seed{run.seed}-{run.key}"
        place = folder / "runs" / key
        result = read_result(place, run.key)
        if say is not None:
            state = "is there" if result is not None else "starts"
            say(f"run {number}/{len(runs)}: {name}, fold {run.fold}, seed {run.seed} {state}")
        return work(run, place) if result is None else result

    if len(shares) == 1:
        with _stopping(stop):
            return [do(numbered) for numbered in enumerate(runs, 1)]
    with ThreadPoolExecutor(len(shares), initializer=bind) as pool:
        try:
            with _stopping(stop):
                return list(pool.map(do, enumerate(runs, 1)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def _stopping(stop: Callable[[], None]) -> Iterator[None]:
    """Call ``stop`` when the block ends by a signal, but not when a run fails."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        stop()
        raise
