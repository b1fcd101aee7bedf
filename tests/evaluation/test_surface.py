import importlib.util

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from medmamba.evaluation.surface import element_sizes, score_surfaces, union_box

ORACLE = importlib.util.find_spec("surface_distance") is not None


def blob(shape: tuple[int, ...], seed: int, level: float = 0.0) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(shape)
    smooth = gaussian_filter(noise, [min(2.0, size / 8) for size in shape])
    return smooth > level * smooth.std()


def test_a_shifted_cube_is_as_far_as_it_was_shifted() -> None:
    reference = np.zeros((20, 20, 20), dtype=bool)
    reference[5:12, 5:12, 5:12] = True
    shifted = np.roll(reference, 2, axis=0)
    scores = score_surfaces(reference, shifted, spacing_mm=(1.5, 1.0, 1.0), tolerance_mm=3.0)
    assert scores.hd95_mm == pytest.approx(3.0)
    assert scores.nsd == pytest.approx(1.0)
    assert (
        score_surfaces(reference, shifted, spacing_mm=(1.5, 1.0, 1.0), tolerance_mm=1.0).nsd < 0.9
    )


def test_identical_masks_are_perfect_and_empty_ones_undefined() -> None:
    mask = blob((8, 9, 7), 1)
    empty = np.zeros_like(mask)
    same = score_surfaces(mask, mask, spacing_mm=(1, 1, 1), tolerance_mm=0.0)
    assert (same.hd95_mm, same.nsd) == (0.0, 1.0)
    one = score_surfaces(mask, empty, spacing_mm=(1, 1, 1), tolerance_mm=1.0)
    assert (one.hd95_mm, one.nsd) == (float("inf"), 0.0)
    none = score_surfaces(empty, empty, spacing_mm=(1, 1, 1), tolerance_mm=1.0)
    assert np.isnan(none.hd95_mm)
    assert np.isnan(none.nsd)


def test_a_slice_is_scored_by_its_contour() -> None:
    reference = np.zeros((1, 30, 30), dtype=bool)
    reference[0, 5:20, 5:20] = True
    inner = np.zeros_like(reference)
    inner[0, 8:17, 8:17] = True
    scores = score_surfaces(reference, inner, spacing_mm=(5.0, 0.5, 0.5), tolerance_mm=0.5)
    # Corners of the squares are further apart than their sides.
    assert 1.5 <= scores.hd95_mm <= 1.5 * np.sqrt(2)
    assert scores.nsd == 0.0


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(st.integers(1, 14), st.integers(2, 14), st.integers(2, 14)),
    tolerance=st.floats(0.0, 4.0),
)
def test_scores_are_symmetric_and_grow_with_tolerance(
    seed: int, shape: tuple[int, ...], tolerance: float
) -> None:
    first, second = blob(shape, seed), blob(shape, seed + 1)
    spacing = (2.0, 1.0, 0.5)
    one = score_surfaces(first, second, spacing_mm=spacing, tolerance_mm=tolerance)
    other = score_surfaces(second, first, spacing_mm=spacing, tolerance_mm=tolerance)
    np.testing.assert_allclose([one.hd95_mm, one.nsd], [other.hd95_mm, other.nsd])
    wider = score_surfaces(first, second, spacing_mm=spacing, tolerance_mm=tolerance + 1)
    assert np.isnan(one.nsd) or 0 <= one.nsd <= wider.nsd <= 1 + 1e-12


def test_the_union_box_is_tight() -> None:
    mask = np.zeros((5, 6, 7), dtype=bool)
    mask[1, 2, 3] = True
    other = np.zeros_like(mask)
    other[3, 2, 5] = True
    assert union_box(mask, other) == ((1, 4), (2, 3), (3, 6))
    assert union_box(np.zeros((2, 2), dtype=bool)) == ((0, 0), (0, 0))


def test_element_sizes_add_up_to_the_faces_of_a_box() -> None:
    sizes = element_sizes((2.0, 3.0, 5.0))
    upper_half = sum(1 << bit for bit in range(4))
    assert sizes[upper_half] == pytest.approx(15.0)
    assert sizes[0] == sizes[255] == 0
    lengths = element_sizes((3.0, 5.0))
    assert lengths[0b0011] == pytest.approx(5.0)
    assert lengths[0b0101] == pytest.approx(3.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the oracle itself
@pytest.mark.skipif(not ORACLE, reason="surface-distance is not installed")
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 0.7, 0.9)])
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_surface_distance_package(seed: int, spacing: tuple[float, ...]) -> None:
    import surface_distance

    reference, prediction = blob((14, 20, 17), seed, 0.3), blob((14, 20, 17), seed + 50, 0.5)
    distances = surface_distance.compute_surface_distances(reference, prediction, spacing)
    scores = score_surfaces(reference, prediction, spacing_mm=spacing, tolerance_mm=1.0)
    assert scores.hd95_mm == pytest.approx(
        surface_distance.compute_robust_hausdorff(distances, 95), rel=1e-9
    )
    assert scores.nsd == pytest.approx(
        surface_distance.compute_surface_dice_at_tolerance(distances, 1.0), rel=1e-9
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the oracle itself
@pytest.mark.skipif(not ORACLE, reason="surface-distance is not installed")
def test_contours_equal_the_surface_distance_package() -> None:
    import surface_distance

    reference, prediction = blob((30, 26), 3), blob((30, 26), 4)
    distances = surface_distance.compute_surface_distances(reference, prediction, (0.5, 0.8))
    scores = score_surfaces(
        reference[None], prediction[None], spacing_mm=(4.0, 0.5, 0.8), tolerance_mm=1.0
    )
    assert scores.hd95_mm == pytest.approx(
        surface_distance.compute_robust_hausdorff(distances, 95), rel=1e-9
    )
    assert scores.nsd == pytest.approx(
        surface_distance.compute_surface_dice_at_tolerance(distances, 1.0), rel=1e-9
    )
