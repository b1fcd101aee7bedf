"""What machine this is, without torch."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def processor_name() -> str:
    """Name of the processor, as the system gives it."""
    table = Path("/proc/cpuinfo")
    if table.exists():
        for line in table.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_machine() -> dict[str, str]:
    """Say what decides, beyond the version of this package, which precision is chosen here."""
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = ""
    has_gpu = Path("/dev/nvidiactl").exists()
    return {"processor": processor_name(), "torch": torch, "gpu": "cuda" if has_gpu else ""}
