"""Writing the list of cases of an archive: walk a folder, group channel files, one line a case.

Folder and list may be of any size; of what was written, eight bytes a case are remembered.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medmamba.dataset.inputs import (
    CHANNEL_NAME,
    image_suffix,
    safe_id,
)
from medmamba.dataset.lists import CHANNEL_PREFIX
from medmamba.dataset.manifest import fingerprint
from medmamba.errors import UsageError
from medmamba.files import RECORD_CONFIG, replace_atomic
from medmamba.io import ZIP_SUFFIX, holds_dicom

IdFrom = Literal["name", "path"]

REPORT_EVERY = 1000
MAX_PROBLEMS = 100
"""So many are kept as text; all are counted."""

Progress = Callable[[int, int], None]
"""Called now and then with (folders, cases)."""


@dataclass(frozen=True, kw_only=True)
class IndexOutcome:
    """What an index holds, and what it leaves out.

    Args:
        manifest: the list.
        root: folder that its paths are relative to.
        cases: lines written.
        by_channels: number of channel files -> cases that have so many.
        series: cases that are a DICOM series or archive.
        folders: folders looked into.
        other_files: files that are no image.
        left_out: cases that are not in the list, because of a problem.
        problems: the first of them, as sentences.
    """

    __pydantic_config__ = RECORD_CONFIG

    manifest: Path
    root: Path
    cases: int
    by_channels: dict[int, int]
    series: int
    folders: int
    other_files: int
    left_out: int
    problems: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Found:
    name: str
    files: tuple[str, ...]
    series: bool = False


def index_folder(
    folder: Path,
    manifest: Path,
    *,
    channels: int | None = None,
    id_from: IdFrom = "name",
    on_progress: Progress | None = None,
) -> IndexOutcome:
    """Write every case below a folder into a list (.jsonl), atomically.

    Paths in the list are relative to the list's own folder where the images are below it, else to
    ``folder``.

    Args:
        folder: where the images are, in folders of any depth.
        manifest: the list.
        channels: files a case must have; None for any number.
        id_from: ``name``: a case is called as its files; ``path``: as the folders above them too.
        on_progress: called now and then.

    Raises:
        UsageError: no such folder, no such kind of list, or no image anywhere.
        EnvironmentFault: the list cannot be written.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: is no folder. Give the folder that holds the images.")
    if manifest.suffix.lower() != ".jsonl":
        raise UsageError(f"{manifest}: an index is a .jsonl file. Choose such a name.")
    above = manifest.parent.resolve()
    root = manifest.parent if folder.resolve().is_relative_to(above) else folder
    indexer = _Indexer(folder, root, channels=channels, id_from=id_from, on_progress=on_progress)
    replace_atomic(manifest, indexer.write)
    if not indexer.cases and not indexer.left_out:
        manifest.unlink()
        raise UsageError(f"{folder}: holds no image, however deep. Check the path.")
    return IndexOutcome(
        manifest=manifest,
        root=root,
        cases=indexer.cases,
        by_channels=dict(sorted(indexer.by_channels.items())),
        series=indexer.series,
        folders=indexer.folders,
        other_files=indexer.other_files,
        left_out=indexer.left_out,
        problems=tuple(indexer.problems),
    )


class _Indexer:
    """One walk, and what was counted on it."""

    def __init__(
        self,
        folder: Path,
        root: Path,
        *,
        channels: int | None,
        id_from: IdFrom,
        on_progress: Progress | None,
    ) -> None:
        self.by_channels: Counter[int] = Counter()
        self.cases = self.series = self.folders = self.other_files = self.left_out = 0
        self.problems: list[str] = []
        self._folder = folder
        self._prefix = Path(os.path.relpath(folder.resolve(), root.resolve()))
        self._channels = channels
        self._id_from = id_from
        self._on_progress = on_progress

    def write(self, target: Path) -> None:
        """Write all cases, then leave out those whose name turned out to be another's too."""
        seen: Counter[int] = Counter()
        with target.open("w", encoding="utf-8") as lines:
            for found in self._walk():
                name = self._id(found)
                seen[fingerprint(name)] += 1
                entry = {"case_id": name} | {
                    f"{CHANNEL_PREFIX}{number}": (self._prefix / file).as_posix()
                    for number, file in enumerate(found.files)
                }
                lines.write(json.dumps(entry) + "\n")
                self._count(found, 1)
        twins = {key for key, times in seen.items() if times > 1}
        if twins:
            self._leave_out(target, twins)

    def _leave_out(self, target: Path, twins: set[int]) -> None:
        draft = target.with_name(f"{target.name}.draft")
        with target.open(encoding="utf-8") as lines, draft.open("w", encoding="utf-8") as kept:
            for line in lines:
                entry = json.loads(line)
                name = entry["case_id"]
                if fingerprint(name) not in twins:
                    kept.write(line)
                    continue
                self._problem(f"{name}: several cases have this name ({entry['channel_0']})")
                self.cases -= 1
                self.by_channels[len(entry) - 1] -= 1
        draft.replace(target)

    def _count(self, found: _Found, step: int) -> None:
        self.cases += step
        self.series += step * found.series
        self.by_channels[len(found.files)] += step
        if self._on_progress is not None and self.cases % REPORT_EVERY == 0:
            self._on_progress(self.folders, self.cases)

    def _problem(self, text: str) -> None:
        self.left_out += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(text)

    def _id(self, found: _Found) -> str:
        if self._id_from == "name":
            return safe_id(found.name)
        parts = Path(found.files[0]).parent.parts
        return safe_id("_".join((*parts, found.name)))

    def _walk(self) -> Iterator[_Found]:
        """Go through the folders in order of their names, links to folders left aside."""
        waiting = [""]
        while waiting:
            place = waiting.pop()
            self.folders += 1
            below: list[str] = []
            yield from self._look_into(place, below)
            waiting += sorted(below, reverse=True)

    def _look_into(self, place: str, below: list[str]) -> Iterator[_Found]:
        images: dict[str, list[str]] = {}
        others: list[str] = []
        folders: list[str] = []
        try:
            with os.scandir(self._folder / place) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.name)
                    elif suffix := image_suffix(entry.name):
                        images.setdefault(suffix, []).append(entry.name)
                    else:
                        others.append(entry.name)
        except OSError as error:
            self._problem(f"{place or '.'}: cannot be looked into ({error.strerror})")
            return
        archives = [name for name in others if name.lower().endswith(ZIP_SUFFIX)]
        loose = [name for name in others if name not in set(archives)]
        if not images and self._is_series(place, loose):
            yield _Found(name=self._series_name(place), files=(place or ".",), series=True)
            return
        self.other_files += len(loose)
        for suffix, names in sorted(images.items()):
            yield from self._group(place, sorted(names), suffix)
        for name in sorted(archives):
            path = os.path.join(place, name)  # noqa: PTH118 a million of them
            if holds_dicom(self._folder / path):
                yield _Found(name=Path(name).stem, files=(path,), series=True)
            else:
                self.other_files += 1
        below += [os.path.join(place, name) for name in folders]  # noqa: PTH118

    def _is_series(self, place: str, files: list[str]) -> bool:
        """A series lies in one folder; the first file that is DICOM tells."""
        return any(holds_dicom(self._folder / place / name) for name in sorted(files))

    def _series_name(self, place: str) -> str:
        return Path(place).name or self._folder.resolve().name

    def _group(self, place: str, names: list[str], suffix: str) -> Iterator[_Found]:
        """Join CASE_0000, CASE_0001, ... of one folder and format; any other name is a case."""
        groups: dict[tuple[str, bool], dict[int, str]] = {}
        for name in names:
            stem = name[: len(name) - len(suffix)]
            match = CHANNEL_NAME.fullmatch(stem)
            if match is None:
                groups[stem, False] = {0: name}
            else:
                groups.setdefault((match["case"], True), {})[int(match["channel"])] = name
        for (case, _), files in groups.items():
            for found in self._cases_of(case, files, suffix):
                paths = tuple(os.path.join(place, name) for name in found.files)  # noqa: PTH118
                if self._channels is not None and len(paths) not in (1, self._channels):
                    self._problem(f"{found.name}: {len(paths)} channels, not {self._channels}")
                else:
                    yield _Found(name=found.name, files=paths)

    def _cases_of(self, case: str, files: dict[int, str], suffix: str) -> Iterator[_Found]:
        if 0 not in files:
            # Numbers that are part of the name, such as patient_0007.
            for name in files.values():
                yield _Found(name=name[: len(name) - len(suffix)], files=(name,))
        elif sorted(files) == list(range(len(files))):
            yield _Found(name=case, files=tuple(files[number] for number in sorted(files)))
        else:
            missing = sorted(set(range(max(files))) - set(files))
            gaps = ", ".join(f"{number:04d}" for number in missing)
            self._problem(f"{case}: channel {gaps} is missing")
