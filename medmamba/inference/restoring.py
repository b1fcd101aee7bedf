"""Labels in the making: they are restored beside the networks, and beside the next case's.

One thread takes planes of logits in their order; never more than one batch of planes waits for it.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, eq=False)
class Restoring(Generic[Result]):
    """What will be restored once the thread is done.

    Args:
        nbytes: memory of the result.
    """

    future: "Future[Result]"
    nbytes: int

    def result(self) -> Result:
        """Wait for it.

        Raises:
            Exception: whatever went wrong while restoring.
        """
        return self.future.result()


def restore_beside(
    steps: Iterable[Callable[[], None]], finish: Callable[[], Result], *, nbytes: int
) -> Restoring[Result]:
    """Run every step in another thread while the next is being made, and leave the end to it.

    Args:
        steps: made one by one in this thread, by running networks.
        finish: run after the last step.
        nbytes: memory of the result.

    Raises:
        Exception: whatever making a step raises, or a step that is not among the last two.
    """
    pool = ThreadPoolExecutor(1, "restorer")
    try:
        running: Future[None] | None = None
        for step in steps:
            if running is not None:
                running.result()
            running = pool.submit(step)
        made = pool.submit(_after, running, finish)
    except BaseException:
        # Nothing may go on writing for a case that is given up.
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown(wait=False)
    return Restoring(future=made, nbytes=nbytes)


def _after(last: "Future[None] | None", finish: Callable[[], Result]) -> Result:
    if last is not None:
        last.result()
    return finish()
