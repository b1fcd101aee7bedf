"""What a model remembers of its training images: how large labels are, and how they are stored.

Predictions are judged by the one and prepared by the other.
"""

from collections.abc import Sequence
from math import prod

import numpy as np

from medmamba.io import orientation_code
from medmamba.labels import LabelMap, UsualVolume
from medmamba.preprocessing.store import CaseStore
from medmamba.volume import Geometry

USUAL_PERCENTILES = (1.0, 99.0)


def measure_usual_volumes(
    store: CaseStore, cases: Sequence[str], label_map: LabelMap
) -> dict[str, UsualVolume]:
    """Measure every label and region in preprocessed cases, on their working grids.

    Args:
        store: preprocessed cases with labels.
        cases: which of them.
        label_map: the labels.
    """
    values = label_map.all_values
    volumes: dict[str, list[float]] = {name: [] for name in label_map.foreground}
    for case_id in cases:
        stored = store.open(case_id)
        if stored.labels is None:
            continue
        inside = np.maximum(stored.labels[:].reshape(-1), 0)
        counts = np.bincount(inside, minlength=values[-1] + 1)
        voxel_ml = prod(stored.record.working_spacing_mm) / 1000
        for name, members in label_map.foreground.items():
            volumes[name].append(float(counts[list(members)].sum()) * voxel_ml)
    return {
        name: UsualVolume(
            low_ml=round(float(np.percentile(found, USUAL_PERCENTILES[0])), 6),
            high_ml=round(float(np.percentile(found, USUAL_PERCENTILES[1])), 6),
            cases=len(found),
        )
        for name, found in volumes.items()
        if found
    }


def common_orientation(store: CaseStore, cases: Sequence[str]) -> str:
    """Return where the stored axes of the images point, such as ``LPS``; empty where they differ.

    Empty too where images lie at the origin and turned in no way, as those do that somebody
    preprocessed without keeping where they were.

    Args:
        store: preprocessed cases.
        cases: which of them.
    """
    grids = [store.open(case_id).record.geometry for case_id in cases]
    if any(grid == Geometry.from_spacing(grid.shape, grid.spacing_mm) for grid in grids):
        return ""
    codes = set(map(orientation_code, grids))
    return codes.pop() if len(codes) == 1 else ""
