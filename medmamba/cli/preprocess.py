"""``medmamba preprocess``: preprocess by a plan that is there."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from medmamba.cli.options import Json, ResampleOn, Workers, complete_network
from medmamba.cli.plan import DEFAULT_NETWORK


def preprocess(
    dataset: Annotated[
        Path, typer.Argument(metavar="DATASET", help="The raw dataset that was planned.")
    ],
    work: Annotated[
        Path, typer.Option("--output", "-o", metavar="WORK", help="Work folder that holds a plan.")
    ],
    network: Annotated[
        str,
        typer.Option(
            "--network", "-n", autocompletion=complete_network, help="Network whose plan decides."
        ),
    ] = DEFAULT_NETWORK,
    configurations: Annotated[
        list[str] | None,
        typer.Option(
            "--configuration",
            "-c",
            help="Configuration, repeatable, all in one pass (default: 3d_fullres, 2d for 2D "
            "data).",
        ),
    ] = None,
    resample_on: ResampleOn = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Preprocess by the plan of a work folder, as it is there: nothing is decided anew.

    For further configurations, or after editing the plan. Cases that are there are left alone.
    """
    from medmamba.cli.display import StepProgress
    from medmamba.pipeline.planning import preprocess as run_preprocess

    with StepProgress() as progress:
        stores = run_preprocess(
            dataset,
            work,
            network=network,
            configurations=tuple(configurations or ()),
            workers=workers,
            resample_on=resample_on,
            on_progress=progress,
        )
    if as_json:
        from medmamba.files import to_json

        sys.stdout.write(to_json({"preprocessed": [str(store) for store in stores]}))
        return
    for store in stores:
        print(f"arrays    {store}")
    print(f"next      medmamba train {work} --network {network}")
