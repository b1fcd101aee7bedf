"""From a raw case to the array a network sees: transpose, crop, normalise, resample.

Each step leaves what is needed to undo it in an `UndoRecord`; undoing is in
``medmamba.preprocessing.restore``. Whole datasets are preprocessed by
``medmamba.preprocessing.batch``.
"""

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from medmamba.errors import GeometryError, InputError
from medmamba.files import RECORD_CONFIG
from medmamba.labels import LabelMap
from medmamba.preprocessing.crop import box_slices, mark_outside, nonzero_box, nonzero_region
from medmamba.preprocessing.locations import ClassLocations, sample_locations
from medmamba.preprocessing.memory_gate import available_bytes
from medmamba.preprocessing.normalize import Scaling, find_scalings
from medmamba.preprocessing.recipe import PreprocessingRecipe
from medmamba.preprocessing.resample import (
    resample_channels,
    resample_image,
    resample_labels,
    resampled_shape,
    separate_axis,
)
from medmamba.volume import Box, Geometry, Grid, Volume

T = TypeVar("T")
Shape3 = tuple[int, int, int]
Spacing3 = tuple[float, float, float]

PLANES_AT_ONCE = 16
"""Planes normalised at once, so that what that takes stays small."""


@dataclass(frozen=True, kw_only=True)
class UndoRecord:
    """What preprocessing did to a case, enough to bring a prediction back to its grid.

    All but ``geometry`` is in working (transposed) axis order.

    Args:
        geometry: the grid of the raw image, in (D, H, W).
        transpose_forward: working axis -> axis of the raw image.
        spacing_mm: spacing of the raw image.
        shape: voxels before cropping.
        crop_box: half-open box of the non-zero region.
        shape_after_crop: voxels of that box.
        working_spacing_mm: spacing after resampling.
        working_shape: voxels after resampling.
    """

    __pydantic_config__ = RECORD_CONFIG

    geometry: Geometry
    transpose_forward: tuple[int, int, int]
    spacing_mm: Spacing3
    shape: Shape3
    crop_box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    shape_after_crop: Shape3
    working_spacing_mm: Spacing3
    working_shape: Shape3


@dataclass(frozen=True, kw_only=True, eq=False)
class PreprocessedCase:
    """A case on the working grid.

    Args:
        data: (C, d, h, w) float32.
        labels: (1, d, h, w), -1 outside the non-zero region; None without a label image.
        class_locations: class key -> (n, 3) voxels of the class; empty without labels.
        coarse: the same case on the grid of a cascade's first network.
        siblings: the same case for the other members of an ensemble.
    """

    data: NDArray[np.float32]
    labels: NDArray[np.int16] | None
    record: UndoRecord
    class_locations: ClassLocations
    coarse: "PreprocessedCase | None" = None
    siblings: "tuple[PreprocessedCase, ...]" = ()


def preprocess_case(
    image: Volume,
    labels: Volume | None,
    *,
    grid: Grid,
    recipe: PreprocessingRecipe,
    label_map: LabelMap,
    device: str | None = None,
    consume: bool = False,
) -> PreprocessedCase:
    """Bring one case to the working grid.

    The scheme is nnU-Net's, step by step (Isensee et al. 2021, supplementary note 2).

    Args:
        image: (C, D, H, W) float32.
        labels: (1, D, H, W) on the same grid, or None when predicting.
        grid: the working spacing; a 2D grid leaves the first working axis as it is.
        recipe: how channels are normalised and how arrays are turned and resampled.
        label_map: classes whose voxels are listed.
        device: PyTorch device that resamples, with the same numbers; NumPy when None.
        consume: the image is not needed any more, and its memory may become that of the result.

    Raises:
        GeometryError: image and labels differ in shape, or the case would vanish at the
            working spacing.
        InputError: the channels do not fit the recipe.
    """
    prepared = prepare_case(image, labels, recipe=recipe)
    return resample_case(
        prepared, grid=grid, recipe=recipe, label_map=label_map, device=device, consume=consume
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedCase:
    """A case cropped, at its own spacing, in working axis order; normalised as it is read.

    Args:
        raw: (C, d, h, w), a view of the raw image.
        scalings: how each channel is normalised.
        inside: (d, h, w), the voxels that count; None where all do.
        labels: (d, h, w), -1 outside the non-zero region; None without a label image.
        geometry: the grid of the raw image.
        box: the non-zero region in it, in working order.
    """

    raw: NDArray[np.float32]
    scalings: tuple[Scaling, ...]
    inside: NDArray[np.bool_] | None
    labels: NDArray[np.int16] | None
    geometry: Geometry
    box: Box

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels (d, h, w)."""
        return self.raw.shape[1:]

    def planes(self, channel: int, planes: slice) -> NDArray[np.float32]:
        """Return normalised planes (n, h, w) of a channel, as an array of their own."""
        values = np.array(self.raw[channel, planes], order="C")
        inside = None if self.inside is None else self.inside[planes]
        self.scalings[channel].apply(values, inside)
        return values

    def data(self, *, consume: bool = False) -> NDArray[np.float32]:
        """Return the whole normalised image (C, d, h, w), in the raw one's place if that may go."""
        fits = consume and self.raw.flags.c_contiguous and self.raw.flags.writeable
        result = self.raw if fits else np.array(self.raw, order="C")
        for values, scaling in zip(result, self.scalings, strict=True):
            for first in range(0, len(values), PLANES_AT_ONCE):
                planes = slice(first, first + PLANES_AT_ONCE)
                inside = None if self.inside is None else self.inside[planes]
                scaling.apply(values[planes], inside)
        return result


def prepare_case(
    image: Volume, labels: Volume | None, *, recipe: PreprocessingRecipe
) -> PreparedCase:
    """Turn and crop a case, and find how it is normalised: all but the working spacing.

    Args:
        image: (C, D, H, W) float32; not changed.
        labels: (1, D, H, W) on the same grid, or None when predicting.
        recipe: its axis order and channels are used.

    Raises:
        GeometryError: image and labels differ in shape.
        InputError: the channels do not fit the recipe.
    """
    if labels is not None and labels.geometry.shape != image.geometry.shape:
        raise GeometryError(
            f"labels: shape {labels.geometry.shape}, but the image has {image.geometry.shape}. "
            "Resample the label map or remove the case."
        )
    order = (0, *(axis + 1 for axis in recipe.transpose_forward))
    raw = image.array.astype(np.float32, copy=False).transpose(order)
    inside: NDArray[np.bool_] | None = None
    segmentation = None
    if labels is not None or any(channel.use_mask for channel in recipe.channels):
        box, inside = nonzero_region(raw)
    else:
        box = nonzero_box(raw)
    if labels is not None:
        assert inside is not None
        turned = labels.array.transpose(order)[0][box_slices(box)]
        segmentation = np.array(turned, dtype=np.int16, order="C")
        mark_outside(segmentation, inside)
        inside = segmentation >= 0
    cropped = raw[(slice(None), *box_slices(box))]
    return PreparedCase(
        raw=cropped,
        scalings=find_scalings(cropped, inside, recipe.channels),
        inside=inside if any(channel.use_mask for channel in recipe.channels) else None,
        labels=segmentation,
        geometry=image.geometry,
        box=box,
    )


def _require_room(case: PreparedCase, record: UndoRecord) -> None:
    """Refuse what memory does not hold at the working spacing, before anything is allocated.

    A wrong spacing in a header makes a small file a huge one.
    """
    needed = prod(record.working_shape) * len(case.raw) * np.dtype(np.float32).itemsize
    if prod(record.working_shape) <= prod(case.shape) or needed <= available_bytes():
        return
    size, spacing = ("x".join(map(str, values)) for values in (case.shape, record.spacing_mm))
    raise InputError(
        f"{size} voxels of {spacing} mm become {'x'.join(map(str, record.working_shape))} at the "
        f"network's spacing: {needed / 2**30:.1f} GiB, more than is free. Check the spacing in the "
        "header, crop the image, or use a larger machine.",
        code="E_LIMIT_RAM",
    )


def resample_case(
    case: PreparedCase,
    *,
    grid: Grid,
    recipe: PreprocessingRecipe,
    label_map: LabelMap,
    device: str | None = None,
    consume: bool = False,
) -> PreprocessedCase:
    """Bring a prepared case to a working grid.

    Args:
        case: prepared by the same axis order and channels.
        grid: the working spacing; a 2D grid leaves the first working axis as it is.
        recipe: how arrays are resampled.
        label_map: classes whose voxels are listed.
        device: PyTorch device that resamples, with the same numbers; NumPy when None.
        consume: the raw image may be overwritten.

    Raises:
        GeometryError: the case would vanish at the working spacing.
        InputError: it would take more memory there than is free.
    """
    axes, resampled = recipe.transpose_forward, recipe.data.method != "none"
    record = _record(case.geometry, axes, case.box, grid, resampled=resampled)
    _require_room(case, record)
    axis = separate_axis(record.spacing_mm, record.working_spacing_mm, recipe.data.separate_z)
    if case.shape == record.working_shape or device is not None or recipe.data.method != "spline":
        data = case.data(consume=consume)
        data = resample_image(data, record.working_shape, recipe.data, axis, device=device)
    else:
        readers = [partial(case.planes, channel) for channel in range(len(case.raw))]
        data = resample_channels(readers, case.shape, record.working_shape, recipe.data, axis)
    if case.labels is None:
        return PreprocessedCase(data=data, labels=None, record=record, class_locations={})
    axis = separate_axis(record.spacing_mm, record.working_spacing_mm, recipe.labels.separate_z)
    segmentation = resample_labels(
        case.labels, record.working_shape, recipe.labels, axis, device=device
    )
    return PreprocessedCase(
        data=data,
        labels=segmentation[None],
        record=record,
        class_locations=sample_locations(segmentation, label_map),
    )


def _record(
    geometry: Geometry,
    axes: tuple[int, int, int],
    box: tuple[tuple[int, int], ...],
    grid: Grid,
    *,
    resampled: bool,
) -> UndoRecord:
    spacing = _three(tuple(geometry.spacing_mm[axis] for axis in axes))
    # A 2D configuration keeps the distance and number of slices.
    working = grid.spacing_mm if grid.dimension == 3 else (spacing[0], *grid.spacing_mm)
    cropped = _three(tuple(stop - start for start, stop in box))
    shape = resampled_shape(cropped, spacing, working) if resampled else cropped
    if min(shape) < 1:
        raise GeometryError(
            f"case: {cropped} voxels at {spacing} mm become {shape} at {working} mm. "
            "The spacing in the file is probably wrong; correct it.",
            code="E_GEOM_SPACING",
        )
    return UndoRecord(
        geometry=geometry,
        transpose_forward=axes,
        spacing_mm=spacing,
        shape=_three(tuple(geometry.shape[axis] for axis in axes)),
        crop_box=_three(box),
        shape_after_crop=cropped,
        working_spacing_mm=_three(working),
        working_shape=_three(shape),
    )


def _three(values: tuple[T, ...]) -> tuple[T, T, T]:
    first, second, third = values
    return first, second, third
