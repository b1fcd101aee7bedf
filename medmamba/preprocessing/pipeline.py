"""From a raw case to the array a network sees: transpose, crop, normalise, resample.

Each step leaves what is needed to undo it in an `UndoRecord`; undoing is in
``medmamba.preprocessing.restore``. Whole datasets are preprocessed by
``medmamba.preprocessing.batch``.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from medmamba.errors import GeometryError
from medmamba.files import RECORD_CONFIG
from medmamba.labels import LabelMap
from medmamba.preprocessing.crop import OUTSIDE, box_slices, mark_outside, nonzero_region
from medmamba.preprocessing.locations import ClassLocations, sample_locations
from medmamba.preprocessing.normalize import normalize
from medmamba.preprocessing.recipe import PreprocessingRecipe
from medmamba.preprocessing.resample import (
    resample_image,
    resample_labels,
    resampled_shape,
    separate_axis,
)
from medmamba.volume import Box, Geometry, Grid, Volume

T = TypeVar("T")
Shape3 = tuple[int, int, int]
Spacing3 = tuple[float, float, float]


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
) -> PreprocessedCase:
    """Bring one case to the working grid.

    The scheme is nnU-Net's, step by step (Isensee et al. 2021, supplementary note 2).

    Args:
        image: (C, D, H, W); not changed.
        labels: (1, D, H, W) on the same grid, or None when predicting.
        grid: the working spacing; a 2D grid leaves the first working axis as it is.
        recipe: how channels are normalised and how arrays are turned and resampled.
        label_map: classes whose voxels are listed.
        device: PyTorch device that resamples, with the same numbers; NumPy when None.

    Raises:
        GeometryError: image and labels differ in shape, or the case would vanish at the
            working spacing.
        InputError: the channels do not fit the recipe.
    """
    prepared = prepare_case(image, labels, recipe=recipe)
    return resample_case(prepared, grid=grid, recipe=recipe, label_map=label_map, device=device)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedCase:
    """A case cropped and normalised, at its own spacing, in working axis order.

    Args:
        data: (C, d, h, w); never changed by what is made from it.
        labels: (d, h, w), -1 outside the non-zero region.
        has_labels: whether ``labels`` hold more than that region.
        geometry: the grid of the raw image.
        box: the non-zero region in it, in working order.
    """

    data: NDArray[np.float32]
    labels: NDArray[np.int16]
    has_labels: bool
    geometry: Geometry
    box: Box


def prepare_case(
    image: Volume, labels: Volume | None, *, recipe: PreprocessingRecipe
) -> PreparedCase:
    """Turn, crop and normalise a case: what does not depend on the working spacing.

    Args:
        image: (C, D, H, W); not changed.
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
    box, mask = nonzero_region(raw)
    inside = box_slices(box)
    # A copy in working order: normalisation works in place.
    data = np.array(raw[(slice(None), *inside)], order="C")
    segmentation = _labels_in_box(labels, order, inside, mask)
    normalize(data, segmentation >= 0, recipe.channels)
    return PreparedCase(
        data=data,
        labels=segmentation,
        has_labels=labels is not None,
        geometry=image.geometry,
        box=box,
    )


def resample_case(
    case: PreparedCase,
    *,
    grid: Grid,
    recipe: PreprocessingRecipe,
    label_map: LabelMap,
    device: str | None = None,
) -> PreprocessedCase:
    """Bring a prepared case to a working grid.

    Args:
        case: prepared by the same axis order and channels.
        grid: the working spacing; a 2D grid leaves the first working axis as it is.
        recipe: how arrays are resampled.
        label_map: classes whose voxels are listed.
        device: PyTorch device that resamples, with the same numbers; NumPy when None.

    Raises:
        GeometryError: the case would vanish at the working spacing.
    """
    axes, resampled = recipe.transpose_forward, recipe.data.method != "none"
    record = _record(case.geometry, axes, case.box, grid, resampled=resampled)
    axis = separate_axis(record.spacing_mm, record.working_spacing_mm, recipe.data.separate_z)
    data = resample_image(case.data, record.working_shape, recipe.data, axis, device=device)
    if not case.has_labels:
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


def _labels_in_box(
    labels: Volume | None,
    order: tuple[int, ...],
    inside: tuple[slice, ...],
    mask: NDArray[np.bool_],
) -> NDArray[np.int16]:
    if labels is None:
        return np.where(mask, np.int16(0), np.int16(OUTSIDE))
    turned = labels.array.transpose(order)[0]
    segmentation = np.array(turned[inside], dtype=np.int16, order="C")
    mark_outside(segmentation, mask)
    return segmentation


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
