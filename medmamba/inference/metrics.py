"""Figures of a run for Prometheus, as a text file that its node exporter collects.

https://prometheus.io/docs/instrumenting/exposition_formats/ ; nothing listens on any port.
"""

import os
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from medmamba.errors import EnvironmentFault
from medmamba.inference.records import DONE, CommitRecord

WRITE_EVERY_S = 5.0
"""Exporters look every 15 seconds or less often."""


class MetricsFile:
    """Counts what a run decides; ``close`` says that it is over.

    Args:
        path: the file; exporters take names ending in .prom.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._counts: Counter[str] = Counter()
        self._codes: dict[str, Counter[str]] = {"rejected": Counter(), "failed": Counter()}
        self._network_s = 0.0
        self._started = time.monotonic()
        self._written = float("-inf")
        self._total = 0
        self._left_s = 0.0
        self._write(running=True)

    def report(self, record: CommitRecord, done: int, total: int, left_s: float) -> None:
        """Count a decided case; the arguments are those of ``assignment.OnCase``."""
        self._counts[record.status] += 1
        if record.error is not None and record.status in self._codes:
            self._codes[record.status][record.error.code] += 1
        if record.status != "skipped":
            self._network_s += record.timings_s.get("infer", 0.0)
        self._total, self._left_s = total, left_s
        if time.monotonic() - self._written > WRITE_EVERY_S:
            self._write(running=True)

    def close(self) -> None:
        """Write the last figures."""
        self._write(running=False)

    def _write(self, *, running: bool) -> None:
        # The name of the temporary file must not end as those do that an exporter reads.
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        try:
            draft.write_text(self._text(running=running), encoding="utf-8")
            draft.replace(self._path)
        except OSError as error:
            raise EnvironmentFault(
                f"{self._path}: cannot be written ({error.strerror or error}). Choose another "
                "file for --metrics.",
                code="E_OUT_NOT_WRITABLE",
            ) from error
        self._written = time.monotonic()

    def _text(self, *, running: bool) -> str:
        elapsed = time.monotonic() - self._started
        done = sum(self._counts[status] for status in DONE)
        waiting = max(0, self._total - self._counts.total())
        families: list[tuple[str, str, str, Mapping[str, float]]] = [
            ("running", "gauge", "1 while the run goes on", {"": float(running)}),
            ("cases_done", "counter", "Cases that have a mask", {"": done}),
            ("cases_skipped", "counter", "Of these, done before", {"": self._counts["skipped"]}),
            ("cases_rejected", "counter", "Inputs not to be trusted", self._codes["rejected"]),
            ("cases_failed", "counter", "Cases that could not be done", self._codes["failed"]),
            ("queue_depth", "gauge", "Cases not decided", {"": waiting}),
            ("seconds_left", "gauge", "Estimate for the rest", {"": self._left_s}),
            ("network_busy_ratio", "gauge", "Share of time in the network",
             {"": min(1.0, self._network_s / elapsed) if elapsed else 0.0}),
            ("last_update_seconds", "gauge", "Time of this file", {"": time.time()}),
        ]  # fmt: skip
        return "".join(_family(*family) for family in families)


def _family(name: str, kind: str, text: str, values: Mapping[str, float]) -> str:
    full = f"medmamba_{name}"
    lines = [f"# HELP {full} {text}.", f"# TYPE {full} {kind}"]
    # Codes are ours: letters, digits and underscores, which need no escaping.
    lines += [
        f'{full}{{code="{code}"}} {value:g}' if code else f"{full} {_number(value)}"
        for code, value in sorted(values.items())
    ]
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")
