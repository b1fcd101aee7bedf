"""Curves of a training run as one picture: loss, Dice, learning rate over epochs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medmamba.files import replace_atomic

COLOURS = {"training": "#1f5a94", "validation": "#d1602b", "smoothed": "#222222"}


MARKED_EPOCHS = 60
"""Points are marked up to this many epochs; beyond it they would merge into a band."""

CLASSES_SHOWN = 8


def plot_curves(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str = "") -> None:
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

    figure = Figure(figsize=(9, 8), layout="constrained")
    FigureCanvasAgg(figure)
    loss, dice, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1))
    number = [row["epoch"] + 1 for row in epochs]
    style = {"marker": "." if len(epochs) <= MARKED_EPOCHS else "", "linewidth": 1.5}
    for key, label in (("loss", "training"), ("validation_loss", "validation")):
        loss.plot(number, _values(epochs, key), label=label, color=COLOURS[label], **style)
    loss.set_ylabel("loss")
    _plot_dice(dice, number, epochs, marker=style["marker"])
    rate.plot(number, _values(epochs, "learning_rate"), color=COLOURS["training"], **style)
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    rate.set_xlabel("epoch")
    # Epochs are whole; one alone still needs an axis.
    rate.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True, min_n_ticks=1))
    rate.set_xlim(min(number) - 0.5, max(number) + 0.5)
    loss.set_title(title, loc="left", fontsize=11)
    for axes in (loss, dice):
        # Beside the axes, where no curve ever is.
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
    for axes in (loss, dice, rate):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    replace_atomic(path, lambda temporary: figure.savefig(temporary, dpi=110))


def _values(epochs: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [float("nan") if row.get(key) is None else float(row[key]) for row in epochs]


def _plot_dice(
    axes: Any, number: list[int], epochs: Sequence[Mapping[str, Any]], *, marker: str | float
) -> None:
    names = list(epochs[-1].get("dice_per_class") or {})
    for name in names[:CLASSES_SHOWN]:
        line = _values([row.get("dice_per_class") or {} for row in epochs], name)
        axes.plot(number, line, label=name, alpha=0.6, linewidth=1, marker=marker)
    mean, smoothed = _values(epochs, "dice"), _values(epochs, "ema_dice")
    axes.plot(number, mean, label="mean", color=COLOURS["smoothed"], linewidth=2)
    axes.plot(
        number, smoothed, label="mean, smoothed", color=COLOURS["smoothed"], lw=1.2, ls="--"
    )  # fmt: skip
    known = [(value, where) for value, where in zip(mean, number, strict=True) if value == value]
    if known:
        best, where = max(known)
        axes.plot([where], [best], "o", ms=6, mfc="none", color=COLOURS["validation"],
                  label=f"best mean {best:.3f}\n(epoch {where})")  # fmt: skip
    axes.set_ylabel("validation Dice (patches)")
    axes.set_ylim(0, 1)
    if len(names) > CLASSES_SHOWN:
        axes.text(1.01, 0.0, f"{len(names) - CLASSES_SHOWN} more classes\nin log.jsonl",
                  transform=axes.transAxes, fontsize=8, va="bottom")  # fmt: skip
