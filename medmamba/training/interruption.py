"""SIGTERM and SIGINT during training: finish the step, save, and say how it ended."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from medmamba.errors import TrainingError


class InterruptedTrainingError(TrainingError):
    """Training was interrupted (SIGINT); the state is saved and can be resumed."""

    exit_code = 130
    default_code = "E_INTERRUPTED"


class TerminatedTrainingError(TrainingError):
    """Training was asked to end (SIGTERM); the state is saved and can be resumed."""

    exit_code = 143
    default_code = "E_TERMINATED"


class StopRequest:
    """Whether, and by which signal, the run was asked to stop."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def error(self, saved: str) -> TrainingError:
        """Return the exception of the signal, for a state saved in ``saved``."""
        kind = (
            TerminatedTrainingError
            if self.signal_number == signal.SIGTERM
            else InterruptedTrainingError
        )
        name = signal.Signals(self.signal_number or signal.SIGINT).name
        return kind(f"training stopped by {name}; its state is in {saved}. Go on with --resume.")


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Note the first SIGTERM or SIGINT; a second one acts as it did before the block."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        request.signal_number = number
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
