import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medmamba.errors import PlanError
from medmamba.preprocessing.recipe import ResamplingRecipe
from medmamba.preprocessing.resample import resample_image, resample_labels, separate_axis

SIZES = st.tuples(*[st.integers(1, 18)] * 3)
CUBIC, LINEAR = ResamplingRecipe(order=3), ResamplingRecipe(order=1)


def zoomed(values: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    factors = [new / old for new, old in zip(shape, values.shape, strict=True)]
    result = ndimage.zoom(values, factors, order=order, mode="nearest", grid_mode=True)
    return np.clip(result, values.min(), values.max())


@settings(max_examples=40, deadline=None)
@given(old=SIZES, new=SIZES, order=st.sampled_from([1, 3]), seed=st.integers(0, 99))
def test_splines_equal_scipys_zoom(
    old: tuple[int, ...], new: tuple[int, ...], order: int, seed: int
) -> None:
    values = np.random.default_rng(seed).normal(size=old).astype(np.float32)
    expected = zoomed(values.astype(np.float64), new, order)
    found = resample_image(values[None], new, ResamplingRecipe(order=order))
    np.testing.assert_allclose(found[0], expected, atol=2e-6)


@settings(max_examples=25, deadline=None)
@given(old=SIZES, new=SIZES, axis=st.integers(0, 2), seed=st.integers(0, 99))
def test_a_separate_axis_is_resampled_slice_by_slice(
    old: tuple[int, ...], new: tuple[int, ...], axis: int, seed: int
) -> None:
    values = np.random.default_rng(seed).normal(size=old)
    plane = tuple(size for position, size in enumerate(new) if position != axis)
    slices = np.stack([zoomed(s, plane, 3) for s in np.moveaxis(values, axis, 0)])
    coordinates = (np.arange(new[axis]) + 0.5) * (old[axis] / new[axis]) - 0.5
    picked = np.clip(np.floor(coordinates + 0.5).astype(int), 0, old[axis] - 1)
    expected = np.moveaxis(slices[picked], 0, axis)
    found = resample_image(values[None].astype(np.float32), new, CUBIC, axis)
    np.testing.assert_allclose(found[0], expected, atol=5e-6)


@settings(max_examples=40, deadline=None)
@given(
    old=SIZES, new=SIZES, axis=st.sampled_from([None, 0, 1, 2]), labels=st.integers(2, 4),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_labels_are_voted_for_as_scores_per_label_say(
    old: tuple[int, ...], new: tuple[int, ...], axis: int | None, labels: int, seed: int
) -> None:
    values = np.random.default_rng(seed).integers(-1, labels, size=old).astype(np.int16)
    found = resample_labels(values, new, LINEAR, axis)
    if axis is None:
        expected = voted(values, new)
    else:
        coordinates = (np.arange(new[axis]) + 0.5) * (old[axis] / new[axis]) - 0.5
        picked = np.clip(np.floor(coordinates + 0.5).astype(int), 0, old[axis] - 1)
        plane = tuple(size for position, size in enumerate(new) if position != axis)
        slices = np.moveaxis(np.take(values, picked, axis), axis, 0)
        expected = np.moveaxis(np.stack([voted(s, plane) for s in slices]), 0, axis)
    np.testing.assert_array_equal(found, expected)


def voted(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The rule in its plainest form: a score per label, ties to the nearest, then the smallest."""
    if values.shape == shape:
        return values
    present = np.unique(values)
    factors = [new / old for new, old in zip(shape, values.shape, strict=True)]
    scores = np.stack([zoomed((values == label).astype(float), shape, 1) for label in present])
    nearest = ndimage.zoom(values, factors, order=0, mode="nearest", grid_mode=True)
    tied = scores == scores.max(axis=0)
    winner = present[np.argmax(tied, axis=0)]
    nearest_is_tied = np.take_along_axis(tied, np.searchsorted(present, nearest)[None], 0)[0]
    return np.where(nearest_is_tied, nearest, winner)


@pytest.mark.parametrize("order", [0, 3])
def test_other_label_orders_keep_a_large_region(order: int) -> None:
    labels = np.zeros((12, 12, 12), np.int16)
    labels[3:9, 3:9, 3:9] = 2
    found = resample_labels(labels, (24, 24, 24), ResamplingRecipe(order=order))
    assert set(np.unique(found)) == {0, 2}
    assert np.all(found[8:16, 8:16, 8:16] == 2)
    assert not found[:5].any()


def test_no_overshoot_beyond_the_input() -> None:
    step = np.zeros((1, 8, 8, 8), np.float32)
    step[:, 4:] = 1.0
    found = resample_image(step, (17, 8, 8), CUBIC)
    assert found.min() == 0.0
    assert found.max() == 1.0


def test_equal_shapes_are_returned_untouched() -> None:
    image = np.random.default_rng(1).normal(size=(2, 5, 6, 7)).astype(np.float32)
    assert resample_image(image, (5, 6, 7), CUBIC) is image


def test_unknown_orders_and_methods_are_errors() -> None:
    image = np.zeros((1, 4, 4, 4), np.float32)
    with pytest.raises(PlanError, match="order 2"):
        resample_image(image, (8, 8, 8), ResamplingRecipe(order=2))
    with pytest.raises(PlanError, match="fourier"):
        resample_image(image, (8, 8, 8), ResamplingRecipe(order=3, method="fourier"))


@pytest.mark.parametrize(
    ("current", "new", "force", "expected"),
    [
        ((5.0, 1.0, 1.0), (1.0, 1.0, 1.0), None, 0),
        ((1.0, 1.0, 1.0), (1.0, 4.0, 1.0), None, 1),
        ((3.0, 1.0, 1.0), (1.0, 1.0, 1.0), None, None),
        ((5.0, 5.0, 1.0), (1.0, 1.0, 1.0), None, None),
        ((5.0, 1.0, 1.0), (1.0, 1.0, 1.0), False, None),
        ((1.0, 1.0, 1.5), (1.0, 1.0, 1.0), True, 2),
    ],
)
def test_which_axis_is_separate(
    current: tuple[float, ...],
    new: tuple[float, ...],
    force: bool | None,
    expected: int | None,
) -> None:
    assert separate_axis(current, new, force) == expected


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
@pytest.mark.parametrize("order_z", [0, 1, 3])
@pytest.mark.parametrize("new", [(90, 9, 13), (17, 30, 11), (61, 14, 9), (61, 9, 11)])
def test_slabs_of_planes_do_not_show(monkeypatch: pytest.MonkeyPatch, new, order_z, axis) -> None:
    values = np.random.default_rng(5).normal(size=(1, 61, 14, 11)).astype(np.float32)
    recipe = ResamplingRecipe(order=3, order_z=order_z)
    whole = resample_image(values, new, recipe, axis)
    monkeypatch.setattr("medmamba.preprocessing.resample_planes.SOURCE_BYTES", 8 * 14 * 11 * 3)
    np.testing.assert_allclose(resample_image(values, new, recipe, axis), whole, atol=1e-6)
