"""Whether two networks differ: paired statistics over cases, held against the spread of seeds.

Legend of arrays: S seeds, C cases; one score (mean Dice of a case) each.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medmamba.files import RECORD_CONFIG

Scores = NDArray[np.float64]
"""(S, C)."""

RESAMPLES = 10_000
CONFIDENCE = 0.95
SEEDS_FOR_A_CLAIM = 3
"""With fewer a difference is reported, but as one that supports no claim."""


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """What is known about the difference of two networks.

    Args:
        difference: mean over cases and seeds of the second minus the first.
        low, high: 95 % interval of it; bootstrap over cases (paired) and seeds (of each network).
        wilcoxon_p: signed-rank test over cases of scores averaged over seeds; NaN if all are equal.
        seed_margin: difference that other seeds alone reach in 5 % of comparisons; None when no
            network has two seeds.
        spreads: standard deviation between seeds of each network's mean; NaN for one seed.
        verdict: ``no difference`` where the interval contains zero or the difference is below the
            margin; ``undecided`` where there is no margin.
        why: the verdict's reason in words.
    """

    __pydantic_config__ = RECORD_CONFIG

    difference: float
    low: float
    high: float
    wilcoxon_p: float
    seed_margin: float | None
    spreads: tuple[float, float]
    verdict: Literal["no difference", "difference", "undecided"]
    why: str


def compare_scores(first: Scores, second: Scores, *, same: bool = False) -> PairedComparison:
    """Compare two networks on the same cases.

    Seeds are not paired: they are draws of a training's chance. The margin is that of Student's
    two-sample test on the means of runs, so that a difference which seeds shift in all cases alike
    is not taken for one of the networks (Bouthillier et al. 2021 on such variance).

    Args:
        first: (S1, C) scores.
        second: (S2, C) scores of the same cases in the same order.
        same: both are runs of one network, so that all of them tell its spread between seeds.
    """
    delta = second.mean(0) - first.mean(0)
    difference = float(delta.mean())
    low, high = bootstrap_interval(first, second)
    margin = seed_margin(first, second, same=same)
    verdict, why = _judge(difference, low, high, margin, min(len(first), len(second)))
    return PairedComparison(
        difference=difference,
        low=low,
        high=high,
        wilcoxon_p=_wilcoxon(delta),
        seed_margin=margin,
        spreads=(seed_spread(first), seed_spread(second)),
        verdict=verdict,
        why=why,
    )


def bootstrap_interval(
    first: Scores, second: Scores, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile interval of the mean difference over resampled cases and seeds."""
    rng = np.random.default_rng(seed)
    cases = rng.integers(0, first.shape[1], (resamples, first.shape[1]))
    means = []
    for scores in (first, second):
        weights = rng.multinomial(len(scores), np.full(len(scores), 1 / len(scores)), resamples)
        averaged = weights @ scores / len(scores)
        means.append(np.take_along_axis(averaged, cases, axis=1).mean(1))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means[1] - means[0], (tail, 1 - tail))
    return float(low), float(high)


def seed_spread(scores: Scores) -> float:
    """Return the standard deviation between seeds of the mean over cases."""
    return float(scores.mean(1).std(ddof=1)) if len(scores) > 1 else float("nan")


def seed_margin(first: Scores, second: Scores, *, same: bool = False) -> float | None:
    """Return the difference of means that seeds alone exceed in 5 % of comparisons."""
    from scipy.stats import t

    means = [first.mean(1), second.mean(1)]
    freedom = sum(len(values) - 1 for values in means)
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in means)
    if freedom == 0 and same:
        everything = np.concatenate(means)
        freedom = len(everything) - 1
        squares = float(((everything - everything.mean()) ** 2).sum())
    if freedom == 0:
        return None
    spread = np.sqrt(squares / freedom)
    quantile = t.ppf(1 - (1 - CONFIDENCE) / 2, freedom)
    return float(quantile * spread * np.sqrt(1 / len(means[0]) + 1 / len(means[1])))


def _wilcoxon(delta: NDArray[np.float64]) -> float:
    from scipy.stats import wilcoxon

    if not np.any(delta):
        return float("nan")
    # Averages round differently; that is no difference of two networks.
    return float(wilcoxon(np.round(delta, 12), zero_method="zsplit", method="auto").pvalue)


def _judge(
    difference: float, low: float, high: float, margin: float | None, seeds: int
) -> tuple[Literal["no difference", "difference", "undecided"], str]:
    if margin is None:
        return "undecided", "one seed each: nothing is known of the spread between seeds"
    if low <= 0 <= high:
        return "no difference", "the interval contains zero"
    if abs(difference) <= margin:
        return "no difference", f"seeds alone reach {margin:.4f}"
    few = (
        f"; {seeds} seed{'s' if seeds > 1 else ''} only, a claim needs {SEEDS_FOR_A_CLAIM}"
        if seeds < SEEDS_FOR_A_CLAIM
        else ""
    )
    return "difference", f"interval without zero, above the {margin:.4f} that seeds reach{few}"
