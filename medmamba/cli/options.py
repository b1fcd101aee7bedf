"""Options that several commands share, and reading of human durations."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from medmamba.errors import UsageError

if TYPE_CHECKING:
    from medmamba.io import Gate

Choice = TypeVar("Choice", bound=str)

DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([BKMGT])?(?:I?B)?")

WorkFolder = Annotated[
    Path, typer.Argument(metavar="WORK", help="Work folder that `medmamba plan` made.")
]


def complete_network(incomplete: str) -> list[str]:
    """Names of networks that begin so, for the shell's completion."""
    from medmamba.plans.presets import preset_names

    return [name for name in preset_names() if name.startswith(incomplete)]


def complete_recipe(incomplete: str) -> list[str]:
    """Names of recipes that begin so, for the shell's completion."""
    from medmamba.plans.presets import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


def complete_device(incomplete: str) -> list[str]:
    """Devices that begin so, for the shell's completion."""
    return [name for name in ("auto", "cpu", "cuda") if name.startswith(incomplete)]


Workers = Annotated[
    int | None,
    typer.Option(
        "--workers", min=1, help="Cases worked on at once (default: one a core, at most 8)."
    ),
]
ResampleOn = Annotated[
    str | None,
    typer.Option(
        "--resample-on",
        metavar="cpu|cuda[:i]",
        help="Resample in PyTorch on a device, with the same numbers (default: NumPy).",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda[:i]",
        autocompletion=complete_device,
        help="Where to compute; auto says its choice.",
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict", help="Reject what is otherwise only warned of: tilted grids, odd values."
    ),
]
AssumeIdentity = Annotated[
    bool,
    typer.Option("--assume-identity", help="Accept files that do not say where their voxels are."),
]
MaxVoxels = Annotated[
    int | None,
    typer.Option("--max-voxels", min=1, help="Reject files with more (default: 2 000 000 000)."),
]
Root = Annotated[
    Path | None,
    typer.Option(
        "--root", metavar="FOLDER", help="What a list's paths are relative to (its folder)."
    ),
]
FollowLinks = Annotated[
    bool, typer.Option("--follow-links", help="Take images outside the input folder too.")
]
SplitAcquisitions = Annotated[
    bool,
    typer.Option(
        "--split-acquisitions",
        help="Make each acquisition of a mixed DICOM series a case of its own.",
    ),
]
BidsSuffix = Annotated[
    str,
    typer.Option(
        "--bids-suffix",
        metavar="T1w[,...]",
        help="Images of a BIDS folder, one a channel (default: as the model names them).",
    ),
]
Layout = Annotated[
    str,
    typer.Option(
        "--layout",
        metavar="plain|bids",
        help="bids: masks as a BIDS derivative, records in OUT/medmamba.",
    ),
]
LAYOUTS: tuple[Literal["plain", "bids"], ...] = ("plain", "bids")
RedactIds = Annotated[
    Path | None,
    typer.Option(
        "--redact-ids",
        metavar="KEYFILE",
        help="Call cases by hashes of their names with this key, in every output.",
    ),
]
ReportInteractive = Annotated[
    bool,
    typer.Option(
        "--report-interactive",
        help="Put the viewer NiiVue into the page, to scroll and turn cases (up to 40).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


def check_choice(option: str, value: str, choices: Sequence[Choice]) -> Choice:
    """Return the choice that a value is.

    Raises:
        UsageError: it is none; names them.
    """
    for choice in choices:
        if value == choice:
            return choice
    raise UsageError(f"{option} '{value}': choose one of {', '.join(choices)}.")


def words_of(text: str) -> list[str]:
    """What is between the commas of an option."""
    return [word.strip() for word in text.split(",") if word.strip()]


def gate_of(*, strict: bool, assume_identity: bool, max_voxels: int | None) -> "Gate":
    """Return the input gate that these options ask for."""
    from medmamba.io import DEFAULT_GATE

    return replace(
        DEFAULT_GATE,
        strict=strict,
        assume_identity=assume_identity,
        max_voxels=max_voxels or DEFAULT_GATE.max_voxels,
    )


def parse_size(text: str) -> int:
    """Read ``16G``, ``512M`` or plain bytes into bytes; units are powers of 1024.

    Raises:
        UsageError: it is none of these, or not positive.
    """
    match = SIZE.fullmatch(text.strip().upper())
    size = int(float(match[1]) * 1024 ** "BKMGT".index(match[2] or "B")) if match else 0
    if size <= 0:
        raise UsageError(f"size '{text}': write it like 16G or 512M.")
    return size


def parse_duration(text: str) -> float:
    """Read ``90s``, ``20m``, ``1h30m`` or plain seconds into seconds.

    Raises:
        UsageError: it is none of these, or not positive.
    """
    match = DURATION.fullmatch(text.strip().lower())
    parts = [float(part or 0) for part in match.groups()] if match else []
    seconds = parts[0] * 3600 + parts[1] * 60 + parts[2] if parts else 0.0
    if seconds <= 0:
        raise UsageError(f"duration '{text}': write it like 90s, 20m or 1h30m.")
    return seconds


def format_duration(seconds: float) -> str:
    """Render seconds as people say them: ``45 s``, ``12 min 05 s``, ``3 h 20 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
