"""Pictures of a mask over its image: three planes and a mosaic, as small PNG files. Pillow only.

Shapes: (D, H, W) with axes turned to left, posterior, superior, so that planes show as radiologists
look at them: the patient's right on the left side, the front or the head on top.
"""

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

VIEW_CODE = "LPS"
PLANE_PIXELS = 230
TILE_PIXELS = 104
TILES = 12
PALETTE_COLORS = 64
CT_AIR_HU = -500.0
CT_WINDOW_HU = (-160.0, 240.0)
"""Soft tissue, the window that abdominal CT is read in."""

Plane = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class View:
    """One picture.

    Args:
        title: such as ``axial``.
        data_uri: a PNG to put into a page.
        width: pixels.
        height: pixels.
    """

    title: str
    data_uri: str
    width: int
    height: int


def draw_case(
    image: NDArray[np.float32] | None,
    labels: NDArray[np.integer[Any]],
    spacing_mm: tuple[float, float, float],
    colors: dict[int, str],
) -> tuple[View, ...]:
    """Draw axial, coronal and sagittal planes through the mask's middle, and a mosaic of slices.

    Args:
        image: (D, H, W) in view axes; the mask is drawn on black without one.
        labels: (D, H, W) in view axes.
        spacing_mm: along (D, H, W).
        colors: label value -> ``#rrggbb``; other values are not drawn.
    """
    grey = np.zeros(labels.shape, np.uint8) if image is None else to_grey(image)
    at = middle_of(labels)
    depth, height, width = spacing_mm
    planes = (
        ("axial", np.s_[at[0], :, :], (height, width)),
        ("coronal", np.s_[::-1, at[1], :], (depth, width)),
        ("sagittal", np.s_[::-1, :, at[2]], (depth, height)),
    )
    table = _color_table(colors)
    views = [
        _view(title, _overlay(grey[where], labels[where], spacing, table, PLANE_PIXELS))
        for title, where, spacing in planes
    ]
    views.append(_view("slices", _mosaic(grey, labels, (height, width), table)))
    return tuple(views)


def to_grey(image: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Map values to 0 to 255: soft tissue for CT, else between the 1st and 99.5th percentile."""
    sample = image[:: max(1, image.shape[0] // 32)]
    low, high = (float(value) for value in np.percentile(sample, (1, 99.5)))
    if low <= CT_AIR_HU:
        low, high = CT_WINDOW_HU
    scaled = (image - low) * (255.0 / max(high - low, 1e-6))
    grey: NDArray[np.uint8] = np.clip(np.nan_to_num(scaled), 0, 255).astype(np.uint8)
    return grey


def middle_of(labels: NDArray[np.integer[Any]]) -> tuple[int, int, int]:
    """Where a plane shows most foreground, along each axis; the middle of an empty mask."""
    mask = labels > 0
    if not mask.any():
        depth, height, width = (size // 2 for size in labels.shape)
        return depth, height, width
    counts = [mask.sum(axis=axes) for axes in ((1, 2), (0, 2), (0, 1))]
    depth, height, width = (int(count.argmax()) for count in counts)
    return depth, height, width


def _color_table(colors: dict[int, str]) -> NDArray[np.uint8]:
    table = np.zeros((max(colors, default=0) + 1, 3), np.uint8)
    for value, color in colors.items():
        table[value] = list(bytes.fromhex(color.removeprefix("#")))
    return table


def _overlay(
    grey: Plane, labels: Plane, spacing: tuple[float, float], table: NDArray[np.uint8], pixels: int
) -> Image.Image:
    """A plane with square pixels, its longer side ``pixels`` long, labels tinted and outlined."""
    extent = [size * step for size, step in zip(grey.shape, spacing, strict=True)]
    scale = pixels / max(extent)
    rows, columns = (max(1, round(length * scale)) for length in extent)
    base = Image.fromarray(np.ascontiguousarray(grey)).resize(
        (columns, rows), Image.Resampling.BILINEAR
    )
    # Nearest neighbours by index: Pillow cannot resize 16-bit label values.
    take_rows = np.minimum(np.arange(rows) * grey.shape[0] // rows, grey.shape[0] - 1)
    take_columns = np.minimum(np.arange(columns) * grey.shape[1] // columns, grey.shape[1] - 1)
    shown = np.where(labels < len(table), labels, 0)[np.ix_(take_rows, take_columns)]
    rgb = np.repeat(np.asarray(base)[..., None], 3, axis=2).astype(np.float32)
    tint = np.where(shown > 0, 0.25, 0.0)
    tint[_outline(shown)] = 1.0
    rgb += (table[shown] - rgb) * tint[..., None]
    return Image.fromarray(rgb.astype(np.uint8))


def _outline(labels: Plane) -> NDArray[np.bool_]:
    """Pixels of a label that touch another value."""
    edge = np.zeros(labels.shape, bool)
    across, down = labels[:, 1:] != labels[:, :-1], labels[1:] != labels[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    return edge & (labels > 0)


def _mosaic(
    grey: Plane, labels: Plane, spacing: tuple[float, float], table: NDArray[np.uint8]
) -> Image.Image:
    """Axial slices spread evenly over the extent of the mask, or of the image without one."""
    used = np.flatnonzero((labels > 0).any(axis=(1, 2)))
    first, last = (used[0], used[-1]) if len(used) else (0, len(labels) - 1)
    count = min(TILES, int(last - first) + 1)
    indices = np.linspace(first, last, count).round().astype(int)
    tiles = [_overlay(grey[i], labels[i], spacing, table, TILE_PIXELS) for i in indices]
    width, height = tiles[0].size
    columns = min(count, 6)
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height))
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % columns * width, index // columns * height))
    return sheet


def _view(title: str, picture: Image.Image) -> View:
    buffer = io.BytesIO()
    picture.quantize(PALETTE_COLORS, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return View(
        title=title,
        data_uri=f"data:image/png;base64,{encoded}",
        width=picture.width,
        height=picture.height,
    )
