"""The cascade: labels of the coarse network as further channels of the fine one.

Legend: (d, h, w) voxels of the fine working grid, n foreground values.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba.labels import LabelMap
from medmamba.preprocessing.crop import box_slices
from medmamba.preprocessing.pipeline import UndoRecord
from medmamba.preprocessing.recipe import PreprocessingRecipe
from medmamba.preprocessing.resample import resample_labels, separate_axis
from medmamba.preprocessing.restore import restore_labels
from medmamba.volume import Geometry


def one_hot(labels: NDArray[np.integer[Any]], values: Sequence[int]) -> NDArray[np.float32]:
    """Return (n, d, h, w): one channel per value, 1 where the label has it."""
    return np.stack([labels == value for value in values]).astype(np.float32)


def labels_on_working_grid(
    labels: NDArray[np.integer[Any]], record: UndoRecord, recipe: PreprocessingRecipe
) -> NDArray[np.int16]:
    """Bring labels (D, H, W) of the raw grid to a case's working grid, as its own labels were."""
    turned = labels.transpose(record.transpose_forward)[box_slices(record.crop_box)]
    axis = separate_axis(record.spacing_mm, record.working_spacing_mm, recipe.labels.separate_z)
    cropped = np.array(turned, dtype=np.int16, order="C")
    return resample_labels(cropped, record.working_shape, recipe.labels, axis)


def labels_between_grids(
    logits: Any,
    coarse: UndoRecord,
    fine: UndoRecord,
    recipe: PreprocessingRecipe,
    label_map: LabelMap,
) -> NDArray[np.unsignedinteger[Any]]:
    """Turn logits (K, ...) on a case's coarse working grid into labels (d, h, w) on its fine one.

    Both come from one raw image and one crop, so nothing need go through the raw grid.
    """
    shape = fine.working_shape
    between = UndoRecord(
        geometry=Geometry.from_spacing(shape, fine.working_spacing_mm),
        transpose_forward=(0, 1, 2),
        spacing_mm=fine.working_spacing_mm,
        shape=shape,
        crop_box=((0, shape[0]), (0, shape[1]), (0, shape[2])),
        shape_after_crop=shape,
        working_spacing_mm=coarse.working_spacing_mm,
        working_shape=coarse.working_shape,
    )
    return restore_labels(logits, between, recipe, label_map)
