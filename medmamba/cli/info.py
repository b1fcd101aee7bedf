"""``medmamba info``: what a model is, and which networks there are."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medmamba.cli.options import Json

if TYPE_CHECKING:
    from medmamba.bundle import Manifest


def info(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL|networks", help="Model folder, run folder, or 'networks'."),
    ],
    as_json: Json = False,
) -> None:
    """Describe a model folder, or list the networks that can be trained.

    Example: [cyan]medmamba info work/runs/lightm_unet_s/3d_fullres/fold_0[/cyan]
    """
    if model == "networks":
        _print_networks(as_json=as_json)
        return
    from medmamba.bundle import read_manifest
    from medmamba.files import to_json

    manifest = read_manifest(Path(model))
    if as_json:
        sys.stdout.write(to_json(manifest))
        return
    _print_manifest(manifest)


def _print_manifest(manifest: "Manifest") -> None:
    from medmamba.cli.display import data, make_table
    from medmamba.files import to_plain

    rows = [(key, _short(value)) for key, value in to_plain(manifest).items()]
    data.print(make_table(f"Model {manifest.name}", ("key", "value"), rows, right_from=2))


def _short(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_short(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_short(item) for item in value)
    return "-" if value is None else str(value)


def _print_networks(*, as_json: bool) -> None:
    import json

    from medmamba.cli.display import data, make_table
    from medmamba.files import to_plain
    from medmamba.networks.describe import OPERATIONS_FORMULA, describe_networks

    print("building every network once; this takes a minute", file=sys.stderr)
    rows = describe_networks()
    if as_json:
        sys.stdout.write(json.dumps([to_plain(row) for row in rows], indent=2) + "\n")
        return
    columns = ("network", "dim", "parameters", "patch", "GFLOP", "bytes/voxel", "patch multiple")
    cells = [
        (
            row.name,
            f"{row.dimension}D",
            f"{row.parameters:,}",
            _times(row.patch_size),
            f"{row.operations / 1e9:,.1f}",
            f"{row.activation_bytes_per_voxel:,.0f}",
            _times(row.patch_multiple),
        )
        for row in rows
    ]
    data.print(make_table("Networks, for one channel and two classes", columns, cells))
    data.print(f"GFLOP of one forward pass: {OPERATIONS_FORMULA}.")
    for row in rows:
        data.print(f"{row.name} ({row.dimension}D): {row.summary} {row.source}")


def _times(sizes: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in sizes)
