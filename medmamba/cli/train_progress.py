"""Progress of training: a line per epoch; within an epoch a bar, or a line a minute in a log."""

import time
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from medmamba.cli.display import Bars
from medmamba.cli.messages import say
from medmamba.cli.options import format_duration

if TYPE_CHECKING:
    from medmamba.training.progress import EpochReport, StepReport

REFRESH_S = 0.25
"""A terminal is redrawn this often at most; drawing takes about a millisecond."""

LINE_EVERY_S = 60.0
"""In a file, an epoch that takes long shows life this often."""


class TrainingDisplay(Bars):
    """Shows reports of training on standard error; a context manager.

    Args:
        title: put before every line, such as ``fold 3``.
    """

    def __init__(self, title: str = "") -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[figures]}"),
            transient=True,
            auto_refresh=False,
        )
        self.title = title
        self._shown_at = time.monotonic()
        self._task: TaskID | None = None

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.bars is not None:
            self._hide()
            self.bars.console.print(text, markup=False, soft_wrap=True)
        else:
            say(text)

    def on_epoch(self, report: "EpochReport") -> None:
        """Print what a person watching wants to know of a finished epoch."""
        self.say(self._titled(epoch_line(report)))
        self._shown_at = time.monotonic()

    def on_step(self, report: "StepReport") -> None:
        """Show where in the epoch the run is; most calls show nothing."""
        now = time.monotonic()
        wait = LINE_EVERY_S if self.bars is None else REFRESH_S
        if now - self._shown_at < wait:
            return
        self._shown_at = now
        if self.bars is None:
            self.say(self._titled(step_line(report)))
        else:
            self._show(self.bars, report)

    def _titled(self, text: str) -> str:
        return f"{self.title}  {text}" if self.title else text

    def _show(self, bar: Progress, report: "StepReport") -> None:
        if self._task is None:
            self._task = bar.add_task("", figures="")
        bar.update(
            self._task,
            description=self._titled(_place(report)),
            completed=report.step,
            total=max(report.steps, 1),
            figures=_figures(report),
        )
        bar.refresh()

    def _hide(self) -> None:
        if self.bars is not None and self._task is not None:
            self.bars.remove_task(self._task)
            self._task = None
            self.bars.refresh()


def epoch_line(report: "EpochReport") -> str:
    """One line of a finished epoch."""
    dice = f"{report.dice:.4f}" if report.dice == report.dice else "   -  "
    return (
        f"epoch {report.epoch + 1:>4}/{report.epochs:<4} loss {report.loss:+.4f}  "
        f"val {report.validation_loss:+.4f}  Dice {dice}  lr {report.learning_rate:.2e}  "
        f"{report.patches_per_s:5.1f} patches/s  {report.memory_gb:.1f} GB  "
        f"left {format_duration(report.remaining_s)}"
    )


def step_line(report: "StepReport") -> str:
    """One line of a running epoch."""
    return f"  {_place(report)}: {_figures(report)}"


def _place(report: "StepReport") -> str:
    doing = ", validating" if report.validating else ""
    return f"epoch {report.epoch + 1}/{report.epochs}{doing}"


def _figures(report: "StepReport") -> str:
    parts = [f"{report.step}/{report.steps}"]
    if report.loss == report.loss:
        parts.append(f"loss {report.loss:+.4f}")
    parts += [f"{report.patches_per_s:.1f} patches/s", f"{report.memory_gb:.1f} GB"]
    if report.remaining_s == report.remaining_s:
        parts.append(f"left {format_duration(report.remaining_s)}")
    return "  ".join(parts)
