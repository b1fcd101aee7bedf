"""Pictures of a comparison: scores case by case, and Dice against cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from medmamba.evaluation.comparison import Scores
from medmamba.evaluation.palette import label_colors
from medmamba.files import replace_atomic

DOTS_PER_INCH = 120

LEGEND_EXTRA_LETTERS = 22
"""Beside a name: its marker and its mean."""


def plot_paired(scores: Mapping[str, Scores], cases: Sequence[str], path: Path) -> None:
    """Draw the score of each case: a point per network (mean of seeds) and a line over seeds.

    Args:
        scores: name -> (S, C).
        cases: C names.
        path: where the PNG goes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: TID251
    from matplotlib.figure import Figure  # noqa: TID251

    names, colors = list(scores), label_colors(scores)
    order = np.argsort(next(iter(scores.values())).mean(0))
    figure = Figure(figsize=(max(7.0, 0.45 * len(cases) + 2), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for index, name in enumerate(names):
        shift = (index - (len(names) - 1) / 2) * 0.6 / len(names)
        place = np.arange(len(cases)) + shift
        table = scores[name][:, order]
        axes.vlines(place, table.min(0), table.max(0), color=colors[name], alpha=0.5, linewidth=2.5)
        axes.plot(place, table.mean(0), "o", color=colors[name], markersize=5,
                  label=f"{name}  (mean {table.mean():.3f})")  # fmt: skip
    axes.set_xticks(range(len(cases)), [cases[i] for i in order], rotation=60, ha="right")
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylabel("Dice, mean of labels")
    axes.set_title("Validation cases: mean of seeds (point) and range of seeds (line)", fontsize=11)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    # A line of the legend holds about ten letters an inch; names of twins are long.
    widest = max(len(name) for name in names) + LEGEND_EXTRA_LETTERS
    fitting = max(1, int(figure.get_figwidth() * 10 / widest))
    figure.legend(
        loc="outside lower center", ncols=min(fitting, len(names)), frameon=False, fontsize=9
    )
    replace_atomic(path, lambda temporary: figure.savefig(temporary, dpi=DOTS_PER_INCH))


def plot_cost(
    dice: Mapping[str, Sequence[float]], costs: Mapping[str, Mapping[str, float]], path: Path
) -> None:
    """Draw mean Dice of each seed against each kind of cost.

    Args:
        dice: name -> mean Dice per seed.
        costs: kind with its unit -> name -> cost.
        path: where the PNG goes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: TID251
    from matplotlib.figure import Figure  # noqa: TID251

    colors = label_colors(dice)
    figure = Figure(figsize=(3.4 * len(costs) + 0.6, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for axes, (kind, values) in zip(panels, costs.items(), strict=True):
        for name, seeds in dice.items():
            axes.plot([values[name]] * len(seeds), seeds, ".", color=colors[name], alpha=0.6)
            axes.plot(values[name], np.mean(seeds), "o", markersize=8, color=colors[name],
                      label=name)  # fmt: skip
        axes.set_xlabel(kind)
        axes.set_xlim(0, 1.15 * max(values.values()))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("Dice: each seed and mean")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(dice)),
                  frameon=False, fontsize=9)  # fmt: skip
    replace_atomic(path, lambda temporary: figure.savefig(temporary, dpi=DOTS_PER_INCH))
