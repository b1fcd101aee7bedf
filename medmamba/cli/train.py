"""``medmamba train``: train one fold of one network."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from medmamba.cli.options import (
    Device,
    WorkFolder,
    complete_network,
    complete_recipe,
    parse_duration,
)
from medmamba.cli.plan import DEFAULT_NETWORK
from medmamba.cli.signals import exit_on_sigterm
from medmamba.errors import UsageError


def train(
    work: WorkFolder,
    network: Annotated[
        str,
        typer.Option(
            "--network",
            "-n",
            autocompletion=complete_network,
            help="Network to train; it must have been planned.",
        ),
    ] = DEFAULT_NETWORK,
    fold: Annotated[
        str, typer.Option("--fold", "-f", metavar="K|all", help="Fold number, or all cases.")
    ] = "0",
    folds: Annotated[
        str | None,
        typer.Option(
            "--folds",
            metavar="all|0,1,2",
            help="Several folds of the split instead of one: all of them, or those named.",
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="local|ray",
            help="With --folds: local, one after another; ray, as tasks of a Ray cluster.",
        ),
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="HOST:PORT|local",
            help="Of the Ray cluster (default: the one this machine is part of).",
        ),
    ] = None,
    configuration: Annotated[
        str | None,
        typer.Option(
            "--configuration", "-c", help="Configuration (default: 3d_fullres, 2d for 2D data)."
        ),
    ] = None,
    max_time: Annotated[
        str | None,
        typer.Option(
            "--max-time",
            metavar="20m",
            help="Time budget; the schedule is laid out to end with it.",
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", min=1, help="Epochs (default: the recipe's).")
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option("--iterations", min=1, help="Iterations per epoch (default: the recipe's)."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, help="Patches per step instead of the plan's."),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option("--loss", help="Loss instead of the recipe's, e.g. region_tversky."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            autocompletion=complete_recipe,
            metavar="NAME|FILE",
            help="Recipe instead of the plan's: common, short, nnunet, mambaclinix_trs, that of "
            "another preset, or a .toml file. Up to an hour on a CPU, presets may choose short.",
        ),
    ] = None,
    augmentation: Annotated[
        str | None,
        typer.Option(
            "--augmentation", metavar="default|strong|none", help="Instead of the recipe's."
        ),
    ] = None,
    mirror: Annotated[
        str | None,
        typer.Option(
            "--mirror",
            metavar="all|none|in-plane|0,2",
            help="Axes that may be flipped, in training and in prediction with --mirror.",
        ),
    ] = None,
    dummy_2d: Annotated[
        str | None,
        typer.Option(
            "--dummy-2d",
            metavar="auto|on|off",
            help="Augment the first axis apart; auto: where the patch is flat there.",
        ),
    ] = None,
    pretrained: Annotated[
        Path | None,
        typer.Option(
            "--pretrained",
            metavar="FILE",
            help="VMamba-T ImageNet weights (.pth, .safetensors) for a Swin-UMamba's encoder.",
        ),
    ] = None,
    pretrained_mode: Annotated[
        str,
        typer.Option(
            "--pretrained-mode",
            metavar="exact|corrected",
            help="exact: tensors the official code loads; corrected: without its typo's bias.",
        ),
    ] = "exact",
    freeze_epochs: Annotated[
        int | None,
        typer.Option(
            "--freeze-epochs",
            min=0,
            help="Epochs a pretrained encoder stays fixed (default: 10 of 1000); with --init, all "
            "but heads and first layers (default: 0).",
        ),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(
            "--init",
            metavar="MODEL|FILE",
            help="Fine-tune: begin with a model folder, a folder that nnU-Net trained into, or an "
            "official checkpoint. Heads are made anew where labels differ.",
        ),
    ] = None,
    init_form: Annotated[
        bool,
        typer.Option(
            "--init-form",
            help="With --init: train the network with that model's widths, strides and blocks "
            "instead of the plan's.",
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the latest checkpoint of this run.")
    ] = False,
    extend: Annotated[
        bool, typer.Option("--extend", help="With --resume: give a finished run another length.")
    ] = False,
    seed: Annotated[
        int, typer.Option("--seed", help="Seed of weights, patches and augmentation.")
    ] = 0,
    precision: Annotated[
        str,
        typer.Option(
            "--precision", metavar="auto|bf16|fp16|fp32", help="auto: bf16 where it is native."
        ),
    ] = "auto",
    device: Device = "auto",
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Bit-exact on GPUs too (CPU runs always are).")
    ] = False,
    cuda_graph: Annotated[
        bool,
        typer.Option(
            "--cuda-graph",
            help="Replay steps on a GPU from a CUDA graph where its memory holds a step twice: "
            "the same steps without the time of their launches, which counts on small patches.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start again although this run exists.")
    ] = False,
    validate: Annotated[
        bool,
        typer.Option(
            "--validate/--no-validate",
            help="At the end, predict and score whole validation cases (not part of the budget).",
        ),
    ] = True,
    tensorboard: Annotated[
        bool,
        typer.Option(
            "--tensorboard",
            help="Also write RUN/tensorboard, for `tensorboard --logdir RUN` (extra tensorboard).",
        ),
    ] = False,
) -> None:
    """Train one fold; writes checkpoints, log.jsonl, curves.png and a model to predict with.

    A checkpoint is saved after every epoch. Ctrl-C and SIGTERM save and stop; [cyan]--resume[/cyan]
    goes on, on a CPU to the last bit as if nothing had happened.

    Several GPUs: [cyan]torchrun --nproc-per-node 4 -m medmamba train work[/cyan]

    Several machines: [cyan]medmamba train work --folds all --engine ray[/cyan]
    """
    exit_on_sigterm()
    options: dict[str, Any] = {
        "network": network,
        "configuration": configuration,
        "max_time": parse_duration(max_time) if max_time else None,
        "epochs": epochs,
        "iterations": iterations,
        "batch_size": batch_size,
        "loss": loss,
        "recipe": recipe,
        "augmentation": augmentation,
        "mirror": mirror,
        "dummy_2d": dummy_2d,
        "pretrained": pretrained,
        "pretrained_mode": pretrained_mode,
        "freeze_epochs": freeze_epochs,
        "init": init,
        "init_form": init_form,
        "resume": resume,
        "extend": extend,
        "overwrite": overwrite,
        "seed": seed,
        "precision": precision,
        "device": device,
        "deterministic": deterministic,
        "cuda_graph": cuda_graph,
        "validate": validate,
        "tensorboard": tensorboard,
    }
    if folds is None:
        _train_one(work, parse_fold(fold), options)
    else:
        _train_several(work, folds, engine, address, options)


def _train_one(work: Path, fold: int | str, options: dict[str, Any]) -> None:
    from medmamba.cli.train_progress import TrainingDisplay
    from medmamba.pipeline.training import train as run_train

    with TrainingDisplay() as show:
        outcome = run_train(
            work,
            fold=fold,
            on_epoch=show.on_epoch,
            on_step=show.on_step,
            on_message=show.say,
            **options,
        )
    if outcome.rank != 0:
        return
    print(f"epochs    {outcome.epochs}, validation Dice of patches {outcome.dice:.4f}")
    print(f"model     {outcome.model}")
    print(f"curves    {outcome.run_folder / 'curves.png'}")
    print(f"next      medmamba predict -i IMAGES -o MASKS -m {outcome.model}")


def _train_several(
    work: Path, folds: str, engine: str, address: str | None, options: dict[str, Any]
) -> None:
    from medmamba.cli.train_progress import TrainingDisplay
    from medmamba.pipeline.folds import train_folds

    with TrainingDisplay() as show:
        outcomes = train_folds(
            work,
            folds=parse_folds(folds),
            engine=engine,
            address=address,
            on_epoch=lambda fold, report: show.on_epoch(report),
            on_step=lambda fold, report: show.on_step(report),
            on_message=show.say,
            **options,
        )
    for outcome in outcomes:
        found = f"Dice of patches {outcome.dice:.4f}  {outcome.model}"
        print(f"fold {outcome.fold}    {outcome.problem or found}")
    failed = [outcome for outcome in outcomes if outcome.exit_code]
    if failed:
        raise typer.Exit(failed[0].exit_code)


def parse_folds(text: str) -> tuple[int, ...] | Literal["all"]:
    """Read ``all`` or fold numbers with commas between them.

    Raises:
        UsageError: neither.
    """
    if text == "all":
        return "all"
    parts = [part.strip() for part in text.split(",")]
    if all(part.isdecimal() for part in parts):
        return tuple(int(part) for part in parts)
    raise UsageError(f"--folds '{text}': all, or numbers such as 0,1,2.")


def parse_fold(text: str) -> int | str:
    """Read a fold number or ``all``.

    Raises:
        UsageError: neither.
    """
    if text == "all":
        return text
    if text.isdecimal():
        return int(text)
    raise UsageError(f"--fold '{text}': a number from 0, or all.")
