"""What a comparison leaves: CSV of every case, JSON, pictures, one page that needs no other.

The same page is written as Markdown too, for repositories that show it.
"""

import base64
from html import escape
from pathlib import Path

from medmamba.evaluation.comparison import SEEDS_FOR_A_CLAIM
from medmamba.evaluation.comparison_figures import plot_cost, plot_paired
from medmamba.files import to_csv, to_json, write_atomic
from medmamba.networks.describe import OPERATIONS_FORMULA
from medmamba.pipeline.comparing import CompareOutcome, Entry, outcome_to_plain

PAIRED, COST = "paired.png", "dice_against_cost.png"

DISCLAIMER = "Research use only. Not a medical device."

STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:62em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.3em .8em;border-bottom:1px solid "
    "#ddd;text-align:right}td:first-child,th:first-child{text-align:left}img{max-width:100%}"
    "code{background:#f3f3f3;padding:.1em .3em}"
)


def write_report(outcome: CompareOutcome) -> Path:
    """Write ``cases.csv``, ``comparison.json``, two PNGs, ``report.md`` and ``report.html``.

    Returns ``report.html``, which holds the pictures.

    Raises:
        EnvironmentFault: the folder cannot be written.
    """
    folder = outcome.folder
    write_atomic(folder / "cases.csv", _cases_csv(outcome))
    write_atomic(folder / "comparison.json", to_json(outcome_to_plain(outcome)))
    entries = {entry.contestant.name: entry for entry in outcome.entries}
    scores = {name: entry.scores for name, entry in entries.items()}
    plot_paired(scores, outcome.entries[0].cases, folder / PAIRED)
    costs = {
        "parameters, millions": {n: parameters(e) / 1e6 for n, e in entries.items()},
        "GFLOP of a patch": {n: operations(e) / 1e9 for n, e in entries.items()},
        "s of prediction per case": {n: prediction_s(e) for n, e in entries.items()},
    }
    seeds = {name: entry.scores.mean(1).tolist() for name, entry in entries.items()}
    plot_cost(seeds, costs, folder / COST)
    write_atomic(folder / "report.md", _markdown(outcome))
    write_atomic(folder / "report.html", _page(outcome))
    return folder / "report.html"


def score_rows(outcome: CompareOutcome) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows of the table of scores and verdicts."""
    header = (
        "network", "Dice", "seed spread", "difference", "95 % interval", "Wilcoxon p",
        "seeds alone", "verdict",
    )  # fmt: skip
    first = outcome.entries[0]
    spread = outcome.pairs[0].spreads[0]
    rows: list[tuple[str, ...]] = []
    rows.append(
        (first.contestant.name, f"{first.dice:.4f}", _number(spread), *["-"] * 4, "reference")
    )
    for entry, pair in zip(outcome.entries[1:], outcome.pairs, strict=True):
        rows.append(
            (
                entry.contestant.name,
                f"{entry.dice:.4f}",
                _number(pair.spreads[1]),
                f"{pair.difference:+.4f}",
                f"{pair.low:+.4f} to {pair.high:+.4f}",
                _number(pair.wilcoxon_p),
                _number(pair.seed_margin),
                pair.verdict,
            )
        )
    return header, rows


def cost_rows(outcome: CompareOutcome) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows of the table of costs; means over runs, the most for memory."""
    header = (
        "network", "parameters", "GFLOP", "training s", "steps", "peak GB", "prediction s/case",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for entry in outcome.entries:
        results = [result for _, _, result in entry.runs]
        count = len(results)
        rows.append(
            (
                entry.contestant.name,
                f"{parameters(entry):,}",
                f"{operations(entry) / 1e9:.3f}",
                f"{sum(result.seconds for result in results) / count:.1f}",
                f"{sum(result.steps for result in results) / count:.0f}",
                f"{max(result.memory_gb for result in results):.2f}",
                f"{prediction_s(entry):.2f}",
            )
        )
    return header, rows


def remarks(outcome: CompareOutcome) -> list[str]:
    """Return what has to be said beside the tables."""
    conditions = outcome.conditions
    length = (
        f"{conditions.max_time_s:g} s of wall-clock time each"
        if conditions.max_time_s is not None
        else f"{conditions.epochs or 'the recipe'}"
        f"{' epochs' if conditions.epochs else chr(39) + 's epochs'}"
        f" of {conditions.iterations or 'its'} iterations each"
    )
    seeds = min(len(entry.contestant.seeds) for entry in outcome.entries)
    result = outcome.entries[0].runs[0][2]
    texts = [
        f"Split: fold {', '.join(map(str, outcome.folds))}, "
        f"{len(outcome.entries[0].cases)} validation cases; {length}; recipe "
        f"{conditions.recipe or 'of the plan'}; patch, batch and spacing of {conditions.frame} "
        f"{conditions.configuration}; {result.device} in {result.precision}; predicted without "
        "mirroring, with the weights at the end of training.",
        "Difference: mean Dice over cases and seeds, minus that of the first network. Interval: "
        "bootstrap over cases (paired) and seeds. Wilcoxon: over cases, of means over seeds. "
        "Seeds alone: difference that other seeds reach in 5 % of comparisons. A difference below "
        "it, or an interval that contains zero, is no difference.",
        f"GFLOP: one forward pass of a patch; {OPERATIONS_FORMULA}.",
    ]
    if seeds < SEEDS_FOR_A_CLAIM:
        texts.append(
            f"Only {seeds} seed{'s' if seeds > 1 else ''} per network: this supports no claim; "
            f"use at least {SEEDS_FOR_A_CLAIM}."
        )
    return texts


def parameters(entry: Entry) -> int:
    """Number of values that are trained."""
    return entry.runs[0][2].parameters


def operations(entry: Entry) -> int:
    """Of a forward pass over a patch."""
    return entry.runs[0][2].operations


def prediction_s(entry: Entry) -> float:
    """Mean over runs of the seconds per case."""
    return sum(result.prediction_s for _, _, result in entry.runs) / len(entry.runs)


def _cases_csv(outcome: CompareOutcome) -> str:
    rows = [
        [entry.contestant.name, fold, seed, case, label, dice]
        for entry in outcome.entries
        for fold, seed, result in entry.runs
        for case, labels in result.dice.items()
        for label, dice in labels.items()
    ]
    return to_csv(["network", "fold", "seed", "case", "label", "Dice"], rows)


def _page(outcome: CompareOutcome) -> str:
    names = ", ".join(entry.contestant.name for entry in outcome.entries)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>Comparison: {escape(names)}</title><style>{STYLE}</style>",
        f"<h1>Comparison</h1><p>{escape(names)}</p>",
        _table("Scores", *score_rows(outcome)),
        _table("Cost", *cost_rows(outcome)),
        *(f"<p>{escape(text)}</p>" for text in remarks(outcome)),
        f"<p>Command: <code>{escape(outcome.command)}</code></p>" if outcome.command else "",
        *(_picture(outcome.folder / name) for name in (PAIRED, COST)),
        f"<p>{DISCLAIMER}</p></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<h2>{title}</h2><table><tr>{head}</tr>{body}</table>"


def _markdown(outcome: CompareOutcome) -> str:
    parts = [
        "# Comparison",
        "## Scores",
        _markdown_table(*score_rows(outcome)),
        "## Cost",
        _markdown_table(*cost_rows(outcome)),
        *remarks(outcome),
        f"Command: `{outcome.command}`" if outcome.command else "",
        f"![Dice of every case]({PAIRED})",
        f"![Dice against cost]({COST})",
        DISCLAIMER,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(path.stem)}" src="data:image/png;base64,{data}">'


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.4f}"
