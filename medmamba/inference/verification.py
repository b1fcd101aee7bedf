"""Whether an output folder still is what its records say. No torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medmamba.errors import MedMambaError, UsageError
from medmamba.files import RECORD_CONFIG, read_json
from medmamba.inference.records import CommitRecord, read_record, records_folder, still_holds
from medmamba.io import FORMATS

State = Literal["holds", "no_mask", "missing", "changed", "unclaimed", "unreadable"]
"""``no_mask``: rejected or failed, rightly without one; ``unclaimed``: a mask nobody recorded."""

SOUND: tuple[State, ...] = ("holds", "no_mask")


@dataclass(frozen=True, kw_only=True)
class OutputState:
    """One case of an output folder.

    Args:
        case_id: name of the case.
        state: what was found.
        detail: which file, and for a case without a mask why.
    """

    __pydantic_config__ = RECORD_CONFIG

    case_id: str
    state: State
    detail: str = ""

    @property
    def sound(self) -> bool:
        """Whether record and files agree."""
        return self.state in SOUND


def verify_output(folder: Path) -> tuple[OutputState, ...]:
    """Compare every mask with the hash in its record, sorted by case.

    Raises:
        UsageError: there is no folder, or no record in it.
    """
    # What begins with a dot is a file that a killed run was writing; the next run removes it.
    folder = records_folder(folder)
    paths = sorted(folder.glob("[!.]*.json")) if folder.is_dir() else []
    read = {path: read_record(path) for path in paths}
    records = {
        path.stem: record
        for path, record in read.items()
        if record is not None or not _is_other_json(path)
    }
    if not records:
        raise UsageError(
            f"{folder}: {'holds no record (CASE.json)' if folder.is_dir() else 'is no folder'}. "
            "Give a folder that `medmamba predict` wrote."
        )
    states = [_judge(folder, case_id, record) for case_id, record in records.items()]
    return tuple(sorted((*states, *_unclaimed(folder, records)), key=lambda item: item.case_id))


def _is_other_json(path: Path) -> bool:
    """Whether a file is sound JSON that is about no case: scores, dataset.json, a plan."""
    try:
        content = read_json(path, what="commit record", error=MedMambaError)
    except MedMambaError:
        return False
    return isinstance(content, dict) and "case_id" not in content


def _judge(folder: Path, case_id: str, record: CommitRecord | None) -> OutputState:
    if record is None:
        return OutputState(
            case_id=case_id, state="unreadable", detail=f"{case_id}.json is no record"
        )
    if record.error is not None:
        return OutputState(
            case_id=case_id, state="no_mask", detail=f"{record.status} [{record.error.code}]"
        )
    name = record.output.name if record.output is not None else ""
    if still_holds(record, folder):
        return OutputState(case_id=case_id, state="holds", detail=name)
    state: State = "changed" if name and (folder / name).is_file() else "missing"
    return OutputState(case_id=case_id, state=state, detail=name)


def _unclaimed(folder: Path, records: dict[str, CommitRecord | None]) -> Iterator[OutputState]:
    claimed = {
        record.output.name for record in records.values() if record is not None and record.output
    }
    for path in sorted(folder.iterdir()):
        if path.name in claimed or path.name.startswith("."):
            continue
        if path.is_file() and path.name.lower().endswith(tuple(FORMATS)):
            yield OutputState(
                case_id=path.name.split(".")[0],
                state="unclaimed",
                detail=f"{path.name} has no record",
            )
