"""``medmamba index``: the list of cases of an archive, for prediction in shares or on a cluster."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from medmamba.cli.messages import say
from medmamba.cli.options import Json
from medmamba.errors import UsageError

if TYPE_CHECKING:
    from medmamba.dataset.indexing import IndexOutcome

EXIT_LEFT_OUT = 4
SHOWN = 10


def index(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Images, in folders of any depth.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.jsonl", help="The list to write.")
    ],
    model: Annotated[
        Path | None,
        typer.Option("--model", "-m", metavar="MODEL", help="Model that says how many channels."),
    ] = None,
    id_from: Annotated[
        str,
        typer.Option(
            "--id-from",
            metavar="name|path",
            help="Call a case as its files, or by the folders above them too.",
        ),
    ] = "name",
    as_json: Json = False,
) -> None:
    """Walk a folder and write one line a case, for [cyan]predict -i FILE.jsonl[/cyan].

    Files CASE_0000, CASE_0001, ... of one folder are the channels of a case; a folder or zip
    archive of DICOM files is a case. Paths are relative to the list where the images are below it,
    else to FOLDER. Nothing is read but names (and the first bytes of files that may be DICOM).

    Exit code 0: every image is in the list; 4: some are left out, with the reason.
    """
    from medmamba.cli.display import StepProgress
    from medmamba.dataset.indexing import IdFrom, index_folder

    if id_from not in ("name", "path"):
        raise UsageError(f"--id-from '{id_from}': choose name or path.")
    channels = None
    if model is not None:
        from medmamba.bundle import load_bundle

        channels = len(load_bundle(model).manifest.channels)
    with StepProgress() as progress:
        outcome = index_folder(
            folder,
            output,
            channels=channels,
            id_from=cast(IdFrom, id_from),
            on_progress=lambda folders, cases: progress(f"{folders} folders", cases, cases),
        )
    if as_json:
        from medmamba.files import to_json, to_plain

        sys.stdout.write(to_json(to_plain(outcome)))
    else:
        _print(outcome)
    raise typer.Exit(EXIT_LEFT_OUT if outcome.left_out else 0)


def _print(outcome: "IndexOutcome") -> None:
    channels = ", ".join(
        f"{cases} with {number} file{'s' if number > 1 else ''}"
        for number, cases in outcome.by_channels.items()
        if cases
    )
    series = f" ({outcome.series} DICOM)" if outcome.series else ""
    print(f"{outcome.manifest}: {outcome.cases} cases{series}: {channels or 'none'}")
    print(f"looked into {outcome.folders} folders; {outcome.other_files} other files")
    for text in outcome.problems[:SHOWN]:
        say(f"left out  {text}")
    if outcome.left_out > SHOWN:
        say(f"left out  {outcome.left_out - SHOWN} more (--json lists them)")
    if outcome.left_out:
        say("names that several cases have: try --id-from path")
    root = "" if outcome.root == outcome.manifest.parent else f" --root {_quoted(outcome.root)}"
    print(f"next: medmamba predict -i {_quoted(outcome.manifest)}{root} -o OUT -m MODEL")


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
