import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from medmamba.inference.tiling import (
    flip_sets,
    importance_map,
    padding_to,
    tile_origins,
    tile_starts,
)


@pytest.fixture(scope="module")
def rules(fixtures_dir: Path) -> dict:
    path = fixtures_dir / "preprocess" / "rules" / "geometry.json"
    if not path.is_file():
        pytest.skip(f"no {path.name} under {fixtures_dir}")
    return json.loads(path.read_text())


def test_tile_starts_equal_the_golden_ones(rules: dict) -> None:
    assert rules["sliding_window_starts"]
    for row in rules["sliding_window_starts"]:
        found = [
            list(tile_starts(size, patch, row["step"]))
            for size, patch in zip(row["image_size"], row["tile_size"], strict=True)
        ]
        assert found == row["starts"]


def test_importance_map_equals_the_golden_line(rules: dict) -> None:
    assert rules["gaussian"]
    for row in rules["gaussian"]:
        weights = importance_map(tuple(row["tile"]))
        centre = tuple(row["centre_index"])
        line = weights[(slice(None), *centre[1:])]
        expected = np.array(row["line_axis0"], dtype=np.float16)
        one_ulp = np.spacing(expected)
        close = np.abs(line.astype(float) - expected) <= np.maximum(1e-3 * expected, one_ulp)
        assert close.all()
        assert weights[centre] == row["max"]
        assert abs(float(weights.min()) - row["min"]) <= np.spacing(np.float16(row["min"]))
        assert float(weights.astype(np.float64).sum()) == pytest.approx(row["sum"], rel=1e-3)


@pytest.mark.parametrize("patch_size", [(7, 12, 9), (16, 5), (1, 8, 8)])
def test_importance_map_is_scipys_gaussian_of_a_delta(patch_size: tuple[int, ...]) -> None:
    delta = np.zeros(patch_size)
    delta[tuple(size // 2 for size in patch_size)] = 1
    smooth = gaussian_filter(delta, [size / 8 for size in patch_size], mode="constant")
    smooth *= 10 / smooth.max()
    expected = smooth.astype(np.float16)
    weights = importance_map(patch_size)
    present = expected > 0
    np.testing.assert_allclose(weights[present], expected[present], rtol=1e-3, atol=1e-7)
    assert (weights[~present] == expected[present].min()).all()


@given(
    patch=st.integers(1, 200),
    extra=st.integers(0, 600),
    step=st.sampled_from([0.25, 0.5, 0.6, 0.8, 1.0]),
)
def test_tiles_cover_the_axis_and_stay_inside(patch: int, extra: int, step: float) -> None:
    size = patch + extra
    starts = tile_starts(size, patch, step)
    assert starts[0] == 0
    assert starts[-1] == size - patch
    gaps = np.diff(starts)
    assert (gaps <= np.ceil(patch * step)).all()
    assert (gaps > 0).all() or len(starts) == 1 or patch * step < 1


def test_a_patch_larger_than_the_axis_is_refused() -> None:
    with pytest.raises(ValueError, match="padded"):
        tile_starts(7, 8, 0.5)


def test_two_dimensional_patches_tile_every_slice() -> None:
    origins = tile_origins((3, 8, 12), (8, 8), 0.5)
    assert origins == ((0, 0, 0), (0, 0, 4), (1, 0, 0), (1, 0, 4), (2, 0, 0), (2, 0, 4))


def test_padding_centres_and_puts_the_odd_voxel_last() -> None:
    assert padding_to((5, 9, 8), (8, 8, 8)) == ((1, 2), (0, 0), (0, 0))
    assert padding_to((3, 5, 8), (8, 8)) == ((0, 0), (1, 2), (0, 0))


def test_flip_sets_start_with_the_plain_pass() -> None:
    assert flip_sets(()) == ((),)
    assert flip_sets((0, 2)) == ((), (0,), (2,), (0, 2))
    assert len(flip_sets((0, 1, 2))) == 8
