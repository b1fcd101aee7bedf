"""What is counted up during an epoch of training."""

from dataclasses import dataclass, field
from statistics import fmean

from medmamba.training.stepping import StepOutcome


@dataclass
class EpochTally:
    """Sums and lists of the epoch's steps so far.

    Args:
        losses: of the steps that were applied.
        gradient_norms: likewise, before clipping.
        skipped: steps whose loss or gradient was not finite.
        training_s: spent in steps, waiting included.
        waiting_s: of these, spent waiting for batches.
    """

    losses: list[float]
    gradient_norms: list[float] = field(default_factory=list)
    skipped: int = 0
    training_s: float = 0.0
    waiting_s: float = 0.0

    def count(self, outcome: StepOutcome) -> None:
        """Take a step into account."""
        if outcome.applied:
            self.losses.append(outcome.loss)
            self.gradient_norms.append(outcome.gradient_norm)
        else:
            self.skipped += 1

    @property
    def loss(self) -> float:
        """Mean; NaN before the first step."""
        return fmean(self.losses) if self.losses else float("nan")

    @property
    def gradient_norm(self) -> float:
        """Mean; NaN before the first step."""
        return fmean(self.gradient_norms) if self.gradient_norms else float("nan")

    @property
    def steps_per_s(self) -> float:
        """While training."""
        return max(len(self.losses) + self.skipped, 1) / max(self.training_s, 1e-9)

    @property
    def loading_share(self) -> float:
        """Part of the time that was spent waiting for batches."""
        return self.waiting_s / max(self.training_s, 1e-9)
