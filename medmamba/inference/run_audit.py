"""Whether what the runs of an output folder wrote of themselves is still what they wrote. No torch.

A journal's lines each hold the hash of the line before, and the manifest of a run that came to its
end holds that of the last one. So a line that was changed, taken out or added shows.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medmamba.errors import MedMambaError
from medmamba.files import RECORD_CONFIG, read_json
from medmamba.inference.journal import MANIFEST_FILE, RUNS_FOLDER
from medmamba.inference.records import records_folder

State = Literal["holds", "open", "changed"]
"""``open``: killed, or going on; there is no manifest that could vouch for the end."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The journals of one run.

    Args:
        run_id: name of the run.
        state: what was found.
        detail: which line or file, where something is wrong.
    """

    __pydantic_config__ = RECORD_CONFIG

    run_id: str
    state: State
    detail: str = ""


class _BrokenChainError(Exception):
    """A line that does not follow from the one before."""


def verify_runs(folder: Path) -> tuple[RunState, ...]:
    """Follow the hashes through every journal of an output folder, run by run."""
    runs = records_folder(folder) / RUNS_FOLDER
    places = sorted(place for place in runs.iterdir() if place.is_dir()) if runs.is_dir() else []
    return tuple(_judge(place) for place in places)


def _judge(run: Path) -> RunState:
    manifest = run / MANIFEST_FILE
    finished = manifest.is_file()
    try:
        last = {_follow(path, finished=finished) for path in sorted(run.glob("journal-*.jsonl"))}
    except _BrokenChainError as broken:
        return RunState(run_id=run.name, state="changed", detail=str(broken))
    if not finished:
        return RunState(run_id=run.name, state="open")
    if _last_hash(manifest) not in last:
        detail = "the journal does not end with the line whose hash manifest.json holds"
        return RunState(run_id=run.name, state="changed", detail=detail)
    return RunState(run_id=run.name, state="holds")


def _follow(journal: Path, *, finished: bool) -> str:
    """The hash of the last line. A killed run may leave half of one."""
    previous = ""
    with journal.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.endswith(b"\n") and not finished:
                break
            entry = _parsed(line)
            if entry is None or entry.get("previous") != previous:
                raise _BrokenChainError(
                    f"{journal.name}, line {number}: does not follow the one before"
                )
            previous = hashlib.sha256(line.removesuffix(b"\n")).hexdigest()
    return previous


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _last_hash(manifest: Path) -> str | None:
    try:
        content = read_json(manifest, what="manifest", error=MedMambaError)
    except MedMambaError:
        return None
    return content.get("journal_sha256") if isinstance(content, dict) else None
