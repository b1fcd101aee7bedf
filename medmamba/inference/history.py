"""Reading what runs left behind: events of their journals, and the records these speak of.

Journals say what happened when; commit records say what is true. No torch.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from medmamba.errors import MedMambaError
from medmamba.files import read_json
from medmamba.inference.journal import MANIFEST_FILE, RUNS_FOLDER
from medmamba.inference.records import CommitRecord, Status, read_record

JOURNALS = "journal-*.jsonl"

DECIDED: frozenset[str] = frozenset(get_args(Status))
"""Events that say what became of a case are named after its status."""


def run_folders(folder: Path) -> list[Path]:
    """Return the folders of all runs that wrote into an output folder, oldest first."""
    runs = folder / RUNS_FOLDER
    if not runs.is_dir():
        return []
    found = [path for path in runs.iterdir() if any(path.glob(JOURNALS))]
    # Names tell the second; two runs may begin in one.
    return sorted(found, key=lambda path: (_begun(path), path.name))


def manifests(folder: Path) -> Iterator[dict[str, Any]]:
    """Read the manifests of runs into an output folder, latest first.

    A killed run has none; one that cannot be read vouches for nothing and is passed over.
    """
    for place in reversed(run_folders(folder)):
        try:
            content = read_json(place / MANIFEST_FILE, what="manifest", error=MedMambaError)
        except MedMambaError:
            continue
        if isinstance(content, dict):
            yield content


def _begun(run_folder: Path) -> str:
    return next((str(event.get("time", "")) for event in events(run_folder)), "")


def events(run_folder: Path) -> Iterator[dict[str, Any]]:
    """Read every journal of a run, one process after another, oldest event of each first.

    A line that a killed process left unfinished is passed over.
    """
    for path in sorted(run_folder.glob(JOURNALS)):
        with path.open("rb") as lines:
            for line in lines:
                try:
                    event = json.loads(line)
                except ValueError:
                    continue
                if isinstance(event, dict) and "event" in event:
                    yield event


def records_of_run(folder: Path, run_id: str) -> Iterator[CommitRecord]:
    """Read the record of every case that a run decided, sorted by case.

    Of a case that was tried twice the later decision counts.
    """
    decided = {
        event["case"]: sys.intern(event["event"])
        for event in events(folder / RUNS_FOLDER / run_id)
        if event["event"] in DECIDED
    }
    for case_id in sorted(decided):
        record = read_record(folder / f"{case_id}.json")
        if record is not None:
            yield replace(record, status="skipped") if decided[case_id] == "skipped" else record
