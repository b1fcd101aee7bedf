"""Progress and tables. Talk goes to standard error, data to standard output."""

import os
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from medmamba.cli.messages import say
from medmamba.cli.options import format_duration

PLAIN_LINE_EVERY_S = 5.0

FILE_COLUMNS = 120
"""Of tables in files and pipes, which have no width of their own."""

talk = Console(stderr=True, highlight=False)
_width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else FILE_COLUMNS  # None: rich asks
data = Console(highlight=False, width=_width)


class Bars:
    """A context manager around rich's bars; ``bars`` is None where no terminal can redraw them."""

    def __init__(self, *columns: ProgressColumn, transient: bool, auto_refresh: bool) -> None:
        self.bars: Progress | None = None
        if talk.is_terminal and not talk.is_dumb_terminal:
            self.bars = Progress(
                *columns, console=talk, transient=transient, auto_refresh=auto_refresh
            )

    def __enter__(self) -> Self:
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bars is not None:
            self.bars.stop()


class StepProgress(Bars):
    """Shows (stage, done, total) reports: a bar on a terminal, else a line every few seconds."""

    def __init__(self) -> None:
        super().__init__(
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            transient=False,
            auto_refresh=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._last_line = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report that ``done`` of ``total`` steps of ``stage`` are finished."""
        self._started.setdefault(stage, time.monotonic())
        if self.bars is not None:
            self._show(self.bars, stage, done, total)
        else:
            self._print_line(stage, done, total)

    def _show(self, bars: Progress, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = bars.add_task(stage, total=total)
        bars.update(self._tasks[stage], completed=done, total=total)

    def _print_line(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        begins = done == 0 and total == 1
        if done < total and now - self._last_line < PLAIN_LINE_EVERY_S and not begins:
            return
        self._last_line = now
        elapsed = now - self._started[stage]
        remaining = elapsed / done * (total - done) if done else 0.0
        tail = f", about {format_duration(remaining)} left" if done < total and done else ""
        say(f"{stage}: {done}/{total}{tail}")


def make_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, right_from: int = 1
) -> Table:
    """Build a table whose columns from ``right_from`` on are right-aligned."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(
            column, justify="right" if index >= right_from else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*row)
    return table
