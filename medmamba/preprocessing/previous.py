"""The cascade: labels of the coarse network on the grid of the fine one.

Legend: (d, h, w) voxels of the fine working grid.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba.preprocessing.crop import box_slices
from medmamba.preprocessing.pipeline import UndoRecord
from medmamba.preprocessing.recipe import PreprocessingRecipe
from medmamba.preprocessing.resample import resample_labels, separate_axis
from medmamba.volume import Geometry


def labels_on_working_grid(
    labels: NDArray[np.integer[Any]], record: UndoRecord, recipe: PreprocessingRecipe
) -> NDArray[np.int16]:
    """Bring labels (D, H, W) of the raw grid to a case's working grid, as its own labels were."""
    turned = labels.transpose(record.transpose_forward)[box_slices(record.crop_box)]
    axis = separate_axis(record.spacing_mm, record.working_spacing_mm, recipe.labels.separate_z)
    cropped = np.array(turned, dtype=np.int16, order="C")
    return resample_labels(cropped, record.working_shape, recipe.labels, axis)


def between_grids(coarse: UndoRecord, fine: UndoRecord) -> UndoRecord:
    """Return what turns logits on a case's coarse working grid into labels on its fine one.

    Both come from one raw image and one crop, so nothing need go through the raw grid.
    """
    shape = fine.working_shape
    return UndoRecord(
        geometry=Geometry.from_spacing(shape, fine.working_spacing_mm),
        transpose_forward=(0, 1, 2),
        spacing_mm=fine.working_spacing_mm,
        shape=shape,
        crop_box=((0, shape[0]), (0, shape[1]), (0, shape[2])),
        shape_after_crop=shape,
        working_spacing_mm=coarse.working_spacing_mm,
        working_shape=coarse.working_shape,
    )
