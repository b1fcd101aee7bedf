"""A lock among processes that write into one folder, where the file system has locks.

It only saves work and evidence: masks and records are renamed into place whole, so that without it
two runs on one folder still end in a tree that a third one completes. Elsewhere than on POSIX, and
on network mounts without locks, there is none.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
PATIENCE_S = 60.0
"""Writing one mask takes seconds; who holds the lock longer hangs."""
POLL_S = 0.02


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder`` during the block; a killed process holds none."""
    if sys.platform == "win32":
        yield
        return
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        # The folder is full or read-only: what is written next will say so.
        yield
        return
    try:
        _acquire(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, folder: Path) -> None:
    if sys.platform == "win32":
        return
    import fcntl

    begun = time.monotonic()
    while time.monotonic() - begun < PATIENCE_S:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(POLL_S)
        except OSError:
            return  # no locks on this file system
        else:
            return
    logger.warning(
        "%s: another run holds its lock for %.0f s; going on without", folder, PATIENCE_S
    )
