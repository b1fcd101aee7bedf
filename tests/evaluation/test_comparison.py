"""The statistics of a comparison: what they call a difference, and how often they are wrong."""

import numpy as np
import pytest

from medmamba.evaluation.comparison import bootstrap_interval, compare_scores, seed_margin
from medmamba.evaluation.comparison_figures import plot_cost, plot_paired


def draws(rng, *, seeds=3, cases=12, shift=0.0, seed_sd=0.02, difficulty=None):
    """Scores with a difficulty per case, an effect of the seed on all cases, and noise."""
    difficulty = rng.normal(0.8, 0.06, cases) if difficulty is None else difficulty
    effect = rng.normal(0, seed_sd, (seeds, 1))
    return difficulty + shift + effect + rng.normal(0, 0.01, (seeds, cases))


def shares(shift: float, trials: int = 150) -> float:
    rng = np.random.default_rng(3)
    found = 0
    for _ in range(trials):
        difficulty = rng.normal(0.8, 0.06, 12)
        first = draws(rng, difficulty=difficulty)
        second = draws(rng, difficulty=difficulty, shift=shift)
        found += compare_scores(first, second).verdict == "difference"
    return found / trials


def test_other_seeds_are_seldom_taken_for_another_network() -> None:
    assert shares(0.0) <= 0.07


def test_a_crippled_network_is_found() -> None:
    assert shares(-0.2) == 1.0


def test_a_shift_of_all_cases_by_the_seed_is_no_difference() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0.8, 0.05, 20)
    first = difficulty + np.array([[0.0], [0.03], [-0.02]])
    second = difficulty + np.array([[0.02], [0.04], [0.0]])
    found = compare_scores(first, second)
    assert found.wilcoxon_p < 0.001
    assert found.verdict == "no difference"


def test_equal_scores() -> None:
    scores = np.random.default_rng(0).uniform(0.5, 1, (3, 8))
    found = compare_scores(scores, scores)
    assert (found.difference, found.verdict) == (0.0, "no difference")
    assert np.isnan(found.wilcoxon_p)


def test_one_seed_decides_nothing_between_two_networks() -> None:
    first, second = np.full((1, 5), 0.8), np.full((1, 5), 0.2)
    found = compare_scores(first, second)
    assert (found.verdict, found.seed_margin) == ("undecided", None)
    assert compare_scores(first, second, same=True).verdict == "no difference"


def test_two_seeds_are_said_to_be_too_few() -> None:
    rng = np.random.default_rng(1)
    first = draws(rng, seeds=2, seed_sd=0.001)
    found = compare_scores(first, first - 0.5)
    assert found.verdict == "difference"
    assert "2 seeds only" in found.why


def test_the_margin_is_students() -> None:
    from scipy.stats import ttest_ind

    rng = np.random.default_rng(2)
    first, second = rng.normal(0, 1, (3, 1)), rng.normal(0, 1, (4, 1))
    margin = seed_margin(first, second)
    half = ttest_ind(first[:, 0], second[:, 0]).confidence_interval(0.95)
    assert margin == pytest.approx((half.high - half.low) / 2)


def test_the_interval_covers_the_mean_difference() -> None:
    rng = np.random.default_rng(4)
    low, high = bootstrap_interval(draws(rng), draws(rng, shift=0.3))
    assert low < 0.3 < high
    assert bootstrap_interval(draws(rng), draws(rng)) != (low, high)


def test_pictures_are_drawn(tmp_path) -> None:
    rng = np.random.default_rng(5)
    plot_paired(
        {"a": draws(rng), "b": draws(rng)}, [f"c{i}" for i in range(12)], tmp_path / "p.png"
    )
    plot_cost({"a": [0.8], "b": [0.7]}, {"s": {"a": 1.0, "b": 2.0}}, tmp_path / "c.png")
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in ("p.png", "c.png"))
