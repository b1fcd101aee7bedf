"""What a person sees of training, on a terminal and in a log."""

import io

import pytest
from rich.console import Console

from medmamba.cli import display, train_progress
from medmamba.cli.train_progress import TrainingDisplay
from medmamba.training.progress import StepReport


def report(step: int, *, validating: bool = False) -> StepReport:
    return StepReport(
        epoch=1, epochs=20, validating=validating, step=step, steps=30, loss=-0.25,
        patches_per_s=2.04, memory_gb=1.2, remaining_s=75.0,
    )  # fmt: skip


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(train_progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_a_minute_and_no_control_characters(clock, capsys) -> None:
    with TrainingDisplay("fold 3") as show:
        for step in range(1, 31):
            clock[0] += 5.0
            show.on_step(report(step))
    shown = capsys.readouterr().err
    assert shown.splitlines() == [
        f"fold 3    epoch 2/20: {step}/30  loss -0.2500  2.0 patches/s  1.2 GB  left 1 min 15 s"
        for step in (12, 24)
    ]


def test_a_terminal_gets_a_bar_that_leaves_nothing_behind(clock, monkeypatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, _environ={"TERM": "xterm"})
    monkeypatch.setattr(display, "talk", console)
    with TrainingDisplay() as show:
        for step in (1, 2, 3):
            clock[0] += 1.0
            show.on_step(report(step, validating=True))
        show.say("a line above")
    text = screen.getvalue()
    assert "epoch 2/20, validating" in text
    assert "3/30" in text
    assert text.rstrip().rindex("a line above") > text.rindex("3/30")
