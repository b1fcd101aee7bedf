"""``medmamba verify``: whether a model, or a folder of masks, is what it was when it was made."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from medmamba.cli.options import Json
from medmamba.errors import UsageError

EXIT_DIFFERENT = 4


def verify(
    place: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="Model folder, or run folder holding one."),
    ],
    as_json: Json = False,
) -> None:
    """Check a model: every file against its hash, and its reference case computed again here.

    The reference case is a synthetic image that travels with the model, with the mask it became
    where the model was made.

    Exit code 0: as it was made; 3: parts are missing or damaged; 4: this machine computes another
    mask; 7: a file was changed.

    Example: [cyan]medmamba verify work/runs/lightm_unet_s/3d_fullres/fold_0[/cyan]
    """
    from medmamba.bundle import MANIFEST_FILE, MODEL_FOLDER

    if any((folder / MANIFEST_FILE).is_file() for folder in (place, place / MODEL_FOLDER)):
        raise typer.Exit(_verify_model(place, as_json=as_json))
    raise UsageError(
        f"{place}: {'is no model' if place.exists() else 'does not exist'} (no {MANIFEST_FILE} "
        f"there or in {MODEL_FOLDER}/). Give a model folder."
    )


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
        print(
            "this machine computes something else than where the model was made; do not use it "
            "here before `medmamba doctor` passes",
            file=sys.stderr,
        )
    return 0 if found.passed else EXIT_DIFFERENT
