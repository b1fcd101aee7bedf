"""``medmamba verify``: whether a model, or a folder of masks, is what it was when it was made."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from medmamba.cli.messages import say
from medmamba.cli.options import BidsSuffix, Json, RedactIds, words_of
from medmamba.errors import UsageError

EXIT_DIFFERENT = 4
SHOWN = 20


def verify(
    place: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL|OUT", help="Model folder (or run folder holding one), or masks."
        ),
    ],
    expect_shards: Annotated[
        int | None,
        typer.Option(
            "--expect-shards", metavar="N", min=1, help="All shares 0/N to N-1/N must have ended."
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            "--input", "-i", metavar="IN", help="What was predicted: every case needs a record."
        ),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option("--root", metavar="FOLDER", help="As given to predict, for a list."),
    ] = None,
    bids_suffix: BidsSuffix = "",
    redact_ids: RedactIds = None,
    as_json: Json = False,
) -> None:
    """Check a model, or a folder of masks, against the hashes that were written with it.

    Of a model, the reference case is computed again too: a synthetic image that travels with it,
    with the mask it became where the model was made. Of masks, every file is compared with its
    record OUT/CASE.json, and every line of a run's journal with the next. Shares that were
    forgotten or did not end, and cases without a record, are named.

    Exit code 0: as it was made; 3: parts of a model are missing or damaged; 4: this machine
    computes another mask, a mask is missing, changed or unrecorded, or a journal was changed; 7: a
    model was changed.
    """
    from medmamba.bundle import MANIFEST_FILE, MODEL_FOLDER

    if any((folder / MANIFEST_FILE).is_file() for folder in (place, place / MODEL_FOLDER)):
        if expect_shards is not None or images is not None:
            raise UsageError(f"{place}: is a model; --expect-shards and -i are for masks.")
        raise typer.Exit(_verify_model(place, as_json=as_json))
    if not place.is_dir() or not any(place.glob("[!.]*.json")):
        raise UsageError(
            f"{place}: {'is no model and no output' if place.exists() else 'does not exist'} (no "
            f"{MANIFEST_FILE} there or in {MODEL_FOLDER}/, and no record CASE.json). Give a model "
            "folder, or a folder of masks."
        )
    how = {"root": root, "modalities": words_of(bids_suffix), "key": redact_ids}
    passed = _verify_output(place, expect_shards, images, how, as_json=as_json)
    raise typer.Exit(0 if passed else EXIT_DIFFERENT)


def _verify_output(
    place: Path, shards: int | None, images: Path | None, how: dict[str, Any], *, as_json: bool
) -> bool:
    from medmamba.files import to_json, to_plain
    from medmamba.inference.completeness import missing_cases, unfinished_shards
    from medmamba.inference.run_audit import verify_runs
    from medmamba.inference.verification import verify_output

    states, runs = verify_output(place), verify_runs(place)
    unfinished = () if shards is None else unfinished_shards(place, shards)
    missing = [] if images is None else missing_cases(place, images, shards=shards, **how)
    differing = [item for item in states if not item.sound]
    changed = [run for run in runs if run.state == "changed"]
    passed = not (differing or changed or unfinished or missing)
    counts = {state: sum(item.state == state for item in states) for state in ("holds", "no_mask")}
    if as_json:
        found: dict[str, Any] = {"passed": passed}
        found |= {"shards_unfinished": to_plain(list(unfinished))} if shards else {}
        found |= {"cases_missing": to_plain(missing)} if images else {}
        sys.stdout.write(
            to_json({**found, "runs": to_plain(list(runs)), "cases": to_plain(list(states))})
        )
    else:
        print(f"masks     {counts['holds']} as their records say")
        print(f"no mask   {counts['no_mask']} cases, rejected or failed")
        print(f"journals  {len(runs) - len(changed)} of {len(runs)} runs as they were written")
        for run in changed:
            print(f"changed   run {run.run_id}: {run.detail}")
        for item in differing:
            print(f"{item.state:9} {item.case_id}: {item.detail}")
        for shard in unfinished:
            cases = "" if shard.cases is None else f", {shard.cases} cases"
            where = f" (run {shard.run_id}{cases})" if shard.run_id else ""
            print(f"shard     {shard.index}/{shards}: {shard.state}{where}")
        for case in missing[:SHOWN]:
            place_of = "" if case.shard is None else f" (shard {case.shard})"
            print(f"no record {case.case_id}{place_of}")
        if len(missing) > SHOWN:
            print(f"no record {len(missing) - SHOWN} more cases (--json lists them)")
    return passed


def _verify_model(place: Path, *, as_json: bool) -> int:
    from medmamba.bundle import load_bundle, verify_bundle
    from medmamba.files import to_json, to_plain

    bundle = load_bundle(place)
    found = verify_bundle(bundle)
    if as_json:
        about = {"model": bundle.manifest.name, "sha256": bundle.sha256}
        sys.stdout.write(to_json(about | to_plain(found) | {"passed": found.passed}))
    else:
        print(f"model     {bundle.manifest.name}, SHA-256 {bundle.sha256}")
        print("files     all as their hashes say")
        print(
            f"reference {found.outcome} mask ({found.agreement:.4%} of voxels equal, logits within "
            f"{found.logits_difference:.2g} standard deviations)"
        )
    if not found.passed:
        say(
            "this machine computes something else than where the model was made; do not use it "
            "here before `medmamba doctor` passes"
        )
    return 0 if found.passed else EXIT_DIFFERENT
