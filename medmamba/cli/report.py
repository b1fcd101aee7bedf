"""``medmamba report``: a page to look at, rebuilt from records."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from medmamba.cli.options import Json, RedactIds, ReportInteractive


def report(
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder that `medmamba predict` wrote.")
    ],
    images: Annotated[
        Path | None,
        typer.Option(
            "--input", "-i", metavar="IN", help="What was predicted, to show it under the masks."
        ),
    ] = None,
    interactive: ReportInteractive = False,
    redact_ids: RedactIds = None,
    as_json: Json = False,
) -> None:
    """Write OUT/report.html and OUT/summary.csv from the records; nothing is segmented again.

    The page is one file that opens from disk and loads nothing: pictures of every case, volumes
    with a flag where a structure touches the image's border, warnings, and a table to sort.
    """
    from medmamba.reporting import write_report

    outcome = write_report(output, images=images, interactive=interactive, key=redact_ids)
    if as_json:
        from medmamba.files import to_json

        sys.stdout.write(
            to_json(
                {
                    "report": str(outcome.path),
                    "cases": outcome.cases,
                    "pictures": outcome.pictures,
                }
            )
        )
    else:
        print(f"{outcome.path}: {outcome.cases} cases, {outcome.pictures} with pictures")
