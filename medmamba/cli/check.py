"""``medmamba check``: would these images be taken? Without predicting, and without torch."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medmamba.cli.options import (
    AssumeIdentity,
    BidsSuffix,
    FollowLinks,
    Json,
    MaxVoxels,
    Root,
    SplitAcquisitions,
    Strict,
    gate_of,
    words_of,
)

if TYPE_CHECKING:
    from medmamba.io import Gate

EXIT_SOME, EXIT_NONE, EXIT_DATASET = 4, 5, 3


def check(
    images: Annotated[
        Path, typer.Argument(metavar="IN", help="Image file, folder of images, or list of files.")
    ],
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="Model whose channels cases must have."
        ),
    ] = None,
    dataset: Annotated[
        bool, typer.Option("--dataset", help="IN is a raw dataset to train on: verify all of it.")
    ] = False,
    root: Root = None,
    follow_links: FollowLinks = False,
    split: SplitAcquisitions = False,
    bids_suffix: BidsSuffix = "",
    strict: Strict = False,
    assume_identity: AssumeIdentity = False,
    max_voxels: MaxVoxels = None,
    as_json: Json = False,
) -> None:
    """Judge images as predict would: headers, payload, geometry, channels, values.

    Exit code 0: all would be taken; 4: some would be rejected; 5: all would be. With --dataset 3
    where planning would refuse.
    """
    raise typer.Exit(
        _check_dataset(images, as_json=as_json)
        if dataset
        else _check_images(
            images,
            model,
            gate_of(strict=strict, assume_identity=assume_identity, max_voxels=max_voxels),
            as_json=as_json,
            root=root,
            follow_links=follow_links,
            split=split,
            bids_suffixes=words_of(bids_suffix),
        )
    )


def _check_images(
    images: Path, model: Path | None, gate: "Gate", *, as_json: bool, **where: Any
) -> int:
    from medmamba.files import to_json, to_plain
    from medmamba.pipeline.checking import check as run_check

    cases = run_check(images, model=model, gate=gate, **where)
    accepted = [case for case in cases if case.accepted]
    if as_json:
        rows = [to_plain(case) | {"accepted": case.accepted} for case in cases]
        sys.stdout.write(to_json({"accepted": len(accepted), "total": len(cases), "cases": rows}))
    else:
        for case in cases:
            said = "; ".join((*case.errors, *case.warnings))
            print(f"{'ok' if case.accepted else 'rejected':8} {case.case_id}  {said}".rstrip())
        print(f"{len(accepted)} of {len(cases)} cases would be taken")
    return 0 if len(accepted) == len(cases) else EXIT_SOME if accepted else EXIT_NONE


def _check_dataset(folder: Path, *, as_json: bool) -> int:
    from medmamba.dataset import survey_dataset, verify
    from medmamba.files import to_json, to_plain

    report = verify(survey_dataset(folder))
    if as_json:
        sys.stdout.write(to_json(to_plain(report)))
    else:
        for problem in report.problems:
            print(f"{problem.severity:8} {problem}")
        print(
            f"{report.dataset}: {report.cases} cases, {len(report.fatal)} fatal problems, "
            f"{len(report.warnings)} warnings"
        )
    return EXIT_DATASET if report.fatal else 0
