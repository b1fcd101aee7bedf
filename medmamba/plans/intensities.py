"""Exact statistics of very many intensities in little memory: moments, extremes, percentiles.

Percentiles are found by radix: float32 values map to 32-bit keys of the same order, a first pass
counts the upper 16 bits, a second pass the lower 16 bits of the few bins that hold a wanted rank.
Whole-numbered channels are counted value by value and need no second pass. Memory depends on
neither the number of cases nor their size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, floor, sqrt

import numpy as np
from numpy.typing import NDArray

from medmamba.files import RECORD_CONFIG
from medmamba.preprocessing.recipe import ChannelStatistics

LOW_PERCENTILE, MEDIAN, HIGH_PERCENTILE = 0.5, 50.0, 99.5

SMALLEST_WHOLE, LARGEST_WHOLE = -(1 << 15), 1 << 16
"""Whole numbers in this range are counted one by one: all of CT, and most stored integers."""

COARSE_BITS = 16
AT_ONCE = 1 << 20

Counts = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ChannelMeasure:
    """Foreground intensities of one channel of one case.

    Args:
        count: values, or draws where they are weighted.
        squares: sum of squared differences from the mean.
        is_whole: whether ``keys`` are the values themselves, and not upper halves of sort keys.
        keys, counts: histogram, ascending, without empty bins.
    """

    __pydantic_config__ = RECORD_CONFIG

    count: int
    mean: float = 0.0
    squares: float = 0.0
    minimum: float = 0.0
    maximum: float = 0.0
    is_whole: bool = True
    keys: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()


def measure(values: NDArray[np.float32], weights: Counts | None = None) -> ChannelMeasure:
    """Measure the foreground of one channel of one case.

    Args:
        values: (n,) intensities.
        weights: (n,) how often each counts; once when None.
    """
    if weights is not None:
        values, weights = values[weights > 0], weights[weights > 0]
    if values.size == 0:
        return ChannelMeasure(count=0)
    count = values.size if weights is None else int(weights.sum())
    mean, squares = _moments(values, weights, count)
    low, high = float(values.min()), float(values.max())
    is_whole = low >= SMALLEST_WHOLE and high <= LARGEST_WHOLE and _all_whole(values)
    if is_whole:
        bins = values.astype(np.int64) - int(low)
        histogram = _count(bins, weights, int(high - low) + 1)
        offset = int(low)
    else:
        histogram = _count(sort_keys(values) >> COARSE_BITS, weights, 1 << COARSE_BITS)
        offset = 0
    used = np.flatnonzero(histogram)
    return ChannelMeasure(
        count=count,
        mean=mean,
        squares=squares,
        minimum=low,
        maximum=high,
        is_whole=is_whole,
        keys=tuple((used + offset).tolist()),
        counts=tuple(histogram[used].tolist()),
    )


def sort_keys(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Map float32 to uint32 so that integers compare as the floats do."""
    # Adding zero turns -0.0 into 0.0.
    bits = (values + np.float32(0)).view(np.uint32)
    sign = np.uint32(1 << 31)
    return np.where(bits & sign, ~bits, bits | sign).astype(np.uint32)


def value_of(key: int) -> float:
    """Undo `sort_keys`."""
    bits = key ^ (1 << 31) if key >> 31 else ~key & 0xFFFFFFFF
    return float(np.array([bits], dtype=np.uint32).view(np.float32)[0])


class ChannelAccumulator:
    """Everything about one channel over all cases, built up case by case.

    Use: `add` every measure; then, where `needs_refinement`, `refine` with the values of every
    case whose measure was not whole; then `statistics`.
    """

    def __init__(self) -> None:
        self._moments: dict[str, tuple[int, float, float]] = {}
        self._minimum, self._maximum = float("inf"), float("-inf")
        self._whole = np.zeros(LARGEST_WHOLE - SMALLEST_WHOLE + 1, dtype=np.int64)
        self._coarse = np.zeros(1 << COARSE_BITS, dtype=np.int64)
        self._fine: dict[int, Counts] = {}

    def add(self, case_id: str, found: ChannelMeasure) -> None:
        """Take in one case; the order of cases does not matter."""
        if found.count == 0:
            return
        self._moments[case_id] = (found.count, found.mean, found.squares)
        self._minimum = min(self._minimum, found.minimum)
        self._maximum = max(self._maximum, found.maximum)
        keys = np.array(found.keys, dtype=np.int64)
        if found.is_whole:
            self._whole[keys - SMALLEST_WHOLE] += np.array(found.counts, dtype=np.int64)
        else:
            self._coarse[keys] += np.array(found.counts, dtype=np.int64)

    @property
    def count(self) -> int:
        """Values taken in so far."""
        return sum(count for count, _, _ in self._moments.values())

    @property
    def needs_refinement(self) -> bool:
        """Whether values of the cases that were not whole are needed again."""
        return bool(self._coarse.any())

    def prepare_refinement(self) -> None:
        """Choose the bins that hold wanted ranks, and start counting inside them."""
        totals = self._coarse.copy()
        used = np.flatnonzero(self._whole)
        whole_keys = sort_keys((used + SMALLEST_WHOLE).astype(np.float32))
        np.add.at(totals, whole_keys >> COARSE_BITS, self._whole[used])
        ends = np.cumsum(totals)
        bins = {int(np.searchsorted(ends, rank, side="right")) for rank in self._ranks()}
        self._before = {b: int(ends[b] - totals[b]) for b in bins}
        for chosen in bins:
            fine = np.zeros(1 << COARSE_BITS, dtype=np.int64)
            inside = (whole_keys >> COARSE_BITS) == chosen
            np.add.at(fine, whole_keys[inside] & 0xFFFF, self._whole[used[inside]])
            self._fine[chosen] = fine

    def refine(self, values: NDArray[np.float32], weights: Counts | None = None) -> None:
        """Count the values of one case that lie in the chosen bins."""
        keys = sort_keys(values)
        upper = keys >> COARSE_BITS
        for chosen, fine in self._fine.items():
            inside = upper == chosen
            kept = None if weights is None else weights[inside]
            fine += _count(keys[inside] & 0xFFFF, kept, 1 << COARSE_BITS)

    def statistics(self) -> ChannelStatistics:
        """Return the statistics of all values; percentiles interpolate linearly."""
        total = self.count
        moments = [self._moments[case] for case in sorted(self._moments)]
        mean = sum(count * part for count, part, _ in moments) / total
        squares = sum(sq + count * (part - mean) ** 2 for count, part, sq in moments)
        low, median, high = (
            self._percentile(percent) for percent in (LOW_PERCENTILE, MEDIAN, HIGH_PERCENTILE)
        )
        return ChannelStatistics(
            mean=mean,
            median=median,
            std=sqrt(squares / total),
            min=self._minimum,
            max=self._maximum,
            percentile_00_5=low,
            percentile_99_5=high,
        )

    def _ranks(self) -> set[int]:
        last = self.count - 1
        positions = [p / 100 * last for p in (LOW_PERCENTILE, MEDIAN, HIGH_PERCENTILE)]
        return {rank for p in positions for rank in (floor(p), ceil(p))}

    def _percentile(self, percent: float) -> float:
        position = percent / 100 * (self.count - 1)
        below, above = self._at(floor(position)), self._at(ceil(position))
        return below + (above - below) * (position - floor(position))

    def _at(self, rank: int) -> float:
        """Return the value of one rank, counted from zero."""
        if not self._fine:
            ends = np.cumsum(self._whole)
            return float(np.searchsorted(ends, rank, side="right") + SMALLEST_WHOLE)
        chosen = max(b for b, before in self._before.items() if before <= rank)
        ends = np.cumsum(self._fine[chosen]) + self._before[chosen]
        lower = int(np.searchsorted(ends, rank, side="right"))
        return value_of((chosen << COARSE_BITS) | lower)


def draw_counts(size: int, draws: int, random: np.random.RandomState) -> Counts:
    """Count how often each of ``size`` values is drawn, with replacement.

    The stream equals that of one ``random.choice`` of ``draws`` values, in bounded memory.
    """
    counts = np.zeros(size, dtype=np.int64)
    for start in range(0, draws, AT_ONCE):
        # The stream does not depend on the type of the numbers; this one is the smallest.
        part = random.randint(0, size, size=min(AT_ONCE, draws - start), dtype=np.uint32)
        counts += np.bincount(part, minlength=size)
    return counts


def _moments(
    values: NDArray[np.float32], weights: Counts | None, count: int
) -> tuple[float, float]:
    total = 0.0
    for part, weight in _parts(values, weights):
        total += float(part.sum() if weight is None else np.dot(part, weight))
    mean = total / count
    squares = 0.0
    for part, weight in _parts(values, weights):
        off = part - mean
        squares += float(np.dot(off, off if weight is None else off * weight))
    return mean, squares


def _parts(
    values: NDArray[np.float32], weights: Counts | None
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64] | None]]:
    for start in range(0, values.size, AT_ONCE):
        part = slice(start, start + AT_ONCE)
        weight = None if weights is None else weights[part].astype(np.float64)
        yield values[part].astype(np.float64), weight


def _count(bins: NDArray[np.integer], weights: Counts | None, size: int) -> Counts:
    # Sums of weights stay far below 2**53, so counting in float64 is exact.
    found = np.bincount(bins.astype(np.intp, copy=False), weights=weights, minlength=size)
    return found.astype(np.int64, copy=False)


def _all_whole(values: NDArray[np.float32]) -> bool:
    return bool((values == np.rint(values)).all())
