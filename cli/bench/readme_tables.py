"""Writes README's tables from the results that lie beside the benchmarks, between their markers.

python cli/bench/readme_tables.py [--networks]

`--networks` counts the networks anew first (as `medmamba info networks`, a minute). The other
figures come from cli/bench/short_run.py, cli/bench/ten_minutes.py and kernels/bench/networks.py,
which need a machine of their own to be worth printing.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
NETWORKS = ROOT / "cli" / "bench" / "results" / "networks.json"
SHORT_RUNS = ROOT / "cli" / "bench" / "results" / "short_runs.json"
TEN_MINUTES = ROOT / "cli" / "bench" / "results" / "ten_minutes.json"
SCAN = ROOT / "kernels" / "bench" / "results" / "networks.json"


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def minutes(run: dict[str, Any]) -> str:
    return str(run["max_time"]).replace("m", " min")


def networks(results: list[dict[str, Any]]) -> str:
    """Every network once: in 3D where it has that form; with its score where it has been run."""
    scores = {
        run["network"]: f"{run['dice']:.2f} after {minutes(run)}"
        for run in json.loads(SHORT_RUNS.read_text(encoding="utf-8"))["runs"]
    }
    chosen = {row["name"]: row for row in sorted(results, key=lambda row: row["dimension"])}
    rows = [
        [
            f"`{name}`",
            f"{chosen[name]['dimension']}D",
            chosen[name]["summary"],
            f"{chosen[name]['parameters'] / 1e6:.1f} M",
            f"{chosen[name]['operations'] / 1e9:,.0f}",
            f"{chosen[name]['activation_bytes_per_voxel']:,.0f}",
            scores.get(name, "-"),
        ]
        for name in sorted(chosen)
    ]
    columns = ["network", "", "what it is", "parameters", "GFLOP", "bytes a voxel"]
    return table([*columns, "Hippocampus Dice"], rows)


def short_runs(results: dict[str, Any]) -> str:
    """Minutes of training on a CPU, and what came of them."""
    runs = results["runs"]
    labels = list(runs[0]["labels"])
    rows = [
        [
            f"`{run['network']}`",
            minutes(run),
            run["processor"],
            f"{run['dice']:.3f}",
            *(f"{run['labels'][label]['dice']:.3f}" for label in labels),
            " / ".join(f"{run['labels'][label]['hd95_mm']:.1f}" for label in labels),
            str(run["steps"]),
            f"{run['predict_s']:.1f} s",
        ]
        for run in runs
    ]
    cases = runs[0]["cases"]
    columns = [
        "network",
        "training",
        "processor",
        "mean foreground Dice",
        *labels,
        "HD95 mm",
        "steps",
    ]
    return table([*columns, f"{cases} cases from a cold start"], rows)


def ten_minutes(results: dict[str, Any]) -> str:
    """Programs under one budget, several seeds each."""
    rows = []
    for program in dict.fromkeys(run["program"] for run in results["runs"]):
        runs = [run for run in results["runs"] if run["program"] == program]
        dice = [run["dice"] for run in runs]
        name = f"nnunetv2 {results['machine']['packages']['nnunetv2']}, its own trainer"
        rows.append(
            [
                name if program == "nnunet" else f"medmamba, `{program}`",
                f"{statistics.mean(dice):.3f}",
                " ".join(f"{value:.3f}" for value in dice),
                f"{statistics.median(run['steps'] for run in runs):.0f}",
            ]
        )
    return table(["program", "mean foreground Dice", "each seed", "steps"], rows)


def scan(results: dict[str, Any]) -> str:
    """The compiled scan against the step-by-step one, through whole networks."""
    rows = [
        [
            row["network"],
            f"{row['forward_s']:.2f}",
            f"{row['step_s']:.2f}",
            f"{row['reference_forward_s']:.1f}",
            f"{row['reference_step_s']:.1f}",
            f"{row['reference_forward_s'] / row['forward_s']:.0f}x, "
            f"{row['reference_step_s'] / row['step_s']:.0f}x",
        ]
        for row in results["rows"]
    ]
    columns = ["network", "forward", "training step", "step by step: forward", "training step"]
    return table([*columns, "ratio"], rows)


TABLES: dict[str, tuple[Path, Callable[[Any], str]]] = {
    "networks": (NETWORKS, networks),
    "short runs": (SHORT_RUNS, short_runs),
    "ten minutes": (TEN_MINUTES, ten_minutes),
    "scan": (SCAN, scan),
}


def rewritten(text: str) -> str:
    """The text with every table made anew."""
    for name, (path, render) in TABLES.items():
        begin, end = f"<!-- table: {name} -->\n", f"\n<!-- end of table: {name} -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"README.md: the markers of the table '{name}' are not there")
        results = json.loads(path.read_text(encoding="utf-8"))
        text = f"{before}{begin}{render(results)}{end}{after}"
    return text


def count_networks() -> None:
    from medmamba.files import to_plain
    from medmamba.networks.describe import describe_networks

    rows = [to_plain(row) for row in describe_networks()]
    NETWORKS.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", action="store_true")
    if parser.parse_args().networks:
        count_networks()
    README.write_text(rewritten(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
