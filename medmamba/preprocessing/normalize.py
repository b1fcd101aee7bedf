"""Bringing the intensities of each channel to a common scale (nnU-Net's schemes, float32).

First a look at the whole channel, then each voxel by itself, so that images can be normalised a
few planes at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba.errors import InputError, PlanError
from medmamba.preprocessing.recipe import ChannelRecipe, Normalization

SMALLEST_DIVISOR = 1e-8
"""Keeps constant channels finite; nnU-Net's value."""

RGB_MAXIMUM = 255.0

NO_SHIFT = np.float32(0)
NO_DIVISOR = np.float32(1)

MOST_VOXELS_AT_ONCE = 1 << 25
"""Up to here mean and deviation are summed as nnU-Net does, to the last bit, which takes two more
copies of the voxels; beyond, in double precision a few planes at a time."""


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """What is done to the voxels of a channel: clip, subtract, divide.

    Args:
        clip: lowest and highest value; None for any.
        shift: subtracted after clipping.
        divisor: divided by last.
        only_inside: leave voxels outside the non-zero region as they are.
    """

    clip: tuple[float, float] | None = None
    shift: np.float32 = NO_SHIFT
    divisor: np.float32 = NO_DIVISOR
    only_inside: bool = False

    def apply(self, values: NDArray[np.float32], inside: NDArray[np.bool_] | None) -> None:
        """Scale in place.

        Args:
            values: any part of the channel.
            inside: the non-zero region in it; None where all voxels count.
        """
        if self.only_inside and inside is not None:
            chosen = values[inside]
            chosen -= self.shift
            chosen /= self.divisor
            values[inside] = chosen
            return
        if self.clip is not None:
            np.clip(values, *self.clip, out=values)
        values -= self.shift
        values /= self.divisor


def find_scalings(
    image: NDArray[np.float32],
    inside: NDArray[np.bool_] | None,
    channels: tuple[ChannelRecipe, ...],
) -> tuple[Scaling, ...]:
    """Look at every channel of ``image`` and return how its voxels are to be scaled.

    Args:
        image: (C, D, H, W), cropped.
        inside: (D, H, W), voxels that count where a recipe says ``use_mask``; None for all.
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
    return tuple(
        _scaling(values, recipe, inside) for values, recipe in zip(image, channels, strict=True)
    )


def _scaling(
    values: NDArray[np.float32], recipe: ChannelRecipe, inside: NDArray[np.bool_] | None
) -> Scaling:
    match recipe.normalization:
        case Normalization.ZSCORE:
            return _zscore(values, inside if recipe.use_mask else None)
        case Normalization.CT:
            return _ct(recipe)
        case Normalization.RESCALE_0_1:
            low, high = values.min(), values.max()
            return Scaling(shift=low, divisor=max(high - low, np.float32(SMALLEST_DIVISOR)))
        case Normalization.RGB_0_1:
            return _rgb(values)
        case Normalization.NONE:
            return Scaling()


def _zscore(values: NDArray[np.float32], inside: NDArray[np.bool_] | None) -> Scaling:
    if inside is not None and not inside.any():
        return Scaling(only_inside=True)
    if values.size <= MOST_VOXELS_AT_ONCE:
        # In working order: the sums are to be those of nnU-Net, to the last bit.
        chosen = np.ascontiguousarray(values) if inside is None else values[inside]
        mean, std = chosen.mean(), chosen.std()
    else:
        mean, std = _moments(values, inside)
    return Scaling(
        shift=mean, divisor=max(std, np.float32(SMALLEST_DIVISOR)), only_inside=inside is not None
    )


def _moments(
    values: NDArray[np.float32], inside: NDArray[np.bool_] | None
) -> tuple[np.float32, np.float32]:
    """Mean and standard deviation, with the memory of a few planes."""
    count = sum(part.size for part in _parts(values, inside))
    mean = sum(float(part.sum(dtype=np.float64)) for part in _parts(values, inside)) / count
    squares = sum(
        float(np.square(part - mean, dtype=np.float64).sum()) for part in _parts(values, inside)
    )
    return np.float32(mean), np.float32(np.sqrt(squares / count))


def _parts(values: NDArray[np.float32], inside: NDArray[np.bool_] | None) -> Iterator[NDArray[Any]]:
    for plane, planes in enumerate(values):
        yield planes if inside is None else planes[inside[plane]]


def _ct(recipe: ChannelRecipe) -> Scaling:
    statistics = recipe.statistics
    if statistics is None:
        raise PlanError(
            "plan: CT normalisation without intensity statistics. "
            "Plan again: medmamba plan DATASET -o WORK."
        )
    return Scaling(
        clip=(statistics.percentile_00_5, statistics.percentile_99_5),
        shift=np.float32(statistics.mean),
        divisor=np.float32(max(statistics.std, SMALLEST_DIVISOR)),
    )


def _rgb(values: NDArray[np.float32]) -> Scaling:
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > RGB_MAXIMUM:
        raise InputError(
            f"image: values from {low:g} to {high:g} in a channel planned as RGB. "
            "RGB channels hold 0 to 255; name the channel otherwise in dataset.json.",
            code="E_IMG_RANGE",
        )
    return Scaling(divisor=np.float32(RGB_MAXIMUM))
