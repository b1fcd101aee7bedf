"""``medmamba demo``: the whole chain on real images, ending with a table and a picture."""

import time
from pathlib import Path
from typing import Annotated

import typer

from medmamba.cli.messages import say
from medmamba.cli.options import complete_network, format_duration, parse_duration
from medmamba.cli.plan import DEFAULT_NETWORK

BUILT_IN = "brain"
HIPPOCAMPUS = "hippocampus"
DEFAULT_TIME = "5m"
TINY_TIME = "20s"


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where everything is written.")
    ] = Path("demo_output"),
    dataset: Annotated[
        str,
        typer.Option(
            "--dataset",
            metavar="PATH|hippocampus",
            help="A raw dataset of yours, or 'hippocampus' to download that Decathlon task.",
        ),
    ] = BUILT_IN,
    network: Annotated[
        str,
        typer.Option("--network", "-n", autocompletion=complete_network, help="Network to train."),
    ] = DEFAULT_NETWORK,
    max_time: Annotated[
        str | None, typer.Option("--max-time", metavar="5m", help="Time to train.")
    ] = None,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A minute's run on a few blocks, to see that it works.")
    ] = False,
) -> None:
    """Plan, train, predict and evaluate on real brain MRI, in under ten minutes on two CPU cores.

    The images are blocks of one averaged brain with its tissue maps; a quarter of the blocks is
    held out from training and scored. This shows that the chain works, not that a model
    generalises. Of a dataset of yours, test cases with labels or fold 0 are scored.
    """
    from medmamba.cli.demo_chain import run_chain

    start = time.monotonic()
    budget = parse_duration(max_time or (TINY_TIME if tiny else DEFAULT_TIME))
    raw = _prepare(dataset, output, tiny=tiny)
    run_chain(raw, output, network=network, max_time_s=budget)
    print(f"finished in {format_duration(time.monotonic() - start)}")


def _prepare(dataset: str, output: Path, *, tiny: bool) -> Path:
    from medmamba.files import require_writable_folder

    require_writable_folder(output)
    if dataset == BUILT_IN:
        from medmamba.cli.demo_data import make_demo_dataset

        made = make_demo_dataset(output / "raw", tiny=tiny)
        say(
            f"dataset: blocks of one averaged brain, {made.training} to train on, "
            f"{made.held_out} held out"
        )
        return made.folder
    if dataset == HIPPOCAMPUS and not Path(dataset).exists():
        from medmamba.cli.demo_download import HIPPOCAMPUS_TASK, download_task

        return download_task(HIPPOCAMPUS_TASK, output / "raw")
    return Path(dataset)
