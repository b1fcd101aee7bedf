"""Curves of a training run as one picture: loss, Dice, learning rate over epochs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medmamba.files import replace_atomic

COLOURS = {"training": "#1f5a94", "validation": "#d1602b", "smoothed": "#222222"}


def plot_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the epochs among the rows of a ``log.jsonl`` as a PNG; nothing without epochs.

    Raises:
        EnvironmentFault: the file cannot be written.
    """
    epochs = [row for row in rows if row.get("kind") == "epoch"]
    if not epochs:
        return
    # Imported here because it takes a second; the canvas is used without pyplot's global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: TID251
    from matplotlib.figure import Figure  # noqa: TID251
    from matplotlib.ticker import MaxNLocator  # noqa: TID251

    figure = Figure(figsize=(8, 8), layout="constrained")
    FigureCanvasAgg(figure)
    loss, dice, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1))
    number = [row["epoch"] + 1 for row in epochs]

    def values(key: str) -> list[float]:
        return [float("nan") if row.get(key) is None else float(row[key]) for row in epochs]

    style = {"marker": ".", "linewidth": 1.5}
    loss.plot(number, values("loss"), label="training", color=COLOURS["training"], **style)
    loss.plot(
        number, values("validation_loss"), label="validation", color=COLOURS["validation"], **style
    )
    loss.set_ylabel("loss")
    _plot_classes(dice, number, epochs)
    dice.plot(number, values("ema_dice"), label="smoothed mean", color=COLOURS["smoothed"], lw=2.5)
    dice.set_ylabel("validation Dice (patches)")
    dice.set_ylim(0, 1)
    rate.plot(number, values("learning_rate"), color=COLOURS["training"], **style)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("epoch")
    rate.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (loss, dice):
        axes.legend(loc="best", frameon=False, fontsize=9)
    for axes in (loss, dice, rate):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    replace_atomic(path, lambda temporary: figure.savefig(temporary, dpi=110))


def _plot_classes(axes: Any, number: list[int], epochs: Sequence[Mapping[str, Any]]) -> None:
    names = list(epochs[-1].get("dice_per_class") or {})
    for name in names[:8]:
        line = [(row.get("dice_per_class") or {}).get(name) for row in epochs]
        clean = [float("nan") if value is None else value for value in line]
        axes.plot(number, clean, label=name, alpha=0.6, linewidth=1, marker=".")
