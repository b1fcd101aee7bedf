"""``medmamba plan``: verify, fingerprint, plan and preprocess a dataset."""

import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from medmamba.cli.messages import say
from medmamba.cli.options import Json, ResampleOn, Workers, check_choice, complete_network
from medmamba.errors import DatasetError, UsageError

if TYPE_CHECKING:
    from medmamba.dataset import VerificationReport
    from medmamba.networks.spec import Mixer, OptionValue
    from medmamba.pipeline.plan_request import PlanOutcome, Step
    from medmamba.plans.fingerprint import Sampling
    from medmamba.plans.plan import Plan

SHOWN_PROBLEMS = 50
DEFAULT_NETWORK = "lightm_unet_s"


def plan(
    dataset: Annotated[
        Path,
        typer.Argument(
            metavar="DATASET",
            help="nnU-Net raw dataset (DatasetXXX_Name), Decathlon task folder, or a folder that "
            "nnU-Net has preprocessed.",
        ),
    ],
    work: Annotated[
        Path, typer.Option("--output", "-o", metavar="WORK", help="Work folder to fill.")
    ],
    network: Annotated[
        str,
        typer.Option(
            "--network",
            "-n",
            autocompletion=complete_network,
            help="Network to plan for (see `medmamba info networks`).",
        ),
    ] = DEFAULT_NETWORK,
    gpu_memory: Annotated[
        float | None,
        typer.Option(
            "--gpu-memory",
            metavar="GB",
            min=1,
            help="Memory to plan for (default: the preset's, 8).",
        ),
    ] = None,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Plan for a CPU: smaller patches for Mamba networks.")
    ] = False,
    configurations: Annotated[
        list[str] | None,
        typer.Option(
            "--configuration",
            "-c",
            help="Configuration to preprocess, repeatable, all in one pass (default: 3d_fullres, "
            "2d for 2D data).",
        ),
    ] = None,
    spacing: Annotated[
        str | None,
        typer.Option(
            "--spacing", metavar="Z,Y,X", help="Target spacing in mm instead of the median."
        ),
    ] = None,
    planner: Annotated[
        str | None,
        typer.Option(
            "--planner",
            help="nnU-Net planner whose rules apply: ExperimentPlanner, ResEncUNetPlanner or "
            "nnUNetPlannerResEncM, L, XL (default: the preset's; for resenc_unet by memory).",
        ),
    ] = None,
    plans_name: Annotated[
        str | None, typer.Option("--plans-name", help="Name of the plan in nnU-Net's folders.")
    ] = None,
    mixer: Annotated[
        str | None,
        typer.Option(
            "--mixer",
            metavar="mamba|identity|dwconv",
            help="Plan a twin of the network: nothing, or a convolution, for its Mamba layers.",
        ),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            metavar="KEY=VALUE",
            help="Option of the network, repeatable, e.g. order=bidirectional, merge=mean, "
            "d_state=8 (all of them: plans/README.md).",
        ),
    ] = None,
    sampling: Annotated[
        str,
        typer.Option(
            "--sampling",
            metavar="exact|compatible",
            help="Intensity statistics of all voxels, or of the samples nnU-Net draws.",
        ),
    ] = "exact",
    until: Annotated[
        str,
        typer.Option(
            "--until",
            metavar="verify|fingerprint|plan|preprocess",
            help="Last step to do; each goes on from what is there.",
        ),
    ] = "preprocess",
    preprocess: Annotated[
        bool,
        typer.Option("--preprocess/--no-preprocess", help="--no-preprocess: --until plan."),
    ] = True,
    nnunet: Annotated[
        Path | None,
        typer.Option(
            "--nnunet",
            metavar="FOLDER",
            help="Fill nnU-Net's folder of preprocessed datasets too: nnUNetv2_train can then "
            "train the network from this plan.",
        ),
    ] = None,
    resample_on: ResampleOn = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Look at a dataset, decide how to segment it, and prepare it for training.

    Every file is verified first; all problems are listed at once, and a fatal one ends with code 3.
    Interrupted runs continue where they stopped.
    """
    if mixer is not None:
        check_choice("--mixer", mixer, ("mamba", "identity", "dwconv"))
    check_choice("--sampling", sampling, ("exact", "compatible"))
    check_choice("--until", until, ("verify", "fingerprint", "plan", "preprocess"))
    from medmamba.cli.display import StepProgress
    from medmamba.pipeline.planning import plan as run_plan

    def show_report(report: "VerificationReport") -> None:
        if as_json and report.fatal:
            from medmamba.files import to_json

            sys.stdout.write(to_json(report))
        print_problems(report)

    with StepProgress() as progress:
        outcome = run_plan(
            dataset,
            work,
            network=network,
            memory_gb=gpu_memory,
            device="cpu" if cpu else "cuda",
            configurations=tuple(configurations or ()),
            spacing_mm=parse_spacing(spacing),
            planner=planner,
            plans_name=plans_name,
            mixer=cast("Mixer | None", mixer),
            options=parse_options(options or []),
            sampling=cast("Sampling", sampling),
            preprocess=preprocess,
            until=cast("Step", until),
            nnunet_folder=nnunet,
            resample_on=resample_on,
            workers=workers,
            on_verified=show_report,
            on_progress=progress,
        )
    if as_json:
        from medmamba.files import to_json

        sys.stdout.write(to_json(outcome.summary()))
        return
    print_outcome(outcome, work, network)


def parse_options(texts: list[str]) -> "dict[str, OptionValue]":
    """Read ``KEY=VALUE`` pairs; values as TOML writes them, and plain words as text.

    Raises:
        UsageError: a text without a key or a value.
    """
    found: dict[str, OptionValue] = {}
    for text in texts:
        key, _, value = text.partition("=")
        if not key.strip() or not value.strip():
            raise UsageError(f"--option '{text}': write KEY=VALUE, like order=bidirectional.")
        try:
            found[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[key.strip()] = value.strip()
    return found


def print_outcome(outcome: "PlanOutcome", work: Path, network: str) -> None:
    """Say what was decided, where it lies and what comes next."""
    if outcome.plan is None:
        warnings = len(outcome.report.warnings)
        print(f"verified  {outcome.report.cases} cases, {warnings} warning(s): {work}")
        return
    print_plan(outcome.plan)
    print(f"plan      {outcome.plan_path}")
    for store in outcome.stores:
        print(f"arrays    {store}")
    if outcome.nnunet_folder is not None:
        name = outcome.plan.plans_name
        print(f"nnU-Net   {outcome.nnunet_folder}")
        print(f"          nnUNetv2_train {outcome.nnunet_folder.name} 3d_fullres 0 -p {name}")
    print(f"next      medmamba train {work} --network {network}")


def parse_spacing(text: str | None) -> tuple[float, ...] | None:
    """Read ``1,0.8,0.8`` (z, y, x in millimetres).

    Raises:
        UsageError: not three positive numbers.
    """
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or min(values, default=0) <= 0:
        raise UsageError(f"--spacing '{text}': three positive numbers are needed, like 1,0.8,0.8.")
    return values


def print_problems(report: "VerificationReport") -> None:
    """List what verification found, worst first.

    Raises:
        DatasetError: if any problem is fatal.
    """
    problems = sorted(report.problems, key=lambda problem: problem.severity != "fatal")
    for problem in problems[:SHOWN_PROBLEMS]:
        where = f"case {problem.case}: " if problem.case else ""
        say(f"{problem.severity} [{problem.code}] {where}{problem.message}")
        if problem.suggestion:
            say(f"    -> {problem.suggestion}")
    if len(problems) > SHOWN_PROBLEMS:
        say(f"... and {len(problems) - SHOWN_PROBLEMS} more")
    fatal = sum(problem.severity == "fatal" for problem in problems)
    if fatal:
        raise DatasetError(
            f"{report.dataset}: {fatal} fatal problem(s) in the dataset, listed above and in "
            "verification.json. Mend them and run the command again."
        )


def print_plan(plan: "Plan | None") -> None:
    """Show each decision with its value and its reason; nothing where there is no plan yet."""
    if plan is None:
        return
    from rich.table import Table

    from medmamba.cli.display import data

    table = Table(title=f"Plan for {plan.network} on {plan.dataset_name}", title_justify="left")
    table.add_column("decision", style="bold")
    table.add_column("value")
    table.add_column("why")
    for reason in plan.reasons:
        table.add_row(reason.topic, str(reason.value), reason.why)
    data.print(table)
