"""What happens to the coarse network's labels before the fine network of a cascade sees them."""

import numpy as np
import pytest
from scipy import ndimage, stats

from medmamba.training.draws import PRESETS
from medmamba.training.previous import (
    OPERATORS,
    Morphology,
    PreviousDraw,
    Removal,
    augment_previous,
    draw_previous,
)

DRAWS = 4000


@pytest.fixture(scope="module")
def draws() -> list[PreviousDraw]:
    generator = np.random.default_rng(3)
    return [draw_previous(PRESETS["default"], 4, generator) for _ in range(DRAWS)]


def assert_share(found: int, of: int, expected: float) -> None:
    assert stats.binomtest(found, of, expected).pvalue > 1e-5, (found, of, expected)


def test_transforms_happen_as_often_as_stated(draws) -> None:
    # Each of four labels takes part in half of the cases, so that none does in one of 16.
    assert_share(sum(bool(draw.morphology) for draw in draws), DRAWS, 0.4 * (1 - 0.5**4))
    assert_share(sum(bool(draw.removals) for draw in draws), DRAWS, 0.2 * (1 - 0.5**4))
    steps = [step for draw in draws for step in draw.morphology]
    assert_share(len(steps), DRAWS * 4, 0.4 * 0.5)
    assert_share(sum(len(draw.removals) for draw in draws), DRAWS * 4, 0.2 * 0.5)
    for operator in OPERATORS:
        assert_share(sum(step.operator == operator for step in steps), len(steps), 0.25)
    radii = [step.radius for step in steps]
    assert stats.kstest(radii, stats.uniform(1, 7).cdf).pvalue > 1e-5
    firsts = [draw.morphology[0].channel for draw in draws if draw.morphology]
    for channel in range(4):
        assert_share(firsts.count(channel), len(firsts), 0.25)


def test_nothing_is_drawn_without_augmentation() -> None:
    generator = np.random.default_rng(3)
    assert draw_previous(PRESETS["none"], 3, generator) == PreviousDraw()


def blobs() -> np.ndarray:
    noise = np.random.default_rng(1).normal(size=(14, 16, 18))
    smooth = ndimage.gaussian_filter(noise, 2)
    return np.stack([smooth > 0.04, smooth < -0.04])


def ball(radius: int) -> np.ndarray:
    axes = np.indices((2 * radius + 1,) * 3) - radius
    return (axes**2).sum(0) <= radius**2


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("radius", [1, 2, 3])
def test_morphology_is_that_of_a_ball(operator: str, radius: int) -> None:
    channels = blobs()
    step = Morphology(channel=0, operator=operator, radius=float(radius))
    found = augment_previous(channels, PreviousDraw(morphology=(step,)))
    element = ball(radius)

    def dilate(mask: np.ndarray) -> np.ndarray:
        return ndimage.binary_dilation(mask, element)

    def erode(mask: np.ndarray) -> np.ndarray:
        return ndimage.binary_erosion(mask, element, border_value=1)

    by_hand = {
        "dilate": dilate,
        "erode": erode,
        "close": lambda mask: erode(dilate(mask)),
        "open": lambda mask: dilate(erode(mask)),
    }
    expected = by_hand[operator](channels[0])
    assert np.array_equal(found[0], expected)
    # What the label gained the other one lost.
    assert np.array_equal(found[1], channels[1] & ~(expected & ~channels[0]))
    assert not np.array_equal(channels[0], expected) or operator in ("close", "open")


def test_only_small_components_are_removed() -> None:
    channels = np.zeros((1, 10, 10, 10), dtype=bool)
    channels[0, :6, :6, :6] = True
    channels[0, 8, 8, 8] = True
    channels[0, 8, 0, 8] = True
    removed = [
        augment_previous(channels, PreviousDraw(removals=(Removal(channel=0, pick=pick),)))
        for pick in (0.2, 0.7)
    ]
    for found in removed:
        assert found[0, :6, :6, :6].all()
        assert found.sum() == channels.sum() - 1
    assert not np.array_equal(removed[0], removed[1])
    empty = np.zeros_like(channels)
    draw = PreviousDraw(removals=(Removal(channel=0, pick=0.5),))
    assert not augment_previous(empty, draw).any()
