"""Whether everything that was to be predicted has been: no share, no case forgotten. No torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from medmamba.dataset import Case, CaseListing, Rejection
from medmamba.dataset.manifest import CaseStream, open_cases
from medmamba.dataset.redaction import read_key
from medmamba.dataset.shards import Shard
from medmamba.files import RECORD_CONFIG
from medmamba.inference.history import manifests
from medmamba.inference.records import read_record, records_folder
from medmamba.inference.status import ShardState, run_shards


@dataclass(frozen=True, kw_only=True)
class MissingCase:
    """A case that was to be predicted and has no record; ``shard`` is the share it belongs to."""

    __pydantic_config__ = RECORD_CONFIG

    case_id: str
    shard: str | None = None


def unfinished_shards(folder: Path, count: int) -> tuple[ShardState, ...]:
    """Return those of ``count`` shares that no run has worked through to its end."""
    return tuple(shard for shard in run_shards(folder, count) if shard.state != "ended")


def missing_cases(
    folder: Path,
    source: Path,
    *,
    root: Path | None = None,
    shards: int | None = None,
    modalities: Sequence[str] = (),
    key: Path | None = None,
) -> list[MissingCase]:
    """Return the cases behind a path, as given to ``predict``, that have no record.

    Args:
        folder: the output.
        source: image, folder or list.
        root: folder that the paths of a list are relative to.
        shards: number of shares, to say which one a case belongs to.
        modalities: which images of a BIDS folder were meant, as given to ``predict``.
        key: file of the key that cases were renamed by.

    Raises:
        UsageError: the path means no cases, or the key cannot be read.
    """
    folder = records_folder(folder)
    work = open_cases(
        source, channels=_channels(folder), file_ending=_file_ending(folder), root=root,
        follow_links=True, modalities=modalities,
    )  # fmt: skip
    redaction = None if key is None else read_key(key)
    listed: Iterable[Case | Rejection] = work if isinstance(work, CaseStream) else ()
    if isinstance(work, CaseListing):
        listed = (*work.rejected, *work.cases)
    found = ((item.id, redaction.name(item.id) if redaction else item.id) for item in listed)
    names = (name for name, shown in found if not (folder / f"{shown}.json").is_file())
    return [MissingCase(case_id=name, shard=_shard_of(name, shards)) for name in names]


def _channels(folder: Path) -> int:
    """Files a case has, by the records."""
    for path in folder.glob("[!.]*.json"):
        record = read_record(path)
        if record is not None and record.succeeded:
            return len(record.inputs)
    return 1


def _file_ending(folder: Path) -> str | None:
    """The format that the model of the latest run takes; None where no finished run says so."""
    latest = next(manifests(folder), {})
    return str(latest.get("request", {}).get("file_ending") or "") or None


def _shard_of(name: str, count: int | None) -> str | None:
    if count is None:
        return None
    shares = (Shard(index=index, count=count) for index in range(count))
    return next(str(share) for share in shares if share.holds(name))
