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

COLUMN_FRAME = 3
"""Characters around each column of a table: a line and two spaces."""

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


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, right_from: int = 1
) -> None:
    """Print a table whose columns from ``right_from`` on are right-aligned numbers.

    Numbers that do not fit beside each other follow in further tables with the same first column.
    """
    texts, numbers = columns[:right_from], columns[right_from:]
    cells = list(zip(*rows, strict=True)) if rows else [()] * len(columns)
    # Rich shortens the widest columns first, in the middle of words and numbers.
    widths = [_longest_word(column) for column in columns]
    for index, values in enumerate(cells):
        measure = _longest_word if index < right_from else len
        widths[index] = max([widths[index], *map(measure, values)])
    for number, group in enumerate(_groups_that_fit(widths) if numbers else [range(len(texts))]):
        table = Table(
            title=None if number else title,
            title_justify="left",
            title_style="bold",
            header_style="bold",
        )
        free = data.width - _table_width([widths[index] for index in group])
        for index in group:
            more = max(0, min(free, max(map(len, (columns[index], *cells[index]))) - widths[index]))
            free -= more
            table.add_column(
                columns[index],
                justify="right" if index >= right_from else "left",
                overflow="fold",
                width=widths[index] + more if numbers else None,
            )
        for row in rows:
            table.add_row(*(row[index] for index in group))
        data.print(table)


def _longest_word(text: str) -> int:
    return max(map(len, text.split()), default=0)


def _groups_that_fit(widths: Sequence[int]) -> list[list[int]]:
    """Put as many columns beside each other as fit; the first one is in every group."""
    groups = [[0]]
    for index in range(1, len(widths)):
        wider = [*groups[-1], index]
        if len(wider) > 2 and _table_width([widths[place] for place in wider]) > data.width:
            groups.append([0, index])
        else:
            groups[-1] = wider
    return groups


def _table_width(widths: Sequence[int]) -> int:
    return sum(widths) + COLUMN_FRAME * len(widths) + 1
