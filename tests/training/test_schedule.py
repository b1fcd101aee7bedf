"""Learning rates, and how a time budget is divided."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from medmamba.training.recipe import TrainingRecipe
from medmamba.training.schedule import (
    MINIMUM_EPOCHS,
    Clock,
    StepSchedule,
    TimeSchedule,
    learning_rate,
    make_schedule,
)


class FakeTime:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def recipe_of(**changes) -> TrainingRecipe:
    return TrainingRecipe(**{"batch_size": 2, **changes})


def simulate(budget_s: float, *, step_s, first_s: float, overhead_s: float, begin_s: float = 0.0):
    """Run the loop's questions against a clock that only moves when work is done."""
    now = FakeTime()
    schedule = TimeSchedule(recipe_of(), Clock(now=now), budget_s)
    now.seconds += begin_s
    rates, lengths, epoch = [], [], 0
    while not schedule.finished(epoch):
        steps = 0
        while schedule.goes_on(epoch, steps):
            rates.append(schedule.learning_rate(epoch, steps))
            seconds = first_s if len(rates) == 1 else step_s(now.seconds)
            now.seconds += seconds
            schedule.step_took(seconds)
            steps += 1
        now.seconds += overhead_s
        schedule.overhead_took(overhead_s)
        lengths.append(steps)
        epoch += 1
    return now.seconds, rates, lengths


def test_the_polynomial_rate_equals_the_golden_one(fixtures_dir: Path) -> None:
    path = fixtures_dir / "preprocess" / "rules" / "losses.json"
    if not path.exists():
        pytest.skip("no golden losses in the fixtures folder")
    schedule = StepSchedule(recipe_of(epochs=1000), Clock())
    for epoch, rate in json.loads(path.read_text())["poly_lr_1000"]:
        for steps in (0, 249):
            assert schedule.learning_rate(epoch, steps) == pytest.approx(rate, rel=1e-12)


def test_cosine_ends_at_the_final_rate() -> None:
    recipe = recipe_of(schedule="cosine", learning_rate=1e-4, final_learning_rate=1e-6)
    assert learning_rate(recipe, 0.0) == pytest.approx(1e-4)
    assert learning_rate(recipe, 0.5) == pytest.approx((1e-4 + 1e-6) / 2)
    assert learning_rate(recipe, 1.0) == pytest.approx(1e-6)


def test_warm_up_rises_within_epochs() -> None:
    schedule = StepSchedule(recipe_of(epochs=10, iterations=10, warmup_fraction=0.2), Clock())
    rates = [schedule.learning_rate(epoch, step) for epoch in (0, 1) for step in range(10)]
    assert all(a < b for a, b in pairwise(rates))
    assert rates[0] < 0.02 * 1e-2
    assert schedule.learning_rate(2, 0) == pytest.approx(1e-2 * 0.8**0.9)


@pytest.mark.parametrize(
    ("budget_s", "step_s", "first_s", "overhead_s"),
    [(600, 1.3, 1.3, 2.0), (600, 0.2, 25.0, 1.0), (60, 0.05, 4.0, 0.3), (3600, 2.7, 90.0, 9.0)],
)
def test_a_budget_is_used_and_kept(budget_s, step_s, first_s, overhead_s) -> None:
    seconds, rates, lengths = simulate(
        budget_s, step_s=lambda _: step_s, first_s=first_s, overhead_s=overhead_s
    )
    assert 0.95 * budget_s < seconds <= 1.01 * budget_s
    assert len(lengths) >= MINIMUM_EPOCHS
    assert rates[0] == 1e-2
    assert rates[-1] < 0.06 * 1e-2
    assert all(a >= b for a, b in pairwise(rates))
    # A slow first step must not shorten epochs; what saving costs is known after the second.
    rest = lengths[2:-1]
    assert max(rest) - min(rest) <= max(2, 0.1 * max(rest))


def test_a_machine_that_becomes_slow_still_ends_in_time() -> None:
    seconds, rates, _ = simulate(
        600, step_s=lambda now: 0.5 if now < 200 else 4.0, first_s=1.0, overhead_s=2.0
    )
    assert seconds <= 1.02 * 600
    assert rates[-1] < 0.1 * 1e-2


def test_steps_longer_than_an_epoch_leave_fewer_epochs() -> None:
    seconds, _, lengths = simulate(100, step_s=lambda _: 9.0, first_s=9.0, overhead_s=1.0)
    assert len(lengths) < MINIMUM_EPOCHS
    assert 85 <= seconds <= 100


def test_long_budgets_have_more_epochs_but_no_more_than_the_recipe() -> None:
    assert TimeSchedule(recipe_of(), Clock(), 3600.0).epochs == 120
    assert TimeSchedule(recipe_of(epochs=50), Clock(), 36000.0).epochs == 50
    assert TimeSchedule(recipe_of(epochs=5), Clock(), 60.0).epochs == MINIMUM_EPOCHS


def test_the_time_of_earlier_processes_counts() -> None:
    now = FakeTime()
    clock = Clock(before_s=50.0, now=now)
    schedule = TimeSchedule(recipe_of(), clock, 100.0)
    assert schedule.elapsed_s() == 50.0
    assert 0.5 * 1e-2 < schedule.learning_rate(10, 0) < 0.6 * 1e-2
    schedule.step_took(1.0)
    assert schedule.learning_rate(10, 1) < 0.6 * 1e-2
    now.seconds = 4.0
    assert schedule.goes_on(11, 1)
    now.seconds = 9.0
    assert not schedule.goes_on(11, 1)


def test_a_budget_that_is_over_at_once_still_trains_a_step() -> None:
    _, rates, lengths = simulate(
        1.0, step_s=lambda now: 0.5, first_s=2.0, overhead_s=1.0, begin_s=5.0
    )
    assert lengths == [1]
    assert len(rates) == 1


def test_counted_runs_count() -> None:
    schedule = make_schedule(recipe_of(epochs=3, iterations=4), Clock(), None)
    assert schedule.goes_on(0, 3)
    assert not schedule.goes_on(0, 4)
    assert not schedule.finished(2)
    assert schedule.finished(3)
    schedule.step_took(2.0)
    schedule.overhead_took(1.0)
    assert schedule.remaining_s(1, 0) == pytest.approx(2 * (4 * 2.0 + 1.0))
