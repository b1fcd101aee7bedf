import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import label

from medmamba.evaluation.components import (
    component_sizes,
    keep_largest_component,
    label_components,
    largest_component,
)


@given(seed=st.integers(0, 1000), density=st.floats(0.02, 0.5))
def test_components_equal_scipys(seed: int, density: float) -> None:
    mask = np.random.default_rng(seed).random((6, 7, 8)) < density
    numbered, count = label_components(mask)
    expected, expected_count = label(mask, np.ones((3, 3, 3)))
    assert count == expected_count
    np.testing.assert_array_equal(numbered > 0, mask)
    sizes = np.bincount(expected.ravel())[1:]
    assert sorted(component_sizes(mask)) == sorted(sizes)
    if count:
        assert np.count_nonzero(largest_component(mask)) == sizes.max()


def test_corners_connect() -> None:
    mask = np.zeros((2, 2, 2), dtype=bool)
    mask[0, 0, 0] = mask[1, 1, 1] = True
    assert label_components(mask)[1] == 1


def test_values_are_taken_together_and_others_stay() -> None:
    labels = np.zeros((1, 1, 9), dtype=np.uint8)
    labels[0, 0] = [1, 2, 0, 1, 0, 3, 0, 2, 2]
    together = keep_largest_component(labels, (1, 2))
    np.testing.assert_array_equal(together[0, 0], [1, 2, 0, 0, 0, 3, 0, 0, 0])
    alone = keep_largest_component(labels, (2,))
    np.testing.assert_array_equal(alone[0, 0], [1, 0, 0, 1, 0, 3, 0, 2, 2])
    assert labels[0, 0, 3] == 1


def test_an_empty_mask_stays_empty() -> None:
    assert not largest_component(np.zeros((2, 3, 4), dtype=bool)).any()
