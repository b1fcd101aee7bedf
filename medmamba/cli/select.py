"""``medmamba select``: from cross-validated networks to one model."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from medmamba.cli.messages import say
from medmamba.cli.options import Device, Json, WorkFolder, complete_network


def select(
    work: WorkFolder,
    networks: Annotated[
        list[str] | None,
        typer.Option(
            "--network",
            "-n",
            autocompletion=complete_network,
            help="Choose among these (default: all trained).",
        ),
    ] = None,
    configurations: Annotated[
        list[str] | None,
        typer.Option("--configuration", "-c", help="Choose among these (default: all trained)."),
    ] = None,
    ensembles: Annotated[
        bool, typer.Option("--ensembles/--no-ensembles", help="Also try every pair.")
    ] = True,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="MODEL", help="Model folder (default: in WORK)."),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Pick network, or pair of networks, and postprocessing by cross-validated Dice.

    All folds must be trained. Writes one model folder with the weights of every fold.
    """
    from medmamba.cli.display import print_table
    from medmamba.evaluation.scores import Evaluation
    from medmamba.pipeline.selecting import select as run_select
    from medmamba.pipeline.validating import mean_dice

    outcome = run_select(
        work,
        networks=networks or (),
        configurations=configurations or (),
        ensembles=ensembles,
        output=output,
        device=device,
        on_message=say,
    )
    if as_json:
        from medmamba.files import to_json

        sys.stdout.write(to_json(outcome.to_plain()))
        return

    def by_label(evaluation: Evaluation) -> list[str]:
        return [f"{dice:.4f}" for dice in mean_dice(evaluation).values()]

    labels = list(outcome.candidates[0].evaluation.label_map.foreground)
    rows = [[one.name, f"{one.dice:.4f}", *by_label(one.evaluation)] for one in outcome.candidates]
    print_table("Cross-validated Dice", ("candidate", "mean", *labels), rows)
    for name, lack in outcome.incomplete:
        print(f"left out  {name}: {lack}")
    best = outcome.candidates[0]
    cases = len(best.evaluation.cases)
    print(f"chosen    {best.name}: the highest mean Dice over {cases} cases")
    steps = ", then of ".join("+".join(map(str, step)) for step in outcome.steps)
    reason = (
        f"keep the largest component of {steps}: Dice {best.dice:.4f} -> {outcome.dice_after:.4f}"
        if steps
        else "none: removing islands raises no Dice"
    )
    print(f"cleaning  {reason}")
    print(f"model     {outcome.bundle.folder}")
    print(f"next      medmamba predict -i IMAGES -o MASKS -m {outcome.bundle.folder}")
