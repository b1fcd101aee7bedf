"""Named points where a test lets the process fail, to show that nothing is lost or partial there.

``MEDMAMBA_FAILPOINTS`` holds entries ``point=action``, separated by commas. ``point@3=action`` acts
on the third passage, ``point:detail=action`` where the passing file or case has that name.
``MEDMAMBA_FAILPOINTS_ONCE`` names a file; where it exists already, nothing acts: a process started
in place of one that was killed then goes on. ``MEDMAMBA_FAILPOINTS_LOG`` names a file to which
every passage adds a line. None of this is for users: without the variables a point does nothing.
"""

import errno
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ARMED = "MEDMAMBA_FAILPOINTS"
ONCE = "MEDMAMBA_FAILPOINTS_ONCE"
LOG = "MEDMAMBA_FAILPOINTS_LOG"

POINTS = (
    "run_opened",
    "before_case",
    "before_infer",
    "before_export",
    "after_clear",
    "after_set_aside",
    "before_record",
    "before_open",
    "mid_write",
    "before_fsync",
    "after_fsync",
    "after_replace",
    "after_folder_sync",
    "before_journal_line",
    "mid_journal_line",
    "after_journal_line",
    "before_summary",
    "before_manifest",
    "before_end",
)
"""In the order in which a run passes them, more or less."""

_lock = threading.Lock()
_passages: Counter[str] = Counter()


@dataclass(frozen=True, kw_only=True)
class _Entry:
    point: str
    action: str
    detail: str = ""
    passage: int = 0


def failpoint(point: str, detail: str = "", *, spoil: Callable[[], object] | None = None) -> None:
    """Fail here if a test asked for it.

    Args:
        point: one of `POINTS`.
        detail: name of the file or case at hand.
        spoil: makes the state that a failure in the middle would leave; called before acting.
    """
    if ARMED not in os.environ and LOG not in os.environ:
        return
    with _lock:
        _passages[point] += 1
        passage = _passages[point]
    if log := os.environ.get(LOG):
        with Path(log).open("a", encoding="utf-8") as lines:
            lines.write(f"{point} {passage} {detail}\n")
    for entry in _entries(os.environ.get(ARMED, "")):
        fits = entry.detail in ("", detail) and entry.passage in (0, passage)
        if entry.point == point and fits and _not_spent():
            if spoil is not None:
                spoil()
            _ACTIONS[entry.action]()


def _entries(text: str) -> list[_Entry]:
    found = []
    for item in filter(None, text.split(",")):
        place, _, action = item.partition("=")
        place, _, passage = place.partition("@")
        point, _, detail = place.partition(":")
        if point not in POINTS or action not in _ACTIONS:
            raise ValueError(f"{ARMED}: {item!r} names no point or no action")
        found.append(_Entry(point=point, action=action, detail=detail, passage=int(passage or 0)))
    return found


def _not_spent() -> bool:
    spent = os.environ.get(ONCE)
    if not spent:
        return True
    try:
        Path(spent).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _io_error() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def _no_memory() -> None:
    raise MemoryError


_ACTIONS: dict[str, Callable[[], None]] = {
    "kill": _kill,
    "crash": _crash,
    "enospc": _no_space,
    "eio": _io_error,
    "memory": _no_memory,
    "sleep": lambda: time.sleep(3600),
}
