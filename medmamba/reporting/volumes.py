"""An image and its mask made small enough to travel in a page, for the interactive viewer.

Shapes: (D, H, W) in view axes, as in ``pictures``.
"""

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba.io import encode_image
from medmamba.reporting.pictures import middle_of, to_grey
from medmamba.volume import Geometry

MAX_VOXELS = 2**19
"""80 x 80 x 80: half a megabyte of image, and detail enough to see where a mask is."""


@dataclass(frozen=True, kw_only=True)
class PackedVolume:
    """What the viewer's script reads of a case; names as it expects them.

    Args:
        image: grey values as a NIfTI file in base64; empty without an image.
        labels: numbers of labels, 0 for none, likewise.
        names: by number.
        table: NiiVue's colour table of the numbers.
        middle: where the planes cross at first, RAS+ millimetres (x, y, z).
    """

    image: str
    labels: str
    names: tuple[str, ...]
    table: dict[str, list[Any]]
    middle: tuple[float, float, float]


def pack(
    image: NDArray[np.float32] | None,
    labels: NDArray[np.integer[Any]],
    geometry: Geometry,
    shown: dict[int, tuple[str, str]],
) -> PackedVolume:
    """Take every n-th voxel, so that about `MAX_VOXELS` remain, evenly in millimetres.

    Args:
        image: (D, H, W) or None.
        labels: (D, H, W).
        geometry: their grid.
        shown: label value -> name and colour ``#rrggbb``; other values are left out.
    """
    places, small = _thinned(geometry)
    numbers = np.zeros(max([*shown, int(labels.max()), 0]) + 1, np.uint16)
    for number, value in enumerate(sorted(shown), 1):
        numbers[value] = number
    chosen = numbers[labels[places]]
    named = [shown[value] for value in sorted(shown)]
    x, y, z = (small.matrix @ [*middle_of(chosen), 1.0])[:3]
    return PackedVolume(
        image="" if image is None else _encoded(to_grey(image[places]), small),
        labels=_encoded(chosen.astype(np.uint8 if len(named) < 256 else np.uint16), small),
        names=("", *(name for name, _ in named)),
        table=_color_table([color for _, color in named]),
        middle=(float(x), float(y), float(z)),
    )


def _thinned(geometry: Geometry) -> tuple[tuple[NDArray[np.integer[Any]], ...], Geometry]:
    """Indices of the voxels that stay (for ``array[places]``), and their grid."""
    extent = np.multiply(geometry.shape, geometry.spacing_mm)
    step_mm = float(np.cbrt(extent.prod() / MAX_VOXELS))
    counts = [
        min(size, max(1, round(length / step_mm)))
        for size, length in zip(geometry.shape, extent, strict=True)
    ]
    matrix = geometry.matrix
    indices = []
    for axis, (size, count) in enumerate(zip(geometry.shape, counts, strict=True)):
        factor = size / count
        # Centres of equal parts of the axis; the voxel that holds each is taken.
        indices.append(((np.arange(count) + 0.5) * factor).astype(np.intp))
        matrix[:3, 3] += matrix[:3, axis] * (factor - 1) / 2
        matrix[:3, axis] *= factor
    return np.ix_(*indices), Geometry.from_matrix(tuple(counts), matrix)


def _encoded(values: NDArray[np.generic], geometry: Geometry) -> str:
    return base64.b64encode(encode_image(values, geometry)).decode()


def _color_table(colors: list[str]) -> dict[str, list[Any]]:
    rgb = [(0, 0, 0), *(tuple(bytes.fromhex(color.removeprefix("#"))) for color in colors)]
    columns: dict[str, list[Any]] = {
        name: [color[at] for color in rgb] for at, name in enumerate("RGB")
    }
    return columns | {"A": [0, *[255] * len(colors)], "I": list(range(len(rgb)))}
