"""The PyTorch path gives the NumPy path's numbers; what runs on a GPU runs here on the CPU."""

import numpy as np
import pytest

from medmamba.preprocessing.recipe import ResamplingRecipe
from medmamba.preprocessing.resample import resample_image, resample_labels

SHAPES = [((9, 17, 12), (14, 11, 12)), ((5, 20, 21), (12, 31, 14)), ((1, 8, 8), (1, 13, 5))]


@pytest.mark.parametrize(("old", "new"), SHAPES)
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_images_are_the_same(
    old: tuple[int, int, int], new: tuple[int, int, int], axis: int | None
) -> None:
    image = np.random.RandomState(1).normal(size=(2, *old)).astype(np.float32)
    for recipe in (ResamplingRecipe(order=3), ResamplingRecipe(order=1, order_z=1)):
        expected = resample_image(image, new, recipe, axis)
        found = resample_image(image, new, recipe, axis, device="cpu")
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("old", "new"), SHAPES)
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_labels_are_the_same_ties_included(
    old: tuple[int, int, int], new: tuple[int, int, int], axis: int | None
) -> None:
    labels = np.random.RandomState(2).randint(-1, 4, size=old).astype(np.int16)
    recipe = ResamplingRecipe(order=1)
    # Twice as fine, every other sample lies half way: ties everywhere.
    for shape in (new, tuple(2 * size for size in old)):
        expected = resample_labels(labels, shape, recipe, axis)
        found = resample_labels(labels, shape, recipe, axis, device="cpu")
        assert found.dtype == labels.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.gpu
def test_a_gpu_gives_the_cpus_numbers() -> None:
    random = np.random.RandomState(3)
    image = random.normal(size=(1, 30, 61, 47)).astype(np.float32)
    labels = random.randint(-1, 4, size=(30, 61, 47)).astype(np.int16)
    shape = (45, 50, 80)
    expected = resample_image(image, shape, ResamplingRecipe(order=3))
    found = resample_image(image, shape, ResamplingRecipe(order=3), device="cuda")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    recipe = ResamplingRecipe(order=1)
    expected_labels = resample_labels(labels, shape, recipe)
    assert np.array_equal(resample_labels(labels, shape, recipe, device="cuda"), expected_labels)
