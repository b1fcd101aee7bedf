"""Time and memory until the first case of a list of a million rows is given out.

    python cli/bench/manifest.py [ROWS] [MODEL IMAGE]

Writes the list to a temporary folder, in both formats, and opens each in a process of its own. With
a model folder and an image for it (one file), the first rows are copies of that image, and
`medmamba predict --engine ray` runs on a cluster of this machine until their first record is there;
the memory is the most that its driver has held.
"""

import json
import os
import shutil
import signal
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
stream = open_cases(Path(sys.argv[1]), channels=1)
next(iter(stream))
took = time.perf_counter() - imported
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
assert stream.total == int(sys.argv[2])
print(f"{took:.1f} s until the first case, {peak / 1e6:.0f} MB; imports {imported - begun:.1f} s")
"""
REAL_IMAGES = 50


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        for write in (write_lines, write_table):
            path = write(Path(folder), rows)
            print(f"{path.name}: {rows} rows, {path.stat().st_size / 1e6:.0f} MB", flush=True)
            subprocess.run([sys.executable, "-c", READ, str(path), str(rows)], check=True)
        if len(sys.argv) > 2:
            predict(Path(folder), Path(sys.argv[2]), Path(sys.argv[3]))


def cells(number: int) -> tuple[str, str]:
    return f"case_{number:07d}", f"site_{number % 40}/study_{number:07d}/t1.nii.gz"


def write_lines(folder: Path, rows: int) -> Path:
    path = folder / "cases.jsonl"
    with path.open("w") as lines:
        for number in range(rows):
            name, file = cells(number)
            lines.write(json.dumps({"case_id": name, "channel_0": file}) + "\n")
    return path


def write_table(folder: Path, rows: int) -> Path:
    path = folder / "cases.csv"
    with path.open("w") as lines:
        lines.write("case_id,channel_0\n")
        lines.writelines(",".join(cells(number)) + "\n" for number in range(rows))
    return path


def predict(folder: Path, model: Path, image: Path) -> None:
    for number in range(REAL_IMAGES):
        copy = folder / cells(number)[1]
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, copy)
    command = ["predict", "-i", str(folder / "cases.jsonl"), "-o", str(folder / "masks")]
    command += ["-m", str(model), "--engine", "ray", "--address", "local"]
    begun = time.perf_counter()
    driver = subprocess.Popen([sys.executable, "-m", "medmamba", *command],
                              stderr=subprocess.DEVNULL, env={**os.environ})  # fmt: skip
    handed_out = 0.0
    while not (folder / "masks" / f"{cells(REAL_IMAGES - 1)[0]}.json").exists():
        assert driver.poll() is None, "the driver ended"
        if not handed_out and any((folder / "masks").glob("case_*.json")):
            handed_out = time.perf_counter() - begun
        time.sleep(0.05)
    status = Path(f"/proc/{driver.pid}/status").read_text()
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    driver.send_signal(signal.SIGTERM)
    driver.wait()
    print(f"predict --engine ray: {handed_out:.1f} s from its start until the first record, "
          f"{int(peak) * 1024 / 1e6:.0f} MB after {REAL_IMAGES} cases")  # fmt: skip


if __name__ == "__main__":
    main()
