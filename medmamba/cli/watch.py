"""``medmamba watch``: masks for images as they arrive."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from medmamba.cli.messages import say
from medmamba.cli.options import (
    LAYOUTS,
    BidsSuffix,
    Device,
    Json,
    Layout,
    Workers,
    check_choice,
    words_of,
)
from medmamba.cli.predict import print_case


def watch(
    images: Annotated[Path, typer.Argument(metavar="IN", help="Folder in which images arrive.")],
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder for the masks, apart from IN.")
    ],
    model: Annotated[
        Path,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="Model folder, or the run folder holding it."
        ),
    ],
    settle: Annotated[
        float,
        typer.Option(
            "--settle", metavar="SECONDS", min=0.0, help="Take a case unchanged for so long."
        ),
    ] = 10.0,
    marker: Annotated[
        str | None,
        typer.Option(
            "--marker", metavar="ENDING", help="Take a case when CASE + ENDING is there, instead."
        ),
    ] = None,
    poll: Annotated[
        float, typer.Option("--poll", metavar="SECONDS", min=0.1, help="Look so often.")
    ] = 2.0,
    mirror: Annotated[
        bool,
        typer.Option(
            "--tta/--no-tta", help="Average over mirrored copies: better, up to 8 times slower."
        ),
    ] = False,
    device: Device = "auto",
    workers: Workers = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout-per-case", metavar="SECONDS", min=0.1, help="Give up a case that is slower."
        ),
    ] = None,
    grace: Annotated[
        float,
        typer.Option(
            "--grace", metavar="SECONDS", min=0.0, help="Finish a case that needs no longer."
        ),
    ] = 20.0,
    metrics: Annotated[
        Path | None,
        typer.Option("--metrics", metavar="FILE.prom", help="Figures for Prometheus, as text."),
    ] = None,
    layout: Layout = "plain",
    bids_suffix: BidsSuffix = "",
    as_json: Json = False,
) -> None:
    """Predict every image that arrives in a folder, until Ctrl-C or SIGTERM.

    Half-copied files are left alone until they have settled. Nothing in IN is changed. After a
    crash or a restart, what has a valid record in OUT is not done again, and nothing is forgotten;
    a file that is replaced is predicted anew.

    Exit code 130 or 143: stopped by a signal.
    """
    from medmamba.pipeline.watching import watch as run_watch

    outcome = run_watch(
        images,
        output,
        model,
        settle_s=settle,
        marker=marker,
        poll_s=poll,
        mirror=mirror,
        device=device,
        workers=workers,
        timeout_per_case=timeout,
        grace_s=grace,
        metrics=metrics,
        layout=check_choice("--layout", layout, LAYOUTS),
        bids_suffixes=words_of(bids_suffix),
        on_case=print_case,
        on_message=say,
    )
    if as_json:
        from medmamba.files import to_json

        sys.stdout.write(to_json(outcome.summary()))
    else:
        print(f"stopped; {outcome.succeeded} of {outcome.total} cases have a mask in {output}")
    raise typer.Exit(outcome.exit_code)
