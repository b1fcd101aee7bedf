"""Bringing the intensities of each channel to a common scale (nnU-Net's schemes, float32)."""

import numpy as np
from numpy.typing import NDArray

from medmamba.errors import InputError, PlanError
from medmamba.preprocessing.recipe import ChannelRecipe, Normalization

SMALLEST_DIVISOR = 1e-8
"""Keeps constant channels finite; nnU-Net's value."""

RGB_MAXIMUM = 255.0


def normalize(
    image: NDArray[np.float32], inside: NDArray[np.bool_], channels: tuple[ChannelRecipe, ...]
) -> None:
    """Normalise every channel of ``image`` in place.

    Args:
        image: (C, D, H, W), cropped.
        inside: (D, H, W), voxels that count where a recipe says ``use_mask``.
        channels: one recipe per channel.

    Raises:
        InputError: an image channel does not hold what its scheme needs.
        PlanError: CT normalisation without statistics.
    """
    if len(channels) != len(image):
        raise InputError(
            f"image: {len(image)} channels, but the plan needs {len(channels)}. "
            "Give one file per channel of the plan.",
            code="E_CHANNEL_COUNT",
        )
    for values, recipe in zip(image, channels, strict=True):
        match recipe.normalization:
            case Normalization.ZSCORE:
                _zscore(values, inside if recipe.use_mask else None)
            case Normalization.CT:
                _ct(values, recipe)
            case Normalization.RESCALE_0_1:
                values -= values.min()
                values /= max(float(values.max()), SMALLEST_DIVISOR)
            case Normalization.RGB_0_1:
                _rgb(values)
            case Normalization.NONE:
                pass


def _zscore(values: NDArray[np.float32], inside: NDArray[np.bool_] | None) -> None:
    if inside is None:
        mean, std = values.mean(), values.std()
        values -= mean
        values /= max(std, np.float32(SMALLEST_DIVISOR))
        return
    chosen = values[inside]
    if chosen.size:
        mean, std = chosen.mean(), chosen.std()
        values[inside] = (chosen - mean) / max(std, np.float32(SMALLEST_DIVISOR))


def _ct(values: NDArray[np.float32], recipe: ChannelRecipe) -> None:
    statistics = recipe.statistics
    if statistics is None:
        raise PlanError(
            "plan: CT normalisation without intensity statistics. "
            "Plan again: medmamba plan DATASET -o WORK."
        )
    np.clip(values, statistics.percentile_00_5, statistics.percentile_99_5, out=values)
    values -= np.float32(statistics.mean)
    values /= np.float32(max(statistics.std, SMALLEST_DIVISOR))


def _rgb(values: NDArray[np.float32]) -> None:
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > RGB_MAXIMUM:
        raise InputError(
            f"image: values from {low:g} to {high:g} in a channel planned as RGB. "
            "RGB channels hold 0 to 255; name the channel otherwise in dataset.json.",
            code="E_IMG_RANGE",
        )
    values /= np.float32(RGB_MAXIMUM)
