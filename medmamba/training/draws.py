"""Every random choice of an augmented sample, drawn before a voxel is read.

Distributions are nnU-Net's (default preset); what they do to voxels is in ``spatial.py`` and
``augment.py``. A draw is a pure function of the generator it is given, so a sample is a pure
function of (seed, iteration, place in the batch).
"""

from dataclasses import dataclass, replace
from math import pi

import numpy as np
from numpy.typing import NDArray

from medmamba.errors import UsageError

Range = tuple[float, float]

DUMMY_2D_RATIO = 3.0
"""Patches whose longest axis is over 3 times the first are augmented in plane only (nnU-Net)."""

ELONGATED_2D_RATIO = 1.5
"""2D patches longer than this rotate by 15 degrees only (nnU-Net)."""

ROTATION_3D, ROTATION_ELONGATED, ROTATION_PLANE = pi / 6, pi / 12, pi

DARK_SHARE = 0.5
"""Factors of brightness, contrast and gamma are below 1 half of the time (nnU-Net)."""


@dataclass(frozen=True, kw_only=True)
class AugmentationPreset:
    """Probabilities per sample and parameter ranges; one transform each, in order of use."""

    rotation: float = 0.0
    scaling: float = 0.0
    scale_range: Range = (0.7, 1.4)
    scale_axes_apart: float = 0.0
    noise: float = 0.0
    noise_std: Range = (0.0, 0.1)
    blur: float = 0.0
    blur_channel: float = 0.5
    blur_sigma: Range = (0.5, 1.0)
    brightness: float = 0.0
    brightness_factor: Range = (0.75, 1.25)
    shift: float = 0.0
    shift_std: float = 0.5
    contrast: float = 0.0
    contrast_factor: Range = (0.75, 1.25)
    low_resolution: float = 0.0
    low_resolution_channel: float = 0.5
    low_resolution_scale: Range = (0.5, 1.0)
    gamma_inverted: float = 0.0
    gamma: float = 0.0
    gamma_range: Range = (0.7, 1.5)
    ramp: float = 0.0
    ramp_slope: float = 0.3
    rectangles: float = 0.0
    rectangle_extent: Range = (0.1, 0.3)
    mirror: float = 0.0
    previous_morphology: float = 0.0
    previous_removal: float = 0.0

    @property
    def moves_voxels(self) -> bool:
        """Whether samples are ever rotated or scaled."""
        return self.rotation > 0 or self.scaling > 0


_DEFAULT = AugmentationPreset(
    rotation=0.2,
    scaling=0.2,
    noise=0.1,
    blur=0.2,
    brightness=0.15,
    contrast=0.15,
    low_resolution=0.25,
    gamma_inverted=0.1,
    gamma=0.3,
    mirror=0.5,
    previous_morphology=0.4,
    previous_removal=0.2,
)

PRESETS: dict[str, AugmentationPreset] = {
    "default": _DEFAULT,
    "strong": replace(
        _DEFAULT,
        rotation=0.4,
        scaling=0.4,
        scale_axes_apart=0.5,
        noise=0.2,
        brightness=0.3,
        shift=0.2,
        contrast=0.3,
        gamma_inverted=0.2,
        ramp=0.2,
        rectangles=0.2,
    ),
    "none": AugmentationPreset(),
}


@dataclass(frozen=True, kw_only=True)
class IntensityDraw:
    """What will happen to intensities; None or an empty tuple is nothing.

    Args:
        noise_std: one for all channels; ``noise_seed`` seeds the voxels' own generator.
        blur: per channel, sigma per axis in voxels, or None.
        brightness, shift, contrast, gamma_inverted, gamma: one number per channel.
        low_resolution: per channel the factor of the resolution, or None.
        ramp: per axis the change of log brightness from one side to the other.
        rectangles: per rectangle, (start, stop) per axis as fractions of the patch.
    """

    noise_std: float = 0.0
    noise_seed: int = 0
    blur: tuple[tuple[float, ...] | None, ...] = ()
    brightness: tuple[float, ...] = ()
    shift: tuple[float, ...] = ()
    contrast: tuple[float, ...] = ()
    low_resolution: tuple[float | None, ...] = ()
    gamma_inverted: tuple[float, ...] = ()
    gamma: tuple[float, ...] = ()
    ramp: tuple[float, ...] = ()
    rectangles: tuple[tuple[Range, ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rotations:
    """Which rotations a patch allows.

    Args:
        limit: largest angle about each axis, radians.
        in_plane: only about the first axis, which is neither rotated nor scaled ("dummy 2D").
    """

    limit: float
    in_plane: bool


def rotations_of(patch_size: tuple[int, ...], *, dummy_2d: bool | None = None) -> Rotations:
    """Choose the rotations of a patch by its shape; ``dummy_2d`` overrides the choice in 3D."""
    if len(patch_size) == 2:
        elongated = max(patch_size) / min(patch_size) > ELONGATED_2D_RATIO
        return Rotations(limit=ROTATION_ELONGATED if elongated else ROTATION_PLANE, in_plane=False)
    in_plane = dummy_2d
    if in_plane is None:
        in_plane = max(patch_size) / patch_size[0] > DUMMY_2D_RATIO
    return Rotations(limit=ROTATION_PLANE if in_plane else ROTATION_3D, in_plane=in_plane)


def preset_of(name: str) -> AugmentationPreset:
    """Look up a preset.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in PRESETS:
        raise UsageError(
            f"augmentation '{name}' does not exist. Choose one of: {', '.join(PRESETS)}."
        )
    return PRESETS[name]


def draw_matrix(
    preset: AugmentationPreset,
    rotations: Rotations,
    dimension: int,
    generator: np.random.Generator,
) -> NDArray[np.float64] | None:
    """Draw the matrix that takes patch offsets to source offsets, or None for the identity."""
    rotate = generator.random() < preset.rotation
    scale = generator.random() < preset.scaling
    if not (rotate or scale):
        return None
    matrix = np.eye(dimension)
    free = dimension - rotations.in_plane
    if rotate:
        angles = generator.uniform(-rotations.limit, rotations.limit, size=3 if free == 3 else 1)
        matrix = rotation_matrix(angles, dimension)
    if scale:
        factors = np.ones(dimension)
        apart = generator.random() < preset.scale_axes_apart
        drawn = generator.uniform(*preset.scale_range, size=free if apart else 1)
        factors[dimension - free :] = drawn
        matrix = matrix * factors
    return matrix


def rotation_matrix(angles: NDArray[np.float64], dimension: int) -> NDArray[np.float64]:
    """Return the product of rotations about axes 0, 1, 2, or the one in the last two axes."""
    matrix = np.eye(dimension)
    planes = [(1, 2), (0, 2), (0, 1)] if len(angles) == 3 else [(dimension - 2, dimension - 1)]
    for (first, second), angle in zip(planes, angles, strict=True):
        step = np.eye(dimension)
        step[[first, second], [first, second]] = np.cos(angle)
        step[first, second], step[second, first] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ step
    return matrix


def draw_intensity(
    preset: AugmentationPreset, channels: int, dimension: int, generator: np.random.Generator
) -> IntensityDraw:
    """Draw everything that will happen to the intensities of one sample."""

    def happens(probability: float) -> bool:
        return bool(generator.random() < probability)

    def factors(probability: float, limits: Range) -> tuple[float, ...]:
        if not happens(probability):
            return ()
        return tuple(_draw_factor(limits, generator) for _ in range(channels))

    # Keyword arguments are evaluated in order, which is part of what a seed means.
    return IntensityDraw(
        noise_std=generator.uniform(*preset.noise_std) if happens(preset.noise) else 0.0,
        noise_seed=int(generator.integers(2**62)),
        blur=_draw_blur(preset, channels, dimension, generator) if happens(preset.blur) else (),
        brightness=factors(preset.brightness, preset.brightness_factor),
        shift=tuple(generator.normal(0, preset.shift_std, channels))
        if happens(preset.shift)
        else (),
        contrast=factors(preset.contrast, preset.contrast_factor),
        low_resolution=tuple(
            generator.uniform(*preset.low_resolution_scale)
            if happens(preset.low_resolution_channel)
            else None
            for _ in range(channels)
        )
        if happens(preset.low_resolution)
        else (),
        gamma_inverted=factors(preset.gamma_inverted, preset.gamma_range),
        gamma=factors(preset.gamma, preset.gamma_range),
        ramp=tuple(generator.normal(0, preset.ramp_slope, dimension))
        if happens(preset.ramp)
        else (),
        rectangles=_draw_rectangles(preset, dimension, generator)
        if happens(preset.rectangles)
        else (),
    )


def draw_mirror(
    preset: AugmentationPreset, axes: tuple[int, ...], generator: np.random.Generator
) -> tuple[int, ...]:
    """Draw the spatial axes to flip."""
    return tuple(axis for axis in axes if generator.random() < preset.mirror)


def _draw_factor(limits: Range, generator: np.random.Generator) -> float:
    low, high = limits
    if generator.random() < DARK_SHARE:
        return float(generator.uniform(low, 1.0))
    return float(generator.uniform(1.0, high))


def _draw_blur(
    preset: AugmentationPreset, channels: int, dimension: int, generator: np.random.Generator
) -> tuple[tuple[float, ...] | None, ...]:
    return tuple(
        tuple(generator.uniform(*preset.blur_sigma, size=dimension).tolist())
        if generator.random() < preset.blur_channel
        else None
        for _ in range(channels)
    )


def _draw_rectangles(
    preset: AugmentationPreset, dimension: int, generator: np.random.Generator
) -> tuple[tuple[Range, ...], ...]:
    boxes = []
    for _ in range(int(generator.integers(1, 4))):
        extent = generator.uniform(*preset.rectangle_extent, size=dimension)
        start = generator.uniform(0, 1 - extent)
        boxes.append(tuple((float(a), float(a + b)) for a, b in zip(start, extent, strict=True)))
    return tuple(boxes)
