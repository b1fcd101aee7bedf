"""SIGTERM and SIGINT during prediction: take no more cases, finish or abandon the current one."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

DEFAULT_GRACE_S = 20.0
"""A case that will be done within this time after the signal is finished."""

SIGNAL_EXIT_BASE = 128


class CaseAbandonedError(Exception):
    """Raised inside a case that would outlast the grace period; it leaves nothing behind."""


class DrainRequest:
    """Whether the run was asked to end, and by which signal."""

    def __init__(self, grace_s: float) -> None:
        self.signal_number: int | None = None
        self.grace_s = grace_s

    @property
    def requested(self) -> bool:
        """Whether no new case may begin."""
        return self.signal_number is not None

    @property
    def exit_code(self) -> int | None:
        """143 after SIGTERM, 130 after SIGINT, None without a signal."""
        return None if self.signal_number is None else SIGNAL_EXIT_BASE + self.signal_number

    def check(self, *, done: int, total: int, elapsed_s: float) -> None:
        """Abandon the case when its rest would take longer than the grace period.

        Raises:
            CaseAbandonedError: it would.
        """
        if not self.requested or done >= total:
            return
        if elapsed_s / max(1, done) * (total - done) > self.grace_s:
            raise CaseAbandonedError


@contextmanager
def drain_on_signals(grace_s: float = DEFAULT_GRACE_S) -> Iterator[DrainRequest]:
    """Note the first SIGTERM or SIGINT; the second ends the process at once.

    Files are renamed into place whole, so that even then nothing partial has a final name. Outside
    the main thread signals cannot be handled, and none is.
    """
    request = DrainRequest(grace_s)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        if request.requested:
            os._exit(SIGNAL_EXIT_BASE + number)
        request.signal_number = number

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
