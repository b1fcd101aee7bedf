"""``medmamba info``: what a model is, where a run is, and which networks there are."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medmamba.cli.messages import say
from medmamba.cli.options import Json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medmamba.bundle import Manifest


def info(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL|networks", help="Model folder, run folder, or 'networks'."),
    ],
    as_json: Json = False,
) -> None:
    """Describe a model folder or a training run, or list the networks that can be trained."""
    if model == "networks":
        _print_networks(as_json=as_json)
        return
    from medmamba.bundle import read_manifest
    from medmamba.files import to_json
    from medmamba.pipeline.run_summary import is_run

    if is_run(Path(model)):
        from medmamba.cli.info_run import print_run

        print_run(Path(model), as_json=as_json)
        return
    manifest = read_manifest(Path(model))
    if as_json:
        sys.stdout.write(to_json(manifest))
        return
    print_manifest(manifest)


def print_manifest(manifest: "Manifest") -> None:
    """Print every key of a manifest that says something as a table."""
    from medmamba.cli.display import print_table
    from medmamba.files import to_plain

    told = {key: value for key, value in to_plain(manifest).items() if not _is_empty(value)}
    rows = [(key.replace("_", " "), _short(value)) for key, value in told.items()]
    print_table(f"Model {manifest.name}", ("key", "value"), rows, right_from=2)


def _is_empty(value: object) -> bool:
    return value is None or value in ("", [], {})


def _short(value: object) -> str:
    """Write records as their name with the rest in brackets, lists with commas."""
    if isinstance(value, list):
        return ", ".join(_short(item) for item in value)
    if not isinstance(value, dict):
        return str(value)
    told = {key: item for key, item in value.items() if not _is_empty(item)}
    name = told.pop("name", None)
    rest = ", ".join(f"{key.replace('_', ' ')} {_short(item)}" for key, item in told.items())
    return rest if name is None else f"{name} ({rest})" if rest else str(name)


def _print_networks(*, as_json: bool) -> None:
    import json

    from medmamba.files import to_plain
    from medmamba.networks.describe import OPERATIONS_FORMULA, describe_networks

    say("building every network once; this takes a minute")
    rows = describe_networks()
    if as_json:
        sys.stdout.write(json.dumps([to_plain(row) for row in rows], indent=2) + "\n")
        return
    columns = ("network", "dim", "parameters", "patch", "GFLOP", "B/voxel", "multiple")
    cells = [
        (
            row.name,
            f"{row.dimension}D",
            f"{row.parameters:,}",
            _cube(row.patch_size),
            f"{row.operations / 1e9:,.1f}",
            f"{row.activation_bytes_per_voxel:,.0f}",
            _cube(row.patch_multiple),
        )
        for row in rows
    ]
    print_columns((columns, *cells))
    print(f"""
For one image channel and two classes. GFLOP of one forward pass over the patch:
{OPERATIONS_FORMULA}.
B/voxel: bytes kept for the backward pass under bfloat16 autocast, per voxel of the patch.
multiple: what the patch size must be a multiple of on every axis, with isotropic spacing.
""")
    for name, summary, source in dict.fromkeys((row.name, row.summary, row.source) for row in rows):
        print(f"{name}: {summary}. {source}.")


def print_columns(rows: "Sequence[Sequence[str]]") -> None:
    """Print aligned columns, the first to the left; none is cut in a narrow terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        numbers = (text.rjust(width) for text, width in zip(rest, widths[1:], strict=True))
        print(first.ljust(widths[0]), *numbers, sep="  ")


def _cube(sizes: tuple[int, ...]) -> str:
    """Write 128x128x128 as 128^3."""
    if len(set(sizes)) == 1:
        return f"{sizes[0]}^{len(sizes)}"
    return "x".join(str(size) for size in sizes)
