"""``medmamba compare``: networks and their twins under the same conditions."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from medmamba.cli.messages import say
from medmamba.cli.options import (
    Device,
    Json,
    WorkFolder,
    complete_network,
    complete_recipe,
    parse_duration,
)
from medmamba.cli.signals import exit_on_sigterm
from medmamba.errors import UsageError


def compare(
    work: WorkFolder,
    networks: Annotated[
        list[str],
        typer.Argument(
            autocompletion=complete_network,
            metavar="NETWORK[:identity|:dwconv][,key=value]...",
            help="Networks planned in WORK; the others are held against the first. Changes: keys "
            "of a recipe, features=FACTOR, options.NAME, name, seeds=3/4/5.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="Folder of report and runs.")
    ],
    twins: Annotated[
        bool, typer.Option("--twins", help="Add the identity and dwconv twin of each network.")
    ] = False,
    seeds: Annotated[
        str, typer.Option("--seeds", metavar="0,1,2", help="Seeds; a claim needs three.")
    ] = "0,1,2",
    folds: Annotated[
        str, typer.Option("--folds", metavar="0,1", help="Folds whose validation cases count.")
    ] = "0",
    configuration: Annotated[
        str | None, typer.Option("--configuration", "-c", help="Configuration of the plans.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            autocompletion=complete_recipe,
            help="One for all (default: the plan's, common or short).",
        ),
    ] = None,
    max_time: Annotated[
        str | None,
        typer.Option("--max-time", metavar="20m", help="Equal wall-clock time for every run."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", min=1, help="Equal epochs for every run.")
    ] = None,
    iterations: Annotated[
        int | None, typer.Option("--iterations", min=1, help="Iterations per epoch.")
    ] = None,
    device: Device = "auto",
    precision: Annotated[
        str, typer.Option("--precision", metavar="auto|bf16|fp16|fp32", help="Of training.")
    ] = "auto",
    jobs: Annotated[
        int,
        typer.Option("--jobs", min=1, help="Runs at once, each on an equal share of the cores."),
    ] = 1,
    as_json: Json = False,
) -> None:
    """Compare networks on one split with one budget and several seeds; the same command goes on.

    Writes OUT/report.html with the tables and pictures, cases.csv and comparison.json. It says
    "no difference" where other seeds alone would make one as large.
    """
    from medmamba.cli.display import print_table
    from medmamba.pipeline.comparing import compare as run_compare
    from medmamba.pipeline.comparing import outcome_to_plain
    from medmamba.pipeline.comparison_report import cost_rows, remarks, score_rows

    exit_on_sigterm()
    outcome = run_compare(
        work,
        networks,
        output,
        twins=twins,
        seeds=_numbers("--seeds", seeds),
        folds=_numbers("--folds", folds),
        configuration=configuration,
        recipe=recipe,
        epochs=epochs,
        iterations=iterations,
        max_time=parse_duration(max_time) if max_time else None,
        device=device,
        precision=precision,
        jobs=jobs,
        command=shlex.join(["medmamba", *sys.argv[1:]]),
        on_message=say,
    )
    if as_json:
        from medmamba.files import to_json

        sys.stdout.write(to_json(outcome_to_plain(outcome)))
        return
    print_table("Scores", *score_rows(outcome))
    print_table("Cost", *cost_rows(outcome))
    first = outcome.entries[0].contestant.name
    for entry, pair in zip(outcome.entries[1:], outcome.pairs, strict=True):
        print(f"{entry.contestant.name} against {first}: {pair.verdict} ({pair.why})")
    for text in remarks(outcome):
        print(text)
    print(f"report    {outcome.folder / 'report.html'}")


def _numbers(option: str, text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"{option} '{text}': numbers from 0 with commas between, such as 0,1,2.")
    return tuple(int(part) for part in parts)
