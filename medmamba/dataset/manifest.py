"""Work of any length as a stream: a list of cases that is read again and again and never kept.

Opening a manifest reads it once, to find broken rows, count its cases, and note names that stand in
it twice; for a name that takes eight bytes. Files are looked at when their turn comes.
"""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medmamba.dataset.case import Case
from medmamba.dataset.inputs import (
    CaseListing,
    Rejection,
    candidate_of,
    collision_key,
    find_cases,
    is_list,
    judge,
    name_of,
    safe_id,
)
from medmamba.dataset.lists import STREAMED_SUFFIXES, read_rows
from medmamba.dataset.shards import Shard
from medmamba.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class CaseStream:
    """The cases of a list, in its order; a case that cannot be taken comes as a rejection.

    Args:
        path: the list.
        root: folder that its paths are relative to.
        boundary: resolved folder that they must not leave; None allows every place.
        apart_from: resolved folder for the masks, which no image may lie in.
        channels: files per case that the model needs.
        shard: the share of it that is meant; None for all.
        total: cases of the share.
        repeated: fingerprints of names that more than one case has.
    """

    path: Path
    root: Path
    boundary: Path | None
    apart_from: Path | None
    channels: int
    shard: Shard | None
    total: int
    repeated: frozenset[int]

    def __iter__(self) -> Iterator[Case | Rejection]:
        for row in read_rows(self.path):
            name = name_of(row)
            if self.shard is not None and not self.shard.holds(safe_id(name)):
                continue
            candidate = candidate_of(row, self.root, self.channels)
            twin = fingerprint(name) in self.repeated
            verdict = judge(candidate, self.boundary, repeated=twin, listed=True)
            yield self._kept_apart(verdict) if isinstance(verdict, Case) else verdict

    def _kept_apart(self, case: Case) -> Case | Rejection:
        """Masks must never land among the images."""
        for path in case.images:
            if self.apart_from is not None and path.resolve().is_relative_to(self.apart_from):
                message = f"case {case.id}: {path.name} lies in the output folder. Choose another "
                message += "folder for the masks."
                return Rejection(id=case.id, code="E_PATH_OUTPUT", message=message)
        return case


def is_manifest(source: Path) -> bool:
    """Whether a path is a list that can be read as a stream, by its name."""
    return source.suffix.lower() in STREAMED_SUFFIXES and not source.is_dir()


def open_cases(
    source: Path,
    *,
    channels: int,
    file_ending: str | None = None,
    root: Path | None = None,
    shard: Shard | None = None,
    follow_links: bool = False,
    stream: bool = True,
    apart_from: Path | None = None,
    modalities: Sequence[str] = (),
) -> CaseListing | CaseStream:
    """Find the cases behind a path, as a stream where that is possible (and ``stream`` is set).

    The other arguments and errors are those of `find_cases` and `open_manifest`.
    """
    if root is not None and not is_list(source):
        raise UsageError(
            f"--root {root}: completes the paths of a list, and {source} is none. Leave it out."
        )
    if stream and is_manifest(source):
        return open_manifest(
            source, channels=channels, root=root, shard=shard, follow_links=follow_links,
            apart_from=apart_from,
        )  # fmt: skip
    listing = find_cases(
        source, channels=channels, file_ending=file_ending, root=root, follow_links=follow_links,
        modalities=modalities,
    )  # fmt: skip
    return listing if shard is None else shard.of(listing)


def open_manifest(
    path: Path,
    *,
    channels: int,
    root: Path | None = None,
    shard: Shard | None = None,
    follow_links: bool = False,
    apart_from: Path | None = None,
) -> CaseStream:
    """Read a CSV or JSON Lines list once, keeping next to nothing of it.

    Args:
        path: the list.
        channels: files per case that the model needs.
        root: folder that its paths are relative to and must not leave; the list's own when None.
        shard: take a share of it.
        follow_links: accept paths that leave the folder.
        apart_from: folder for the masks, which no image may lie in.

    Raises:
        UsageError: it cannot be read, a row cannot be understood, or it holds no case.
    """
    prints = array("Q")
    total = 0
    for row in read_rows(path):
        name = name_of(row)
        prints.append(fingerprint(name))
        total += shard is None or shard.holds(safe_id(name))
    if not prints:
        raise UsageError(f"{path.name}: names no case. Write a row per case.")
    folder = root or path.parent
    return CaseStream(
        path=path,
        root=folder,
        boundary=None if follow_links else folder.resolve(),
        apart_from=None if apart_from is None else apart_from.resolve(),
        channels=channels,
        shard=shard,
        total=total,
        repeated=_repeated(prints),
    )


def fingerprint(name: str) -> int:
    """Eight bytes that stand for a name, the same for names that collide."""
    # Among a million names two different ones share eight bytes with a chance of 3e-8.
    text = collision_key(name).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _repeated(prints: "array[int]") -> frozenset[int]:
    ordered = np.sort(np.frombuffer(prints, np.uint64))
    return frozenset(int(value) for value in ordered[1:][ordered[1:] == ordered[:-1]])
