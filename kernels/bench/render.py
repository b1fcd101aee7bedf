"""Writes the table of a measurement into kernels/README.md, between its two markers.

python kernels/bench/render.py results.json
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from figures import figures

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- cpu table: begin -->", "<!-- cpu table: end -->"
FORMS = ("step_by_step", "linear_loop", "tight_loop", "parallel_scan", "mambapy")


def render(results: dict) -> str:
    """Markdown of one file of results."""
    lines = [
        f"Measured on {results['machine']} (instruction set {results['instruction_set']}, "
        f"{results['processors']} processors, load {results['load_before']:.1f} before), "
        f"torch {results['torch']}, {results['dtype']}, {results['state']} states, one thread, "
        "medians of thread CPU time, interleaved in one process; spread is the interquartile range "
        "over the median. The last columns say how many times longer each PyTorch form takes.",
        "",
        *_table(
            ("figure, 4096 tokens", "measured", "must", "stretch", "reached"),
            [figure.cells() for figure in figures(results)],
        ),
        "",
        *_rows(results),
        "",
        *_table(
            ("instruction set", "forward, ns per element", "forward + backward"),
            [
                (name, f"{found['forward']:.2f}", f"{found['forward_backward']:.2f}")
                for name, found in results["instruction_sets"].items()
            ],
        ),
    ]
    return "\n".join(lines)


def _rows(results: dict) -> list[str]:
    measured = [form for form in FORMS if form in results["rows"][0]["forward"]["times_longer"]]
    names = [form.replace("_", " ") for form in measured]
    body = []
    for kind in ("forward", "forward_backward"):
        for row in results["rows"]:
            found = row[kind]
            ratios = [
                f"{found['times_longer'][form]:.0f}x" if form in found["times_longer"] else "-"
                for form in measured
            ]
            body.append(
                (
                    kind.replace("_", " + "),
                    str(row["length"]),
                    str(row["channels"]),
                    f"{found['ns_per_element']:.2f}",
                    f"{found['spread']:.0%}",
                    *ratios,
                )
            )
    return _table(("direction", "length", "channels", "ns per element", "spread", *names), body)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(row) + " |" for row in cells]


def main() -> None:
    results = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{render(results)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
