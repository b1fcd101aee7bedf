import numpy as np
import pytest

from medmamba.labels import LabelMap
from medmamba.preprocessing import locations
from medmamba.preprocessing.locations import class_keys, sample_locations

CLASSES = LabelMap(values={"background": (0,), "a": (1,), "b": (2,)})
REGIONS = LabelMap(values={"background": (0,), "whole": (1, 2), "core": (2,)}, region_order=(1, 2))
IGNORING = LabelMap(values={"background": (0,), "a": (1,), "ignore": (2,)})


def test_which_groups_are_stored() -> None:
    assert class_keys(CLASSES) == ((1,), (2,))
    assert class_keys(REGIONS) == ((1, 2), (2,))
    assert class_keys(IGNORING) == ((1,), (-1, 0, 1))


def test_samples_lie_in_their_class_and_none_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "MOST_LOCATIONS", 10)
    labels = np.random.default_rng(0).integers(0, 3, (20, 21, 22)).astype(np.int16)
    for label_map in (CLASSES, REGIONS):
        found = sample_locations(labels, label_map)
        for key, where in found.items():
            total = np.isin(labels, key).sum()
            assert len(where) == max(10, int(np.ceil(0.01 * total)))
            assert np.isin(labels[tuple(where.T)], key).all()
            assert len(np.unique(where, axis=0)) == len(where)


def test_an_absent_class_has_an_empty_list_and_samples_repeat_exactly() -> None:
    labels = np.zeros((4, 4, 4), np.int16)
    labels[1] = 1
    first, second = sample_locations(labels, CLASSES), sample_locations(labels, CLASSES)
    assert first[(2,)].shape == (0, 3)
    np.testing.assert_array_equal(first[(1,)], second[(1,)])
