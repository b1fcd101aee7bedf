"""watch(): masks for images as they arrive in a folder, until a signal says to stop.

What is done is what has a record, as everywhere: after a crash or a restart every image in the
folder is offered again, and those whose record holds are passed over. Nothing in the folder is
moved, renamed or removed.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmamba.dataset import Case, Rejection, find_cases, safe_id
from medmamba.dataset.bids import is_bids
from medmamba.errors import UsageError
from medmamba.inference.overlap import Work
from medmamba.pipeline.predicting import PredictOutcome, predict

if TYPE_CHECKING:
    from medmamba.bundle import Bundle
    from medmamba.inference.assignment import OnCase
    from medmamba.inference.records import CommitRecord

logger = logging.getLogger(__name__)

SETTLE_S = 10.0
POLL_S = 2.0
IDLE_S = 0.1
"""How long whoever asks in vain is kept waiting; signals are noticed as quickly."""
SCAN_SHARE = 0.2
"""Looking through the folder takes at most this share of the time, however large it is."""

Mark = tuple[object, ...]
"""What is compared to see whether a case changed: names, sizes and times of its files."""


def watch(
    images: Path | str,
    output: Path | str,
    model: Path | str,
    *,
    settle_s: float = SETTLE_S,
    marker: str | None = None,
    poll_s: float = POLL_S,
    bids_suffixes: Sequence[str] = (),
    on_case: "OnCase | None" = None,
    **options: Any,
) -> PredictOutcome:
    """Predict every image that arrives in a folder, until SIGTERM or SIGINT.

    Args:
        images: folder to watch: files named as for ``predict``, or a folder a DICOM series.
        output: folder for masks and records; neither inside ``images`` nor around it.
        model: model folder, or the run folder that holds it.
        settle_s: a case is taken when none of its files has changed for so many seconds.
        marker: instead, a case is taken when a file CASE + marker is there, such as ``.done``.
        poll_s: seconds between looks at the folder.
        bids_suffixes: which images of a BIDS folder are meant, as for ``predict``.
        on_case: called per finished case.
        **options: of ``predict``.

    Raises:
        UsageError: no such folder, or the two are not apart.
        MedMambaError: as ``predict``.
    """
    folder, target = Path(images), Path(output)
    if not folder.is_dir():
        raise UsageError(f"{folder}: is no folder. Give the folder in which images arrive.")
    inside = target.resolve().is_relative_to(folder.resolve())
    if inside or folder.resolve().is_relative_to(target.resolve()):
        raise UsageError(f"output folder {target}: must be apart from {folder}. Choose another.")
    if marker is not None and (not marker or "/" in marker):
        raise UsageError(f"marker '{marker}': the ending of a file name, such as .done.")
    held: list[Arrivals] = []

    def arrivals(bundle: "Bundle") -> Iterator[Work]:
        held.append(
            Arrivals(
                folder,
                channels=len(bundle.manifest.channels),
                file_ending=bundle.plan.file_ending or None,
                settle_s=settle_s,
                marker=marker,
                poll_s=poll_s,
                modalities=bids_suffixes or bundle.manifest.channels,
            )
        )
        return iter(held[0])

    def decided(record: "CommitRecord", done: int, total: int, left_s: float) -> None:
        held[0].decided(record.case_id)
        if on_case is not None:
            on_case(record, done, total, left_s)

    return predict(
        folder, target, model, incoming=arrivals, on_case=decided, report=False, **options
    )


class Arrivals:
    """The cases of a folder as they become complete; an endless stream of work.

    Args:
        folder: to look at.
        channels: files per case that the model needs.
        file_ending: only files of this format; None for any.
        settle_s: how long a case must not have changed.
        marker: ending of the file that says that a case is complete; None to wait instead.
        poll_s: seconds between looks.
        modalities: which images of a BIDS folder are meant, as for ``find_cases``.
        clock: seconds since any moment.
        sleep: waits.
    """

    def __init__(
        self,
        folder: Path,
        *,
        channels: int,
        file_ending: str | None = None,
        settle_s: float = SETTLE_S,
        marker: str | None = None,
        poll_s: float = POLL_S,
        modalities: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._folder = folder
        self._channels = channels
        self._file_ending = file_ending
        self._settle_s = settle_s
        self._marker = marker
        self._poll_s = poll_s
        self._modalities = modalities
        self._said = ""
        self._clock = clock
        self._sleep = sleep
        self._seen: dict[str, tuple[Mark, float]] = {}
        self._given: dict[str, Mark] = {}
        self._in_work: set[str] = set()
        self._next_look = float("-inf")

    def __iter__(self) -> Iterator[Work]:
        while True:
            if self._clock() < self._next_look:
                self._sleep(IDLE_S)
                yield None
                continue
            begun = self._clock()
            for item, mark in self._complete():
                self._given[item.id] = mark
                self._in_work.add(item.id)
                yield item
            scan_s = self._clock() - begun
            self._next_look = self._clock() + max(self._poll_s, scan_s / SCAN_SHARE)

    def decided(self, case_id: str) -> None:
        """Note that a case has its record, so that it is given again when its files change."""
        self._in_work.discard(case_id)

    def _complete(self) -> list[tuple[Case | Rejection, Mark]]:
        """Cases that are complete and were not given in their present state."""
        now = self._clock()
        found = self._look()
        self._seen = {
            name: (mark, since)
            for name, (_, mark) in found.items()
            for known, since in [self._seen.get(name, (mark, now))]
            for since in [since if known == mark else now]
        }
        return [
            (item, mark)
            for name, (item, mark) in found.items()
            if name not in self._in_work
            and self._given.get(name) != mark
            and self._is_complete(name, now)
        ]

    def _is_complete(self, name: str, now: float) -> bool:
        if self._marker is not None:
            return (self._folder / f"{name}{self._marker}").exists()
        return now - self._seen[name][1] >= self._settle_s

    def _look(self) -> dict[str, tuple[Case | Rejection, Mark]]:
        try:
            listing = find_cases(
                self._folder, channels=self._channels, file_ending=self._file_ending,
                modalities=self._modalities,
            )  # fmt: skip
        except UsageError as problem:
            if not self._folder.is_dir():
                raise
            if is_bids(self._folder) and problem.message != self._said:
                self._said = problem.message  # more may arrive, so it is said and waited
                logger.warning("%s", problem.message)
            return {}
        except FileNotFoundError:
            return {}  # a file went away amid looking
        found: dict[str, tuple[Case | Rejection, Mark]] = {}
        for rejection in listing.rejected:
            found[safe_id(rejection.id)] = rejection, (rejection.code, rejection.message)
        for case in listing.cases:
            mark = tuple(_mark(path) for path in case.images)
            if None not in mark:
                found[case.id] = case, mark
        return found


def _mark(path: Path) -> Mark | None:
    """State of a file, or of all files of a folder; None when it goes away amid looking."""
    try:
        paths = sorted(path.rglob("*")) if path.is_dir() else [path]
        states = [(str(each), each.stat()) for each in paths]
    except OSError:
        return None
    return tuple((name, state.st_size, state.st_mtime_ns) for name, state in states)
