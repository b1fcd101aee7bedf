"""Where the voxels of each class are, so that training can centre patches on them."""

import numpy as np
from numpy.typing import NDArray

from medmamba.labels import LabelMap
from medmamba.preprocessing.crop import OUTSIDE

MOST_LOCATIONS = 10_000
"""nnU-Net's number of stored voxels per class."""

LEAST_FRACTION = 0.01
"""nnU-Net keeps at least this part of a class, however large it is."""

SEED = 1234

ClassKey = tuple[int, ...]
ClassLocations = dict[ClassKey, NDArray[np.int32]]


def class_keys(label_map: LabelMap) -> tuple[ClassKey, ...]:
    """List the groups of label values whose voxels are stored.

    Every foreground class or region; with an ignore label also everything that is annotated.
    """
    if label_map.has_regions:
        keys = list(label_map.foreground.values())
    else:
        keys = [(value,) for value in label_map.foreground_values]
    ignore = label_map.ignore_value
    if ignore is not None:
        annotated = tuple(value for value in label_map.all_values if value != ignore)
        keys.append((OUTSIDE, *annotated))
    return tuple(keys)


def sample_locations(labels: NDArray[np.int16], label_map: LabelMap) -> ClassLocations:
    """Draw voxels of each class without replacement, the same ones for the same labels.

    Args:
        labels: (D, H, W).
        label_map: what the values mean.

    Returns:
        Class key -> (n, 3) voxel indices; n = 0 for a class that is absent.
    """
    random = np.random.RandomState(SEED)
    flat = labels.reshape(-1)
    locations: ClassLocations = {}
    for key in class_keys(label_map):
        # Label after label in the order of the key, so that nnU-Net would draw the same voxels.
        where = np.concatenate([np.flatnonzero(flat == value) for value in key])
        count = max(min(MOST_LOCATIONS, where.size), int(np.ceil(LEAST_FRACTION * where.size)))
        chosen = where[random.choice(where.size, count, replace=False)] if count else where
        locations[key] = np.stack(np.unravel_index(chosen, labels.shape), axis=1).astype(np.int32)
    return locations
