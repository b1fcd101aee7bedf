import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from medmamba.plans import intensities
from medmamba.plans.intensities import (
    ChannelAccumulator,
    draw_counts,
    measure,
    sort_keys,
    value_of,
)

FLOATS = st.floats(-(2.0**90), 2.0**90, width=32)
WHOLE = st.integers(-30_000, 60_000).map(float)


@given(arrays(np.float32, st.integers(1, 40), elements=st.floats(width=32, allow_nan=False)))
def test_sort_keys_order_as_the_values_do(values: np.ndarray) -> None:
    keys = sort_keys(values)
    np.testing.assert_array_equal(values[np.argsort(keys, kind="stable")], np.sort(values))
    assert [value_of(int(key)) for key in keys] == values.tolist()


@given(
    st.lists(
        arrays(np.float32, st.integers(0, 30), elements=FLOATS)
        | arrays(np.float32, st.integers(0, 30), elements=WHOLE),
        min_size=1,
        max_size=5,
    )
)
def test_percentiles_over_cases_are_exact(cases: list[np.ndarray]) -> None:
    together = np.concatenate(cases).astype(np.float64)
    if together.size == 0:
        return
    found = accumulate(cases).statistics()
    low, median, high = np.percentile(together, [0.5, 50, 99.5])
    scale = max(1.0, float(np.abs(together).max()))
    assert found.percentile_00_5 == pytest.approx(low, abs=1e-12 * scale)
    assert found.median == pytest.approx(median, abs=1e-12 * scale)
    assert found.percentile_99_5 == pytest.approx(high, abs=1e-12 * scale)
    assert (found.min, found.max) == (together.min(), together.max())
    assert found.mean == pytest.approx(together.mean(), abs=1e-9 * scale)
    assert found.std == pytest.approx(together.std(), abs=1e-9 * scale)


def accumulate(cases: list[np.ndarray]) -> ChannelAccumulator:
    channel = ChannelAccumulator()
    measures = [measure(values) for values in cases]
    for index, found in enumerate(measures):
        channel.add(str(index), found)
    if channel.needs_refinement:
        channel.prepare_refinement()
        for values, found in zip(cases, measures, strict=True):
            if not found.is_whole:
                channel.refine(values)
    return channel


def test_counted_draws_are_those_of_one_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intensities, "AT_ONCE", 1000)
    values = np.random.default_rng(3).normal(size=777).astype(np.float32)
    expected = np.random.RandomState(1234).choice(values, 12_345, replace=True)
    counts = draw_counts(values.size, 12_345, np.random.RandomState(1234))
    np.testing.assert_array_equal(np.sort(np.repeat(values, counts)), np.sort(expected))


def test_weights_count_as_repetitions() -> None:
    random = np.random.default_rng(5)
    values = random.normal(size=500).astype(np.float32)
    weights = random.integers(0, 5, 500)
    weighted, repeated = measure(values, weights), measure(np.repeat(values, weights))
    assert weighted.keys == repeated.keys
    assert weighted.counts == repeated.counts
    assert weighted.mean == pytest.approx(repeated.mean, rel=1e-12)
    assert weighted.squares == pytest.approx(repeated.squares, rel=1e-12)


def test_a_measure_stays_small_however_many_values(tmp_path: object) -> None:
    values = np.random.default_rng(0).normal(100, 1, 300_000).astype(np.float32)
    assert len(measure(values).keys) < 100
