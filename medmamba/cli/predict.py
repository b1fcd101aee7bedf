"""``medmamba predict``: masks for new images."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from medmamba.cli.dry_run import show_dry_run
from medmamba.cli.events import events_to
from medmamba.cli.messages import say
from medmamba.cli.options import (
    LAYOUTS,
    AssumeIdentity,
    BidsSuffix,
    Device,
    FollowLinks,
    Json,
    Layout,
    MaxVoxels,
    RedactIds,
    ReportInteractive,
    Root,
    SplitAcquisitions,
    Strict,
    Workers,
    check_choice,
    format_duration,
    gate_of,
    parse_size,
    words_of,
)
from medmamba.errors import UsageError

if TYPE_CHECKING:
    from medmamba.inference.records import CommitRecord

Overwrite = Literal["never", "stale", "always"]
OVERWRITE: tuple[Overwrite, ...] = get_args(Overwrite)
FailOn = Literal["any", "all", "never"]
Probabilities = Literal["none", "float16", "uint8", "npz"]
PROBABILITIES: tuple[Probabilities, ...] = get_args(Probabilities)
FAIL_ON: tuple[FailOn, ...] = get_args(FailOn)


def predict(
    images: Annotated[
        Path,
        typer.Option(
            "--input", "-i", metavar="IN", help="Image, folder of images, or list of cases."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="Folder for the masks.")
    ],
    model: Annotated[
        Path,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="Model folder, or the run folder holding it."
        ),
    ],
    mirror: Annotated[
        bool,
        typer.Option(
            "--tta/--no-tta", help="Average over mirrored copies: better, up to 8 times slower."
        ),
    ] = False,
    step: Annotated[
        float,
        typer.Option("--step", min=0.05, max=1.0, help="Tile step as a fraction of the patch."),
    ] = 0.5,
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            metavar="auto|bf16|fp16|fp32",
            help="auto: that of training, if it passes the parity gate.",
        ),
    ] = "auto",
    device: Device = "auto",
    compat: Annotated[
        bool, typer.Option("--compat", help="Round as nnU-Net does (half-precision accumulation).")
    ] = False,
    overwrite: Annotated[
        str,
        typer.Option(
            "--overwrite", metavar="never|stale|always", help="What to do with finished cases."
        ),
    ] = "stale",
    workers: Workers = None,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            metavar="I/N|auto|auto/N",
            help="One share of N, from 0; auto in a Slurm array, auto/N in a Kubernetes job too.",
        ),
    ] = None,
    root: Root = None,
    follow_links: FollowLinks = False,
    redact_ids: RedactIds = None,
    fail_on: Annotated[
        str,
        typer.Option(
            "--fail-on",
            metavar="any|all|never",
            help="When cases without a mask show in the exit code.",
        ),
    ] = "any",
    max_failures: Annotated[
        int | None,
        typer.Option("--max-failures", min=1, help="Stop after so many cases without a mask."),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout-per-case",
            min=0.1,
            metavar="SECONDS",
            help="Give up a case that takes longer.",
        ),
    ] = None,
    grace: Annotated[
        float,
        typer.Option(
            "--grace",
            min=0.0,
            metavar="SECONDS",
            help="After a stop signal, finish a case that needs no longer than this.",
        ),
    ] = 20.0,
    in_process: Annotated[
        bool,
        typer.Option(
            "--in-process", help="No worker process: a crash of the network then ends the run."
        ),
    ] = False,
    split: SplitAcquisitions = False,
    save_probabilities: Annotated[
        str,
        typer.Option(
            "--save-probabilities",
            metavar="none|float16|uint8|npz",
            help="Also keep what labels are decided by: CASE_prob.b2nd, or nnU-Net's CASE.npz.",
        ),
    ] = "none",
    labels_for: Annotated[
        str,
        typer.Option(
            "--labels-for",
            metavar="slicer,itksnap",
            help="Write names and colours of labels as these viewers load them, into OUT.",
        ),
    ] = "",
    cpu_fallback: Annotated[
        bool,
        typer.Option(
            "--allow-cpu-fallback",
            help="Compute cases on the CPU that the GPU has no memory for; takes long.",
        ),
    ] = False,
    report: Annotated[
        bool,
        typer.Option("--report/--no-report", help="Write a page with pictures of every case."),
    ] = True,
    report_interactive: ReportInteractive = False,
    strict: Strict = False,
    assume_identity: AssumeIdentity = False,
    max_voxels: MaxVoxels = None,
    max_ram: Annotated[
        str | None,
        typer.Option(
            "--max-ram", metavar="SIZE", help="Reject cases that take more (default: what is free)."
        ),
    ] = None,
    dry: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be done with each case; write nothing."),
    ] = False,
    events: Annotated[
        str | None,
        typer.Option(
            "--events", metavar="FILE|-", help="Append one JSON line per event while it runs."
        ),
    ] = None,
    metrics: Annotated[
        Path | None,
        typer.Option("--metrics", metavar="FILE.prom", help="Figures for Prometheus, as text."),
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", metavar="local|ray", help="ray: on a Ray cluster.")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            "--address", help="Of the Ray cluster (default: this machine's); local starts one."
        ),
    ] = None,
    layout: Layout = "plain",
    bids_suffix: BidsSuffix = "",
    as_json: Json = False,
) -> None:
    """Segment images; each mask lies on exactly the grid of its image.

    A case that cannot be trusted is rejected with a reason and leaves no mask; the others go on.
    A case is done when its record OUT/CASE.json is there; running again does only what is missing
    or out of date.

    Exit code 0: all done; 4: some cases rejected or failed; 5: none succeeded.
    """
    check_choice("--overwrite", overwrite, OVERWRITE)
    failing = check_choice("--fail-on", fail_on, FAIL_ON)
    chosen_layout = check_choice("--layout", layout, LAYOUTS)
    kept = next((kind for kind in PROBABILITIES if kind == save_probabilities), None)
    if kept is None:
        raise UsageError(
            f"--save-probabilities '{save_probabilities}': choose one of "
            f"{', '.join(PROBABILITIES)}."
        )
    if events == "-" and as_json:
        raise UsageError("--events - and --json both write to standard output; choose one.")
    shared: dict[str, Any] = {
        "overwrite": overwrite, "shard": shard, "split": split, "root": root,
        "follow_links": follow_links,
        "bids_suffixes": words_of(bids_suffix),
        "gate": gate_of(strict=strict, assume_identity=assume_identity, max_voxels=max_voxels),
        "max_ram_bytes": None if max_ram is None else parse_size(max_ram),
    }  # fmt: skip
    if dry:
        raise typer.Exit(show_dry_run(images, output, model, as_json=as_json, **shared))
    from medmamba.pipeline.predicting import predict as run_predict

    with events_to(events) as on_event:
        outcome = run_predict(
            images,
            output,
            model,
            mirror=mirror,
            step=step,
            precision=precision,
            device=device,
            compat=compat,
            workers=workers,
            on_event=on_event,
            fail_on=failing,
            max_failures=max_failures,
            timeout_per_case=timeout,
            grace_s=grace,
            supervised=not in_process,
            save_probabilities=kept,
            cpu_fallback=cpu_fallback,
            labels_for=words_of(labels_for),
            report=report,
            report_interactive=report_interactive,
            layout=chosen_layout,
            metrics=metrics,
            redact_ids=redact_ids,
            engine=engine,
            address=address,
            on_case=print_case,
            on_message=say,
            **shared,
        )
    if as_json:
        from medmamba.files import to_json

        sys.stdout.write(to_json(outcome.summary()))
    elif events != "-":
        print(
            f"{outcome.succeeded} of {outcome.total} cases have a mask in {output} "
            f"({format_duration(outcome.elapsed_s)})"
        )
        if outcome.report is not None:
            print(f"report: {outcome.report}")
    raise typer.Exit(outcome.exit_code)


def print_case(record: "CommitRecord", done: int, total: int, remaining_s: float) -> None:
    """One line per finished case."""
    tail = f" ({format_duration(remaining_s)} left)" if done < total else ""
    if record.error is not None:
        text = f"{record.status} [{record.error.code}] {record.error.message}"
    else:
        warnings = f" ({'; '.join(record.warnings)})" if record.warnings else ""
        text = f"{record.status}{warnings}"
    say(f"{done}/{total} {record.case_id}: {text}{tail}")
