import numpy as np
import pytest

from medmamba.errors import InputError, PlanError
from medmamba.preprocessing.normalize import find_scalings
from medmamba.preprocessing.recipe import ChannelRecipe, ChannelStatistics, Normalization

STATISTICS = ChannelStatistics(
    mean=10.0, median=9.0, std=4.0, min=-5.0, max=99.0, percentile_00_5=0.0, percentile_99_5=30.0
)


def image(channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).normal(50, 20, (channels, 6, 7, 8)).astype(np.float32)


def run(values: np.ndarray, *recipes: ChannelRecipe, inside: np.ndarray | None = None) -> None:
    mask = np.ones(values.shape[1:], bool) if inside is None else inside
    scalings = find_scalings(values, mask, recipes)
    for channel, scaling in zip(values, scalings, strict=True):
        for plane, planes in enumerate(channel):
            scaling.apply(planes, mask[plane])


def test_zscore_of_all_voxels() -> None:
    values = image()
    run(values, ChannelRecipe(normalization=Normalization.ZSCORE))
    assert values.mean() == pytest.approx(0, abs=1e-6)
    assert values.std() == pytest.approx(1, abs=1e-6)


def test_zscore_inside_a_mask_leaves_the_outside() -> None:
    values = image()
    before = values.copy()
    inside = np.zeros(values.shape[1:], bool)
    inside[2:5] = True
    run(values, ChannelRecipe(normalization=Normalization.ZSCORE, use_mask=True), inside=inside)
    np.testing.assert_array_equal(values[0][~inside], before[0][~inside])
    assert values[0][inside].mean() == pytest.approx(0, abs=1e-6)


def test_an_empty_mask_changes_nothing() -> None:
    values = np.zeros((1, 2, 2, 2), np.float32)
    recipe = ChannelRecipe(normalization=Normalization.ZSCORE, use_mask=True)
    run(values, recipe, inside=np.zeros((2, 2, 2), bool))
    assert not values.any()


def test_a_constant_image_stays_finite() -> None:
    for scheme in (Normalization.ZSCORE, Normalization.RESCALE_0_1):
        values = np.full((1, 3, 3, 3), 7.0, np.float32)
        run(values, ChannelRecipe(normalization=scheme))
        assert not values.any()


def test_ct_clips_and_scales_by_the_datasets_statistics() -> None:
    values = np.array([[[[-100.0, 0.0, 10.0, 500.0]]]], np.float32)
    run(values, ChannelRecipe(normalization=Normalization.CT, statistics=STATISTICS))
    assert values.ravel().tolist() == [-2.5, -2.5, 0.0, 5.0]


def test_every_channel_has_its_own_scheme() -> None:
    values = np.stack([np.linspace(0, 255, 8).reshape(2, 2, 2)] * 3).astype(np.float32)
    original = values.copy()
    run(
        values,
        ChannelRecipe(normalization=Normalization.RGB_0_1),
        ChannelRecipe(normalization=Normalization.NONE),
        ChannelRecipe(normalization=Normalization.RESCALE_0_1),
    )
    assert values[0].max() == pytest.approx(1.0)
    np.testing.assert_array_equal(values[1], original[1])
    assert (values[2].min(), values[2].max()) == (0.0, 1.0)


def test_what_a_scheme_needs_must_be_there() -> None:
    with pytest.raises(InputError, match="0 to 255"):
        run(image() * 100, ChannelRecipe(normalization=Normalization.RGB_0_1))
    with pytest.raises(PlanError, match="without intensity statistics"):
        run(image(), ChannelRecipe(normalization=Normalization.CT))
    with pytest.raises(InputError, match="1 channels, but the plan needs 2"):
        run(image(), *[ChannelRecipe(normalization=Normalization.NONE)] * 2)


@pytest.mark.parametrize("masked", [False, True])
def test_moments_of_large_images_are_those_of_small_ones(
    monkeypatch: pytest.MonkeyPatch, masked: bool
) -> None:
    inside = np.random.default_rng(1).random((6, 7, 8)) > 0.4
    recipe = ChannelRecipe(normalization=Normalization.ZSCORE, use_mask=masked)
    (small,) = find_scalings(image(), inside, (recipe,))
    monkeypatch.setattr("medmamba.preprocessing.normalize.MOST_VOXELS_AT_ONCE", 1)
    (large,) = find_scalings(image(), inside, (recipe,))
    assert large.shift == pytest.approx(small.shift, rel=1e-6)
    assert large.divisor == pytest.approx(small.divisor, rel=1e-6)
    assert large.only_inside == small.only_inside == masked
