"""Names and colours of labels as viewers load them beside a mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medmamba.errors import UsageError
from medmamba.files import write_atomic


@dataclass(frozen=True, kw_only=True)
class ViewerLabel:
    """One value of a mask.

    Args:
        value: as stored.
        name: for people.
        color: ``#rrggbb``.
    """

    value: int
    name: str
    color: str

    @property
    def rgb(self) -> tuple[int, int, int]:
        """Red, green and blue, 0 to 255."""
        red, green, blue = (int(self.color[at : at + 2], 16) for at in (1, 3, 5))
        return red, green, blue


def _slicer(labels: Sequence[ViewerLabel]) -> str:
    """A colour table of 3D Slicer: names without blanks, colours with opacity."""
    lines = ["# Color table file", f"# {len(labels) + 1} values", "0 background 0 0 0 0"]
    for label in labels:
        name = "_".join(label.name.split())
        lines.append(f"{label.value} {name} {' '.join(map(str, label.rgb))} 255")
    return "\n".join(lines) + "\n"


def _itksnap(labels: Sequence[ViewerLabel]) -> str:
    """A label description file of ITK-SNAP: value, colour, opacity, visible, in meshes, name."""
    lines = [
        "# ITK-SnAP Label Description File",
        "# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL",
        '    0     0    0    0     0    0   0    "Clear Label"',
    ]
    for label in labels:
        red, green, blue = label.rgb
        name = label.name.replace('"', "'")
        lines.append(f'{label.value:5d} {red:5d} {green:4d} {blue:4d}     1    1   1    "{name}"')
    return "\n".join(lines) + "\n"


VIEWERS = {"slicer": ("labels.ctbl", _slicer), "itksnap": ("labels.itksnap.txt", _itksnap)}
"""Viewer -> name of the file, and what renders it."""


def write_viewer_labels(
    folder: Path, labels: Sequence[ViewerLabel], viewers: Sequence[str]
) -> tuple[Path, ...]:
    """Write the file of each viewer into a folder of masks, and return where.

    Args:
        folder: of masks; all of them have the same labels.
        labels: every value but 0.
        viewers: keys of ``VIEWERS``.

    Raises:
        UsageError: an unknown viewer.
        EnvironmentFault: the folder cannot be written.
    """
    unknown = [viewer for viewer in viewers if viewer not in VIEWERS]
    if unknown:
        raise UsageError(f"viewer '{unknown[0]}': choose from {', '.join(VIEWERS)}.")
    written = []
    for viewer in viewers:
        name, render = VIEWERS[viewer]
        write_atomic(folder / name, render(labels))
        written.append(folder / name)
    return tuple(written)
