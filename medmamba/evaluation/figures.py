"""Pictures of masks over images; the door of matplotlib, which is imported when one is drawn.

Nothing here needs a display or pyplot's global state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medmamba.evaluation.overlap import count_overlap, region_mask
from medmamba.evaluation.palette import label_colors
from medmamba.files import replace_atomic
from medmamba.labels import LabelMap
from medmamba.volume import Geometry, Volume

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # noqa: TID251
    from matplotlib.figure import Figure  # noqa: TID251

PLANE_NAMES = ("axial", "coronal", "sagittal")
"""Planes across the axes z, y and x of the body."""

WINDOW_PERCENTILES = (0.5, 99.5)
FILL_OPACITY = 0.35
PANEL_INCHES = 3.2
MIN_PANEL_ASPECT, MAX_PANEL_ASPECT = 0.35, 2.0
DOTS_PER_INCH = 130
PAPER, INK = "#111111", "#eeeeee"
LEGEND_INCHES_PER_LETTER, LEGEND_INCHES_PER_HANDLE, LEGEND_INCHES_PER_ROW = 0.075, 0.6, 0.2


@dataclass(frozen=True, kw_only=True)
class _Plane:
    """A slice across one axis, turned so that it looks as radiologists expect."""

    name: str
    picture: NDArray[Any]
    masks: tuple[NDArray[Any] | None, ...]
    aspect: float

    @property
    def height_over_width(self) -> float:
        rows, columns = self.picture.shape[:2]
        return float(rows * self.aspect / columns)


def overlay_figure(
    image: Volume,
    reference: Volume | NDArray[Any] | None,
    prediction: Volume | NDArray[Any] | None,
    label_map: LabelMap,
    path: Path,
    *,
    title: str = "",
) -> None:
    """Draw image, reference and prediction side by side on three planes, as a PNG.

    The planes meet in the middle of the foreground and are turned as radiologists see them
    (face up, head up, the patient's right on the left). A volume of one slice has one plane.

    Args:
        image: (C, D, H, W); the first channel is drawn, or all three of a colour image.
        reference: labels on the same grid; None leaves the column out.
        prediction: labels on the same grid; None leaves the column out.
        label_map: names of the labels, which the legend shows with their Dice.
        path: where the PNG goes.
        title: line above the picture.

    Raises:
        EnvironmentFault: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: TID251
    from matplotlib.figure import Figure  # noqa: TID251

    truth, guess = _labels(reference), _labels(prediction)
    planes = _planes(image, (truth, guess))
    shown = (("image", True), ("reference", truth is not None), ("prediction", guess is not None))
    columns = [(name, index - 1) for index, (name, there) in enumerate(shown) if there]
    legend = _legend_texts(label_map, truth, guess)
    heights = [
        min(max(plane.height_over_width, MIN_PANEL_ASPECT), MAX_PANEL_ASPECT) for plane in planes
    ]
    width = PANEL_INCHES * len(columns)
    longest = max(len(text) for text in legend.values())
    per_row = max(1, int(width / (longest * LEGEND_INCHES_PER_LETTER + LEGEND_INCHES_PER_HANDLE)))
    legend_inches = LEGEND_INCHES_PER_ROW * (1 + -(-len(legend) // per_row))
    size = (width, PANEL_INCHES * sum(heights) + 0.4 + legend_inches + 0.3 * bool(title))
    figure = Figure(figsize=size, layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(planes), len(columns), squeeze=False, height_ratios=heights)
    for row, plane in zip(grid, planes, strict=True):
        _draw_row(row, plane, columns, label_map, window=_window(image.array))
    for axes, (name, _) in zip(grid[0], columns, strict=True):
        axes.set_title(name, color=INK, fontsize=11)
    _add_legend(figure, legend, per_row)
    if title:
        figure.suptitle(title, color=INK, fontsize=12)
    replace_atomic(
        path, lambda temporary: figure.savefig(temporary, dpi=DOTS_PER_INCH, facecolor=PAPER)
    )


def _labels(labels: Volume | NDArray[Any] | None) -> NDArray[Any] | None:
    if labels is None:
        return None
    array: NDArray[Any] = labels.array if isinstance(labels, Volume) else labels
    return array[0] if array.ndim == 4 else array


def _planes(image: Volume, labels: Sequence[NDArray[Any] | None]) -> list[_Plane]:
    order, flips = _body_axes(image.geometry)
    spacing = tuple(image.geometry.spacing_mm[axis] for axis in order)
    turned = [None if array is None else array.transpose(order)[flips] for array in labels]
    channels = [array.transpose(order)[flips] for array in image.array]
    volume = np.stack(channels, axis=-1) if len(channels) == 3 else channels[0]
    centre = _centre(volume.shape[:3], turned)
    planes = []
    for axis, name in enumerate(PLANE_NAMES if image.geometry.shape[0] > 1 else ("",)):
        rows, columns = (other for other in range(3) if other != axis)
        at = tuple(centre[axis] if other == axis else slice(None) for other in range(3))
        planes.append(
            _Plane(
                name=name,
                picture=volume[at],
                masks=tuple(None if array is None else array[at] for array in turned),
                aspect=spacing[rows] / spacing[columns],
            )
        )
    return planes


def _body_axes(geometry: Geometry) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    """Order and flips that put head, face and the patient's right first: radiologists' view.

    A single slice is left as it is stored; it may be a photograph.
    """
    plain, turned = slice(None), slice(None, None, -1)
    if geometry.shape[0] == 1:
        return (0, 1, 2), (plain,) * 3
    directions = geometry.matrix[:3, :3] / np.array(geometry.spacing_mm)
    candidates = permutations(range(3))
    # Body axes z, y, x are rows 2, 1, 0 of the matrix.
    order = max(candidates, key=lambda axes: sum(abs(directions[2 - i, axes[i]]) for i in range(3)))
    positive = [directions[2 - i, order[i]] > 0 for i in range(3)]
    return order, tuple(turned if flag else plain for flag in positive)


def _centre(shape: tuple[int, ...], labels: Sequence[NDArray[Any] | None]) -> tuple[int, ...]:
    """Middle of the foreground, moved per axis to where most of it is seen."""
    masks = [array > 0 for array in labels if array is not None]
    if not masks or not any(mask.any() for mask in masks):
        return tuple(size // 2 for size in shape)
    union = np.logical_or.reduce(masks)
    centre = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        counts = np.count_nonzero(union, axis=others)
        middle = int(np.average(np.arange(len(counts)), weights=counts).round())
        centre.append(middle if counts[middle] else int(np.argmax(counts)))
    return tuple(centre)


def _window(array: NDArray[Any]) -> tuple[float, float]:
    """Grey values drawn black and white."""
    values = np.asarray(array, dtype=np.float32)
    low, high = (float(value) for value in np.percentile(values, WINDOW_PERCENTILES))
    return (low, high) if high > low else (low, low + 1.0)


def _draw_row(
    row: "Sequence[Axes]",
    plane: _Plane,
    columns: Sequence[tuple[str, int]],
    label_map: LabelMap,
    *,
    window: tuple[float, float],
) -> None:
    for axes, (_, index) in zip(row, columns, strict=True):
        _draw(axes, plane, window)
        if index >= 0:
            _draw_labels(axes, plane.masks[index], label_map, plane.aspect)
    row[0].set_ylabel(plane.name, color=INK, fontsize=10)


def _draw(axes: "Axes", plane: _Plane, window: tuple[float, float]) -> None:
    low, high = window
    picture = np.clip((plane.picture - low) / (high - low), 0, 1)
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1, aspect=plane.aspect, interpolation="bicubic")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_facecolor("black")
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_labels(
    axes: "Axes", labels: NDArray[Any] | None, label_map: LabelMap, aspect: float
) -> None:
    from matplotlib.colors import to_rgb  # noqa: TID251

    assert labels is not None
    colors = label_colors(label_map.foreground)
    # Large regions first, so that those inside them stay visible.
    order = sorted(label_map.foreground.items(), key=lambda item: -len(item[1]))
    for name, values in order:
        mask = region_mask(labels, values)
        if not mask.any():
            continue
        fill = np.zeros((*mask.shape, 4))
        fill[..., :3] = to_rgb(colors[name])
        fill[..., 3] = mask * FILL_OPACITY
        axes.imshow(fill, aspect=aspect, interpolation="nearest")
        # Padding closes the outline of a mask that touches the edge.
        padded = np.pad(mask.astype(float), 1)
        rows, columns = (np.arange(size) - 1 for size in padded.shape)
        axes.contour(columns, rows, padded, levels=[0.5], colors=[colors[name]], linewidths=1.3)
    height, width = labels.shape
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)


def _legend_texts(
    label_map: LabelMap, truth: NDArray[Any] | None, guess: NDArray[Any] | None
) -> dict[str, str]:
    return {
        name: name + _dice_text(values, truth, guess)
        for name, values in label_map.foreground.items()
    }


def _add_legend(figure: "Figure", texts: dict[str, str], per_row: int) -> None:
    from matplotlib.patches import Patch  # noqa: TID251

    colors = label_colors(texts)
    figure.legend(
        handles=[Patch(facecolor=colors[name], label=text) for name, text in texts.items()],
        loc="outside lower center",
        ncols=min(per_row, len(texts)),
        frameon=False,
        labelcolor=INK,
        fontsize=9,
    )


def _dice_text(
    values: Sequence[int], truth: NDArray[Any] | None, guess: NDArray[Any] | None
) -> str:
    if truth is None or guess is None:
        return ""
    overlap = count_overlap(
        region_mask(truth, values), region_mask(guess, values), voxels=truth.size
    )
    return f"  (Dice {overlap.dice:.3f})" if overlap.dice == overlap.dice else "  (absent)"
