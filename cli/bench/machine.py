"""Where figures were measured, for the result files of the benches beside this file."""

import platform
from pathlib import Path


def processor() -> str:
    """Name of the processor, as the system gives it."""
    table = Path("/proc/cpuinfo")
    if table.exists():
        for line in table.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
