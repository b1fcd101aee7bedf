"""``medmamba status``: how far the runs on an output folder are."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medmamba.cli.options import Json, format_duration

if TYPE_CHECKING:
    from medmamba.inference.status import FolderStatus


def status(
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder that `medmamba predict` writes.")
    ],
    as_json: Json = False,
) -> None:
    """Say how many cases are done, failed and pending, how fast it goes, and what went wrong last.

    Read from the records and journals alone, on any machine that sees the folder, while runs go on
    or afterwards; nothing is changed.
    """
    from medmamba.inference.status import folder_status

    found = folder_status(output)
    if as_json:
        from medmamba.files import to_json

        sys.stdout.write(to_json(found))
    else:
        _print(found)


def _print(found: "FolderStatus") -> None:
    total = "" if found.total is None else f" of {found.total}"
    warnings = f" ({found.with_warnings} with warnings)" if found.with_warnings else ""
    print(f"done      {found.done}{total}{warnings}")
    print(f"rejected  {found.rejected}")
    print(f"failed    {found.failed}")
    print(f"pending   {'unknown' if found.pending is None else found.pending}")
    print(f"runs      {found.runs}, {found.running} going on")
    if found.cases_per_hour is not None:
        print(f"speed     {found.cases_per_hour:.1f} cases an hour")
    if found.eta_s is not None:
        print(f"left      {format_duration(found.eta_s)}")
    states = [shard.state for shard in found.shards]
    for state in dict.fromkeys(states):
        numbers = [str(shard.index) for shard in found.shards if shard.state == state]
        print(f"shards    {state}: {', '.join(numbers)} (of {len(states)})")
    for code, cases in found.errors.items():
        print(f"{code}: {cases}")
    for error in found.last_errors:
        print(f"last      {error.time} {error.case_id} {error.code}")
