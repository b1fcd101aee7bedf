"""``medmamba evaluate``: how well masks agree with a reference."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medmamba.cli.options import Json, Workers

if TYPE_CHECKING:
    from medmamba.evaluation.scores import Evaluation


def evaluate(
    reference: Annotated[
        Path, typer.Argument(metavar="REF", help="Folder of reference label images.")
    ],
    prediction: Annotated[Path, typer.Argument(metavar="PRED", help="Folder of predicted masks.")],
    dataset_json: Annotated[
        Path | None,
        typer.Option(
            "--labels",
            metavar="DATASET.JSON",
            help="Meaning of labels (default: dataset.json in PRED, in REF or above REF).",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for summary.json and metrics.csv (default: PRED)."
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option("--nsd-tolerance", metavar="MM", min=0.0, help="Tolerance of NSD.")
    ] = 1.0,
    allow_missing: Annotated[
        bool,
        typer.Option("--allow-missing", help="Evaluate although some cases have no prediction."),
    ] = False,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Compare masks with references: Dice, IoU, HD95, NSD and volumes per case and label.

    Where they overlap, the numbers are those of nnU-Net's summary.json.
    """
    from medmamba.pipeline.evaluating import evaluate as run_evaluate

    outcome = run_evaluate(
        reference,
        prediction,
        dataset_json=dataset_json,
        output=output,
        tolerance_mm=tolerance,
        allow_missing=allow_missing,
        workers=workers,
    )
    if as_json:
        from medmamba.files import to_json

        sys.stdout.write(to_json(outcome.summary()))
        return
    print_evaluation(outcome)
    folder = output or prediction
    print(f"written   {folder / 'summary.json'}, {folder / 'metrics.csv'}")


def print_evaluation(evaluation: "Evaluation") -> None:
    """The table people look at: one row a label, then the mean over foreground."""
    from medmamba.cli.display import data, print_table

    columns = ("label", "Dice", "IoU", "HD95 mm", "NSD", "ml", "true ml", "cases")
    rows = [
        (
            row.label,
            _number(row.dice),
            _number(row.iou),
            _number(row.hd95_mm, 2),
            _number(row.nsd),
            _number(row.volume_ml, 2),
            _number(row.reference_volume_ml, 2),
            str(row.cases),
        )
        for row in evaluation.rows()
    ]
    print_table("Mean over cases", columns, rows)
    data.print(f"mean foreground Dice {evaluation.foreground_dice:.4f}")


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None or value != value else f"{value:.{digits}f}"
