"""Time and memory until the first case of a list of a million rows is given out.

    python cli/bench/manifest.py [ROWS]

Writes the list to a temporary folder, in both formats, and opens each in a process of its own. The
driver of `predict --engine ray` does no more than that before it hands out its first case.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

READ = """
import resource, sys, time
from pathlib import Path
begun = time.perf_counter()
import medmamba.pipeline.predicting
from medmamba.dataset.manifest import open_cases
imported = time.perf_counter()
stream = open_cases(Path(sys.argv[1]), channels=2)
first = next(iter(stream))
took = time.perf_counter() - imported
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
assert stream.total == int(sys.argv[2]) and first.id == "case_0000000", (stream.total, first)
print(f"{took:.1f} s until the first case, {peak / 1e6:.0f} MB; imports {imported - begun:.1f} s")
"""


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        for write in (write_lines, write_table):
            begun = time.perf_counter()
            path = write(Path(folder), rows)
            for file in ("t1.nii.gz", "t2.nii.gz"):
                image = Path(folder) / "site_0" / "study_0000000" / file
                image.parent.mkdir(parents=True, exist_ok=True)
                image.touch()
            print(f"{path.name}: {rows} rows, {path.stat().st_size / 1e6:.0f} MB "
                  f"(written in {time.perf_counter() - begun:.0f} s)", flush=True)  # fmt: skip
            subprocess.run([sys.executable, "-c", READ, str(path), str(rows)], check=True)


def cells(number: int) -> tuple[str, str, str]:
    place = f"site_{number % 40}/study_{number:07d}"
    return f"case_{number:07d}", f"{place}/t1.nii.gz", f"{place}/t2.nii.gz"


def write_lines(folder: Path, rows: int) -> Path:
    path = folder / "cases.jsonl"
    with path.open("w") as lines:
        for number in range(rows):
            keys = ("case_id", "channel_0", "channel_1")
            lines.write(json.dumps(dict(zip(keys, cells(number), strict=True))) + "\n")
    return path


def write_table(folder: Path, rows: int) -> Path:
    path = folder / "cases.csv"
    with path.open("w") as lines:
        lines.write("case_id,channel_0,channel_1\n")
        lines.writelines(",".join(cells(number)) + "\n" for number in range(rows))
    return path


if __name__ == "__main__":
    main()
