"""How large labels are in the cases that a model is trained on; predictions are judged by it."""

from collections.abc import Sequence
from math import prod

import numpy as np

from medmamba.labels import LabelMap, UsualVolume
from medmamba.preprocessing.store import CaseStore

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
