"""Augmentation of a coarse network's labels, so that the fine one of a cascade does not trust them.

nnU-Net's two transforms on the one-hot channels: a random morphological operation, and the removal
of a random component. Draws come first and voxels later, as everywhere (``draws.py``).
Legend: n channels, P patch.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medmamba.evaluation.components import label_components
from medmamba.training.draws import AugmentationPreset

Operator = Literal["dilate", "erode", "close", "open"]
OPERATORS: tuple[Operator, ...] = get_args(Operator)

RADIUS = (1.0, 8.0)
"""Radius of the ball, in voxels."""

PER_LABEL = 0.5
"""Share of the labels that a transform is applied to when it happens."""

LARGEST_REMOVED = 0.15
"""Components that fill more of the patch are never removed."""


@dataclass(frozen=True, kw_only=True)
class Morphology:
    """One operation on one channel, with a ball."""

    channel: int
    operator: Operator
    radius: float


@dataclass(frozen=True, kw_only=True)
class Removal:
    """Removal of a component of one channel; ``pick`` in [0, 1) says which of the small ones."""

    channel: int
    pick: float


@dataclass(frozen=True, kw_only=True)
class PreviousDraw:
    """What will happen to the channels, in this order."""

    morphology: tuple[Morphology, ...] = ()
    removals: tuple[Removal, ...] = ()


def draw_previous(
    preset: AugmentationPreset, channels: int, generator: np.random.Generator
) -> PreviousDraw:
    """Draw what happens to ``channels`` one-hot channels."""
    morphology: tuple[Morphology, ...] = ()
    removals: tuple[Removal, ...] = ()
    if generator.random() < preset.previous_morphology:
        morphology = tuple(
            Morphology(
                channel=channel,
                operator=OPERATORS[int(generator.integers(len(OPERATORS)))],
                radius=float(generator.uniform(*RADIUS)),
            )
            for channel in _some_channels(channels, generator)
        )
    if generator.random() < preset.previous_removal:
        removals = tuple(
            Removal(channel=channel, pick=float(generator.random()))
            for channel in _some_channels(channels, generator)
        )
    return PreviousDraw(morphology=morphology, removals=removals)


def augment_previous(channels: NDArray[np.bool_], draw: PreviousDraw) -> NDArray[np.bool_]:
    """Apply a draw to (n, *P); the input is not changed."""
    if not (draw.morphology or draw.removals):
        return channels
    result = channels.copy()
    for step in draw.morphology:
        _apply_morphology(result, step)
    for removal in draw.removals:
        _remove_component(result[removal.channel], removal.pick)
    return result


def dilate(mask: NDArray[np.bool_], radius: float) -> NDArray[np.bool_]:
    """Return every voxel within ``radius`` of the mask."""
    if not mask.any():
        return mask
    near: NDArray[np.bool_] = ndimage.distance_transform_edt(~mask) <= radius
    return near


def erode(mask: NDArray[np.bool_], radius: float) -> NDArray[np.bool_]:
    """Return voxels farther than ``radius`` from those outside the mask; the border is none."""
    return ~dilate(~mask, radius)


def _apply_morphology(channels: NDArray[np.bool_], step: Morphology) -> None:
    before, radius = channels[step.channel].copy(), step.radius
    if step.operator == "dilate":
        after = dilate(before, radius)
    elif step.operator == "erode":
        after = erode(before, radius)
    elif step.operator == "close":
        after = erode(dilate(before, radius), radius)
    else:
        after = dilate(erode(before, radius), radius)
    # Labels exclude each other: what one gains the others lose.
    channels[:, after & ~before] = False
    channels[step.channel] = after


def _remove_component(channel: NDArray[np.bool_], pick: float) -> None:
    numbered, count = label_components(channel)
    if count == 0:
        return
    sizes = np.bincount(numbered.ravel(), minlength=count + 1)[1:]
    small = np.flatnonzero(sizes < LARGEST_REMOVED * channel.size)
    if len(small):
        channel[numbered == small[int(pick * len(small))] + 1] = False


def _some_channels(channels: int, generator: np.random.Generator) -> list[int]:
    order = generator.permutation(channels)
    return [int(channel) for channel in order if generator.random() < PER_LABEL]
