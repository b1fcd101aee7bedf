"""What a prediction run leaves behind besides masks: ``run/<run_id>/``.

The journal is a log and never the truth: one line per event, each with the hash of the one before,
so that later edits show. Commit records are the truth.
"""

import contextlib
import hashlib
import json
import os
import platform
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from medmamba import __version__
from medmamba.errors import UsageError
from medmamba.failpoints import failpoint
from medmamba.files import TEMPORARY_PREFIX, not_writable, replace_csv, to_json, write_atomic
from medmamba.inference.records import CommitRecord

RUNS_FOLDER = "run"

LIVE_MARKER = "running"
"""Holds host and process of a run until it ends."""

STALE_AFTER_S = 3600
"""A temporary file not touched for this long belongs to no running process."""

SUMMARY_COLUMNS = (
    "case",
    "status",
    "error",
    "label",
    "voxels",
    "volume_ml",
    "n_components",
    "touches_border",
    "volume_flag",
    "usual_low_ml",
    "usual_high_ml",
    "mean_probability",
    "mean_entropy",
    "disagreement",
)


def new_run_id() -> str:
    """Return a name that sorts by time and is unique whatever the clock says."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"


MANIFEST_FILE = "manifest.json"

OnEvent = Callable[[dict[str, Any]], None]
"""Called with an event's name (``event``), time and values."""


class RunLog(Protocol):
    """What the work on a case tells of itself."""

    def log(self, event: str, **values: Any) -> None:
        """Note one event."""

    def set_aside(self, path: Path) -> None:
        """Keep a mask that no record vouches for as evidence, out of the way."""


class Run:
    """One run's folder, opened for writing; leaving its context says that the run is over.

    Args:
        folder: where masks go; the run's own folder is made inside.
        run_id: its name; a new one when omitted.
        worker: number of this process among those that share the run.
        on_event: called with every event, once it is on disk.
    """

    def __init__(
        self,
        folder: Path,
        run_id: str | None = None,
        *,
        worker: int = 0,
        on_event: OnEvent | None = None,
    ) -> None:
        self._on_event = on_event
        self.run_id = run_id or new_run_id()
        self.folder = folder / RUNS_FOLDER / self.run_id
        self._journal = self.folder / f"journal-{worker}.jsonl"
        self._previous = ""
        self._lock = threading.Lock()
        self._started = datetime.now(UTC)
        if (folder / RUNS_FOLDER).is_symlink():
            raise UsageError(
                f"output folder {folder}: '{RUNS_FOLDER}' in it is a symbolic link, through which "
                "nothing is written. Remove the link or choose another folder."
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._journal.touch()
            marker = f"{platform.node()} {os.getpid()}"
            (self.folder / LIVE_MARKER).write_text(marker, encoding="utf-8")
            failpoint("run_opened")
        except OSError as error:
            raise not_writable(self.folder, error, code="E_OUT_NOT_WRITABLE") from error

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        failpoint("before_end")
        (self.folder / LIVE_MARKER).unlink(missing_ok=True)

    def log(self, event: str, **values: Any) -> None:
        """Append one event, durably.

        Raises:
            EnvironmentFault: the disk is full or gone.
        """
        with self._lock:
            entry = {"event": event, "time": _now(), **values, "previous": self._previous}
            line = json.dumps(entry, ensure_ascii=False, sort_keys=True).encode()
            try:
                failpoint("before_journal_line", event)
                with self._journal.open("ab", buffering=0) as handle:
                    half = line[: len(line) // 2]
                    failpoint("mid_journal_line", event, spoil=lambda: handle.write(half))
                    handle.write(line + b"\n")
                    os.fsync(handle.fileno())
                failpoint("after_journal_line", event)
            except OSError as error:
                raise not_writable(self._journal, error) from error
            self._previous = hashlib.sha256(line).hexdigest()
            if self._on_event is not None:
                self._on_event({key: value for key, value in entry.items() if key != "previous"})

    def set_aside(self, path: Path) -> None:
        """Move a mask that no record vouches for into the run's folder, as evidence."""
        set_aside(path, self.folder)

    def finish(
        self, records: Iterable[CommitRecord], *, context: Mapping[str, Any], exit_code: int
    ) -> None:
        """Write the last event, ``summary.csv`` and ``manifest.json``.

        Which inputs became which output stands in the journal, whose last hash the manifest holds.
        """
        self.log("ended", exit_code=exit_code)
        failpoint("before_summary")
        counts: Counter[str] = Counter()
        rows = (row for record in _counted(records, counts) for row in summary_rows([record]))
        replace_csv(self.folder / "summary.csv", SUMMARY_COLUMNS, rows)
        manifest = {
            "run_id": self.run_id,
            "version": __version__,
            "started": self._started.isoformat(timespec="seconds"),
            "ended": _now(),
            "host": {"machine": platform.machine(), "processors": os.cpu_count()},
            **context,
            "exit_code": exit_code,
            "counts": dict(counts),
            "journal_sha256": self._previous,
        }
        failpoint("before_manifest")
        write_atomic(self.folder / MANIFEST_FILE, to_json(manifest))


def set_aside(path: Path, run_folder: Path) -> None:
    """Move a file out of the way, into a run's folder."""
    target = run_folder / "superseded" / path.name
    target.parent.mkdir(exist_ok=True)
    # Another run in the same folder may have been faster.
    with contextlib.suppress(FileNotFoundError):
        path.replace(target)
    failpoint("after_set_aside", path.name)


def sweep_temporary_files(folder: Path) -> int:
    """Remove what killed runs left half-written, and return how many files that were.

    While another run is alive in the folder, only files untouched for an hour go.
    """
    alive = any(_is_alive(marker) for marker in folder.glob(f"{RUNS_FOLDER}/*/{LIVE_MARKER}"))
    oldest = time.time() - STALE_AFTER_S if alive else float("inf")
    removed = 0
    places = (f"{TEMPORARY_PREFIX}*", f"{RUNS_FOLDER}/*/{TEMPORARY_PREFIX}*")
    for path in chain.from_iterable(folder.glob(place) for place in places):
        try:
            if path.is_file() and path.stat().st_mtime < oldest:
                path.unlink()
                removed += 1
        except FileNotFoundError:
            continue
    return removed


def _is_alive(marker: Path) -> bool:
    """Tell whether a run goes on, and remove the marker of one that does not."""
    if is_live(marker.parent):
        return True
    marker.unlink(missing_ok=True)
    return False


def is_live(run_folder: Path) -> bool:
    """Tell whether the process of a run still runs; on another host it may."""
    try:
        host, _, pid = (run_folder / LIVE_MARKER).read_text(encoding="utf-8").partition(" ")
        if host != platform.node():
            return True
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True


def summary_rows(records: Sequence[CommitRecord]) -> list[list[object]]:
    """One row per case and label, one for a case without labels; see ``SUMMARY_COLUMNS``."""
    rows: list[list[object]] = []
    for record in records:
        code = record.error.code if record.error else ""
        if not record.labels:
            missing = [None] * (len(SUMMARY_COLUMNS) - 4)
            rows.append([record.case_id, record.status, code, "", *missing])
        rows += [
            [
                record.case_id,
                record.status,
                code,
                item.name,
                item.voxels,
                round(item.volume_ml, 6),
                item.n_components,
                item.touches_border,
                item.volume_flag,
                *([item.usual.low_ml, item.usual.high_ml] if item.usual else [None, None]),
                item.confidence and item.confidence.mean_probability,
                item.confidence and item.confidence.mean_entropy,
                item.confidence and item.confidence.disagreement,
            ]
            for item in record.labels
        ]
    return rows


def _counted(records: Iterable[CommitRecord], counts: Counter[str]) -> Iterator[CommitRecord]:
    for record in records:
        counts[record.status] += 1
        yield record


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
