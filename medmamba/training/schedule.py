"""How long a run is and what the learning rate does, in epochs or in measured time.

The loop asks one of two schedules the same questions. ``StepSchedule`` counts, so its runs are
reproducible; ``TimeSchedule`` measures, so that the learning rate ends when the budget ends,
whatever the machine.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi
from statistics import median
from typing import Protocol

from medmamba.training.recipe import TrainingRecipe

POLY_POWER = 0.9

MINIMUM_EPOCHS = 20
"""Checkpoints and validations a time budget is divided into at least."""

EPOCH_S = 30.0
"""Length of an epoch under a long time budget."""

VALIDATION_SHARE = 0.06
"""Part of an epoch's time for validation under a time budget (nnU-Net's share is about that)."""

CLOSING_S, CLOSING_SHARE = 2.0, 0.02
"""What is kept for drawing the last curves: 2 s, at most 2 % of the budget."""

STEPS_REMEMBERED = 9
FIRST_CHECKPOINT_S = 1.0
"""Guess of what saving costs, before it was measured."""


def learning_rate(recipe: TrainingRecipe, fraction: float, exact: float | None = None) -> float:
    """Return the learning rate when ``fraction`` of the run is done.

    Args:
        recipe: base rate, final rate, kind of schedule, warm-up.
        fraction: 0 to 1; constant within an epoch for counted schedules, as in nnU-Net.
        exact: the same by iteration, for the warm-up's ramp.
    """
    base, final = recipe.learning_rate, recipe.final_learning_rate
    done = min(max(fraction, 0.0), 1.0)
    if recipe.schedule == "cosine":
        shape = (1 + cos(pi * done)) / 2
    else:
        shape = (1 - done) ** POLY_POWER
    ramp = 1.0
    position = fraction if exact is None else exact
    if position < recipe.warmup_fraction:
        ramp = max(position / recipe.warmup_fraction, 1e-3)
    return ramp * (final + (base - final) * shape)


class Schedule(Protocol):
    """What the loop asks."""

    @property
    def epochs(self) -> int:
        """Epochs of the whole run."""

    def steps_in_epoch(self, epoch: int, steps: int) -> int:
        """Steps of an epoch of which ``steps`` are done; an estimate where time decides."""

    def finished(self, epoch: int) -> bool:
        """Whether there is no epoch number ``epoch`` any more."""

    def goes_on(self, epoch: int, steps: int) -> bool:
        """Whether the epoch has another step after ``steps``."""

    def learning_rate(self, epoch: int, steps: int) -> float:
        """Rate of the next step."""

    def validation_goes_on(self, batches: int, seconds: float) -> bool:
        """Whether another validation batch fits, when their number is not settled yet."""

    def step_took(self, seconds: float) -> None:
        """Learn how long a step took."""

    def overhead_took(self, seconds: float) -> None:
        """Learn how long validation and saving took."""

    def elapsed_s(self) -> float:
        """Time since the run began, interruptions not counted."""

    def remaining_s(self, epoch: int, steps: int) -> float:
        """Estimate of the time left."""


@dataclass
class Clock:
    """Time since a run began, over interruptions."""

    before_s: float = 0.0
    now: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._start = self.now()

    def elapsed_s(self) -> float:
        """Seconds of training so far, those of earlier processes included."""
        return self.before_s + self.now() - self._start


class StepSchedule:
    """A run counted in epochs of a fixed number of steps."""

    def __init__(self, recipe: TrainingRecipe, clock: Clock) -> None:
        self.epochs = recipe.epochs
        self._recipe = recipe
        self._clock = clock
        self._steps_s: deque[float] = deque(maxlen=STEPS_REMEMBERED)
        self._overhead_s = 0.0

    def steps_in_epoch(self, epoch: int, steps: int) -> int:
        """See ``Schedule``."""
        return self._recipe.iterations

    def finished(self, epoch: int) -> bool:
        """See ``Schedule``."""
        return epoch >= self.epochs

    def goes_on(self, epoch: int, steps: int) -> bool:
        """See ``Schedule``."""
        return steps < self._recipe.iterations

    def learning_rate(self, epoch: int, steps: int) -> float:
        """Constant within an epoch but for the warm-up."""
        exact = (epoch + steps / self._recipe.iterations) / self.epochs
        return learning_rate(self._recipe, epoch / self.epochs, exact)

    def validation_goes_on(self, batches: int, seconds: float) -> bool:
        """See ``Schedule``."""
        return batches < self._recipe.validation_iterations

    def step_took(self, seconds: float) -> None:
        """See ``Schedule``."""
        self._steps_s.append(seconds)

    def overhead_took(self, seconds: float) -> None:
        """See ``Schedule``."""
        self._overhead_s = seconds

    def elapsed_s(self) -> float:
        """See ``Schedule``."""
        return self._clock.elapsed_s()

    def remaining_s(self, epoch: int, steps: int) -> float:
        """See ``Schedule``."""
        if not self._steps_s:
            return float("nan")
        left = self.epochs - epoch
        steps_left = left * self._recipe.iterations - steps
        return steps_left * median(self._steps_s) + left * self._overhead_s


class TimeSchedule:
    """A run laid out over measured time.

    Epochs are slices of the budget that include validation and saving. The first step, which pays
    for compiling and packing, is left out of every estimate; slices and the way of the learning
    rate begin after it. A resumed run takes both as if they had begun with the run.

    Args:
        budget_s: for everything, final validation, saving and curves included.
    """

    def __init__(self, recipe: TrainingRecipe, clock: Clock, budget_s: float) -> None:
        longest = max(MINIMUM_EPOCHS, recipe.epochs)
        self.epochs = min(longest, max(MINIMUM_EPOCHS, int(budget_s / EPOCH_S)))
        self._recipe = recipe
        self._clock = clock
        self._budget_s = budget_s - min(CLOSING_S, CLOSING_SHARE * budget_s)
        self._steps_s: deque[float] = deque(maxlen=STEPS_REMEMBERED)
        self._overheads_s: deque[float] = deque(maxlen=3)
        self._begin_s = 0.0
        self._warm = False
        self._fraction = 0.0

    @property
    def _step_s(self) -> float:
        return median(self._steps_s) if self._steps_s else 0.0

    @property
    def _overhead_s(self) -> float:
        if self._overheads_s:
            return max(self._overheads_s)
        return VALIDATION_SHARE * self._budget_s / self.epochs + FIRST_CHECKPOINT_S

    def steps_in_epoch(self, epoch: int, steps: int) -> int:
        """See ``Schedule``."""
        left_s = self._end_s(epoch) - self._overhead_s - self._clock.elapsed_s()
        return steps + max(0, round(left_s / self._step_s) if self._step_s else 0)

    def finished(self, epoch: int) -> bool:
        """See ``Schedule``; also when no step and its saving would fit any more.

        A run has one epoch at least, or it would leave a network that has learned nothing.
        """
        if epoch == 0:
            return False
        needed = self._step_s + self._overhead_s
        return epoch >= self.epochs or self._clock.elapsed_s() + needed > self._budget_s

    def goes_on(self, epoch: int, steps: int) -> bool:
        """See ``Schedule``; an epoch has one step at least."""
        if steps == 0:
            return True
        # Slices are kept on average, the end of the budget always.
        step = self._step_s if epoch + 1 >= self.epochs else self._step_s / 2
        return self._clock.elapsed_s() + step + self._overhead_s <= self._end_s(epoch)

    def _end_s(self, epoch: int) -> float:
        share = (epoch + 1) / self.epochs
        return self._begin_s + (self._budget_s - self._begin_s) * share

    def learning_rate(self, epoch: int, steps: int) -> float:
        """Rate by the share of the training time that is used up."""
        if self._warm or self._clock.before_s > 0:
            length = max(self._budget_s - self._overhead_s - self._begin_s, 1e-9)
            done = (self._clock.elapsed_s() - self._begin_s) / length
            self._fraction = max(self._fraction, min(done, 1.0))
        return learning_rate(self._recipe, self._fraction)

    def validation_goes_on(self, batches: int, seconds: float) -> bool:
        """See ``Schedule``; two batches at least."""
        if batches >= self._recipe.validation_iterations:
            return False
        per_batch = seconds / max(batches, 1)
        share = VALIDATION_SHARE * self._budget_s / self.epochs
        return batches < 2 or seconds + per_batch <= share

    def step_took(self, seconds: float) -> None:
        """See ``Schedule``."""
        if self._warm:
            self._steps_s.append(seconds)
        elif self._clock.before_s == 0:
            self._begin_s = self._clock.elapsed_s()
        self._warm = True

    def overhead_took(self, seconds: float) -> None:
        """See ``Schedule``."""
        self._overheads_s.append(seconds)

    def elapsed_s(self) -> float:
        """See ``Schedule``."""
        return self._clock.elapsed_s()

    def remaining_s(self, epoch: int, steps: int) -> float:
        """See ``Schedule``."""
        return max(0.0, self._budget_s - self._clock.elapsed_s())


def make_schedule(recipe: TrainingRecipe, clock: Clock, max_time_s: float | None) -> Schedule:
    """Choose the schedule: over time when there is a budget, else counted."""
    if max_time_s is None:
        return StepSchedule(recipe, clock)
    return TimeSchedule(recipe, clock, max_time_s)
