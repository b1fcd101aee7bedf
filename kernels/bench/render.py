"""Writes the table of a measurement into kernels/README.md, between its two markers.

python kernels/bench/render.py results.json
"""

import json
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- cpu table: begin -->", "<!-- cpu table: end -->"
FORMS = ("step_by_step", "linear_loop", "parallel_scan", "mambapy")


def render(results: dict) -> str:
    """Markdown of one file of results."""
    measured = [form for form in FORMS if form in results["rows"][0]["forward"]["times_longer"]]
    names = [form.replace("_", " ") for form in measured]
    busy = results["load_average"] / results["processors"]
    lines = [
        f"Measured on {results['machine']} ({results['instruction_set']} there), "
        f"torch {results['torch']}, {results['dtype']}, {results['state']} states, one thread, "
        "medians of thread CPU time, interleaved in one process. The last columns say how many "
        "times longer each PyTorch form takes. "
        f"The machine ran {busy:.1f} processes per processor meanwhile; "
        "figures count from about 1.5 on as an upper bound only.",
        "",
        "| direction | length | channels | ns per element | spread | " + " | ".join(names) + " |",
        "|---|---|---|---|---|" + "---|" * len(names),
    ]
    for kind in ("forward", "forward_backward"):
        for row in results["rows"]:
            found = row[kind]
            ratios = [
                f"{found['times_longer'][form]:.0f}x" if form in found["times_longer"] else "-"
                for form in measured
            ]
            cells = [
                kind.replace("_", " + "),
                str(row["length"]),
                str(row["channels"]),
                f"{found['ns_per_element']:.2f}",
                f"{found['spread']:.0%}",
                *ratios,
            ]
            lines.append("| " + " | ".join(cells) + " |")
    for row in results["two_threads_over_one"]:
        lines += [
            "",
            f"Two threads over one, wall, length {row['length']}, {row['channels']} channels: "
            f"forward {row['forward']:.2f}x, forward + backward {row['forward_backward']:.2f}x.",
        ]
    return "\n".join(lines)


def main() -> None:
    results = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{render(results)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
