"""Bounds what cases in flight hold together: by bytes, since cases differ in size by a hundred."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SHARE = 0.5
"""Part of the free memory that cases in flight may take."""

UNKNOWN_BYTES = 4 * 1024**3
"""Assumed free memory where the system does not tell."""


class MemoryGate:
    """Lets cases in while their estimated bytes fit; a case alone is always let in."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._held = 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, wanted_bytes: int) -> Iterator[None]:
        """Wait until ``wanted_bytes`` fit, and hold them for the block."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._held == 0 or self._held + wanted_bytes <= self._limit
            )
            self._held += wanted_bytes
        try:
            yield
        finally:
            with self._changed:
                self._held -= wanted_bytes
                self._changed.notify_all()


def free_memory_gate() -> MemoryGate:
    """Return a gate for half of the memory that is free now."""
    return MemoryGate(int(SHARE * available_bytes()))


def available_bytes() -> int:
    """Return the memory that is free now, on the machine or in the container."""
    found = [_system_bytes(), _container_bytes()]
    return min((value for value in found if value is not None), default=UNKNOWN_BYTES)


def _system_bytes() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError, AttributeError):
        return None


def _container_bytes() -> int | None:
    """Memory that the control group leaves, inside a container with a limit."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        return max(0, limit - int((group / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):
        return None
