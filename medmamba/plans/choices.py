"""What a plan says of the data alone: spacing, axis order, normalisation, reader.

Rules of Isensee et al. 2021 (nnU-Net) as its version 2 applies them. Patch, batch and
configurations are in ``medmamba.plans.planner``.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from medmamba.errors import PlanError
from medmamba.plans.budget import Budget
from medmamba.plans.fingerprint import Fingerprint
from medmamba.plans.plan import Reason
from medmamba.preprocessing.recipe import ChannelRecipe, Normalization
from medmamba.preprocessing.resample import resampled_shape

ANISOTROPY = 3.0
"""An axis this much coarser, and this much shorter, is anisotropic."""

ANISOTROPIC_PERCENTILE = 10
"""Anisotropic axes are resampled to a fine case of the dataset, not to the median."""

MASKED_NORMALIZATION = 0.75
"""Below this median size after cropping, statistics are taken of the non-zero region only."""

SCHEMES = {
    "ct": Normalization.CT,
    "nonorm": Normalization.NONE,
    "zscore": Normalization.ZSCORE,
    "rescale_to_0_1": Normalization.RESCALE_0_1,
    "rgb_to_0_1": Normalization.RGB_0_1,
}
"""Channel name in dataset.json, lower case -> normalisation; any other name means z-score."""

READERS = {
    ".png": "NaturalImage2DIO",
    ".bmp": "NaturalImage2DIO",
    ".tif": "NaturalImage2DIO",
    ".tiff": "Tiff3DIO",
    ".nii": "NibabelIO",
}
"""File ending -> what nnU-Net reads it with; SimpleITKIO for all others."""


def choose_spacing(fingerprint: Fingerprint, budget: Budget) -> tuple[tuple[float, ...], Reason]:
    """Choose the target spacing of full resolution, in the raw images' axis order."""
    if budget.spacing_mm is not None:
        asked = tuple(float(value) for value in budget.spacing_mm)
        return asked, Reason(topic="spacing", value=in_mm(asked), why="asked for")
    spacings = np.array(fingerprint.spacings_mm, dtype=np.float64)
    target = np.median(spacings, axis=0)
    size = np.median(np.array(fingerprint.shapes_after_crop), axis=0)
    coarse = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != coarse]
    finest_other = float(max(target[axis] for axis in others))
    why = "median of the cases"
    is_coarse = target[coarse] > ANISOTROPY * finest_other
    if is_coarse and size[coarse] * ANISOTROPY < min(size[axis] for axis in others):
        fine = float(np.percentile(spacings[:, coarse], ANISOTROPIC_PERCENTILE))
        if fine < finest_other:
            fine = finest_other + 1e-5
        if not np.isclose(fine, target[coarse]):
            why = (
                f"median of the cases, but {fine:g} mm instead of {target[coarse]:g} mm along axis "
                f"{coarse}: it is more than {ANISOTROPY:g} times coarser and shorter than the "
                f"others, so its {ANISOTROPIC_PERCENTILE}th percentile is used"
            )
        target[coarse] = fine
    chosen = tuple(float(value) for value in target)
    return chosen, Reason(topic="spacing", value=in_mm(chosen), why=why)


def choose_transpose(spacing_mm: tuple[float, ...]) -> tuple[int, int, int]:
    """Put the coarsest axis first, the others after it in ascending order."""
    first = int(np.argmax(spacing_mm))
    second, third = (axis for axis in range(3) if axis != first)
    return (first, second, third)


def median_resampled_shape(
    fingerprint: Fingerprint, spacing_mm: tuple[float, ...]
) -> tuple[float, ...]:
    """Return the median shape of the cases once resampled, in the raw images' axis order.

    Raises:
        PlanError: an axis of the median case would have no voxel left.
    """
    shapes = [
        resampled_shape(shape, spacing, spacing_mm)
        for shape, spacing in zip(
            fingerprint.shapes_after_crop, fingerprint.spacings_mm, strict=True
        )
    ]
    median = tuple(float(value) for value in np.median(shapes, axis=0))
    if min(median) == 0:
        raise PlanError(
            f"target spacing {in_mm(spacing_mm)}: the median case would have "
            f"{' x '.join(f'{value:g}' for value in median)} voxels. Ask for a finer spacing.",
            code="E_PLAN_SPACING",
        )
    return median


def choose_channels(
    fingerprint: Fingerprint, channel_names: tuple[str, ...]
) -> tuple[tuple[ChannelRecipe, ...], tuple[Reason, ...]]:
    """Choose each channel's normalisation by its name."""
    masked = fingerprint.median_relative_size_after_cropping < MASKED_NORMALIZATION
    channels, reasons = [], []
    for index, name in enumerate(channel_names):
        scheme = SCHEMES.get(name.casefold(), Normalization.ZSCORE)
        use_mask = masked and scheme is Normalization.ZSCORE
        statistics = fingerprint.intensities[index] if scheme is Normalization.CT else None
        channels.append(
            ChannelRecipe(normalization=scheme, use_mask=use_mask, statistics=statistics)
        )
        why = f"channel is named '{name}'"
        if use_mask:
            kept = fingerprint.median_relative_size_after_cropping
            why += f"; cropping keeps {kept:.0%} of a case, so only the non-zero region counts"
        value = scheme.value + (" in the non-zero region" if use_mask else "")
        reasons.append(Reason(topic=f"normalisation of channel {index}", value=value, why=why))
    return tuple(channels), tuple(reasons)


def transpose_reason(spacing: tuple[float, ...], transpose: tuple[int, int, int]) -> Reason:
    """Say why the axes are in this order."""
    return Reason(
        topic="axis order",
        value=" ".join("zyx"[axis] for axis in transpose),
        why=f"the coarsest axis ({'zyx'[transpose[0]]}, {spacing[transpose[0]]:g} mm) comes first",
    )


def read_channel_names(fingerprint: Fingerprint, description: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the channels' names in order.

    Raises:
        PlanError: there are not as many as the fingerprint has channels.
    """
    names = description.get("channel_names", description.get("modality"))
    if not isinstance(names, Mapping) or len(names) != len(fingerprint.intensities):
        raise PlanError(
            f"dataset.json: 'channel_names' is {names!r}, but the fingerprint has "
            f"{len(fingerprint.intensities)} channels. Fingerprint the dataset again."
        )
    return tuple(str(names[key]) for key in sorted(names, key=int))


def choose_reader(fingerprint: Fingerprint, description: Mapping[str, Any]) -> str:
    """Name what nnU-Net would read the images with."""
    asked = description.get("overwrite_image_reader_writer")
    if asked and asked != "None":
        return str(asked)
    ending = str(description.get("file_ending", ""))
    if ending == ".tif" and any(shape[0] > 1 for shape in fingerprint.shapes_after_crop):
        return "Tiff3DIO"
    return READERS.get(ending, "SimpleITKIO")


def in_mm(spacing: tuple[float, ...]) -> str:
    """Write a spacing for people."""
    return " x ".join(f"{value:.4g}" for value in spacing) + " mm"
