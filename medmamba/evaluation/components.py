"""Connected components of masks; the door of connected-components-3d.

Voxels that touch by a corner belong together (26 neighbours, 8 in a slice), as in nnU-Net.
"""

from collections.abc import Iterable

import cc3d  # noqa: TID251
import numpy as np
from numpy.typing import NDArray

CONNECTIVITY = 26


def label_components(mask: NDArray[np.bool_]) -> tuple[NDArray[np.unsignedinteger], int]:
    """Return an array that numbers the components from 1 in scan order, and their count."""
    numbered, count = cc3d.connected_components(
        np.ascontiguousarray(mask, dtype=np.uint8), connectivity=CONNECTIVITY, return_N=True
    )
    return numbered, int(count)


def component_sizes(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the number of voxels of every component, in scan order."""
    numbered, count = label_components(mask)
    return np.bincount(numbered.ravel(), minlength=count + 1)[1:]


def largest_component(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the largest component alone; of equal ones, the first in scan order."""
    numbered, count = label_components(mask)
    if count < 2:
        return mask.astype(bool)
    sizes = np.bincount(numbered.ravel())[1:]
    kept: NDArray[np.bool_] = numbered == np.argmax(sizes) + 1
    return kept


def keep_largest_component(
    labels: NDArray[np.integer], values: Iterable[int], *, background: int = 0
) -> NDArray[np.integer]:
    """Return a copy in which ``values``, taken together, keep only their largest component."""
    mask = np.isin(labels, list(values))
    cleaned = labels.copy()
    cleaned[mask & ~largest_component(mask)] = background
    return cleaned
