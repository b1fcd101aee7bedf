"""Colours of labels, the same in every picture and file."""

import colorsys
from collections.abc import Iterable

# Okabe and Ito 2008: told apart by people with any colour vision.
FIRST_COLORS = (
    "#e69f00",
    "#56b4e9",
    "#009e73",
    "#cc79a7",
    "#d55e00",
    "#0072b2",
    "#f0e442",
)

GOLDEN_ANGLE_TURNS = 0.381966
"""Steps of this part of the colour circle never come close to an earlier one."""


def label_colors(names: Iterable[str]) -> dict[str, str]:
    """Return a colour like ``#e69f00`` for each name, by its position."""
    return {name: _color(index) for index, name in enumerate(names)}


def _color(index: int) -> str:
    if index < len(FIRST_COLORS):
        return FIRST_COLORS[index]
    rgb = colorsys.hsv_to_rgb(index * GOLDEN_ANGLE_TURNS % 1.0, 0.65, 0.9)
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)
