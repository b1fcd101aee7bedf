"""SIGTERM as an exception, so that what is under way is ended properly."""

import signal
from types import FrameType


def exit_on_sigterm() -> None:
    """Let SIGTERM raise SystemExit(143) from now on, where nothing else handles it."""
    signal.signal(signal.SIGTERM, _raise_exit)


def _raise_exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
