"""Time the report of many cases, and weigh it: python cli/bench/report.py [--cases 100].

`--interactive` puts the viewer in.

Images are noise with ellipsoids, which compresses worse than anatomy does; masks have five labels.
The page is checked before a time is printed.
"""

import argparse
import dataclasses
import platform
import tempfile
import time
from pathlib import Path

import numpy as np

from medmamba import __version__
from medmamba.files import to_json, write_atomic
from medmamba.inference.records import CommitRecord, ModelIdentity, describe_file, describe_labels
from medmamba.io import read_header, write_image, write_labels
from medmamba.labels import LabelMap
from medmamba.reporting import write_report
from medmamba.volume import Geometry

SHAPE = (96, 224, 224)
LABELS = LabelMap(values={"background": (0,), **{f"organ {i}": (i,) for i in range(1, 6)}})


def make_case(place: Path, number: int) -> None:
    """A CT-like image, its mask and its record."""
    rng = np.random.default_rng(number)
    z, y, x = np.ogrid[-1:1:96j, -1:1:224j, -1:1:224j]
    body = z**2 / 2 + y**2 + x**2 < 0.8
    image = np.where(body, 40, -1000).astype(np.int16) + rng.integers(-30, 30, SHAPE, np.int16)
    labels = np.zeros(SHAPE, np.uint8)
    for value in range(1, 6):
        centre = rng.uniform(-0.4, 0.4, 3)
        inside = (z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2 < 0.05
        labels[inside], image[inside] = value, image[inside] + 20 * value
    name = f"case_{number:03d}"
    path = place / "images" / f"{name}_0000.nii.gz"
    write_image(path, image, Geometry.from_spacing(SHAPE, (2.5, 1.5, 1.5)))
    header = read_header(path)
    mask = place / "masks" / f"{name}.nii.gz"
    write_labels(mask, labels, header)
    record = CommitRecord(
        case_id=name,
        status="ok",
        geometry=header.geometry,
        model=ModelIdentity(name="bench", sha256=""),
        labels=describe_labels(labels, header.geometry, LABELS),
        output=describe_file(mask),
    )
    write_atomic(place / "masks" / f"{name}.json", to_json(dataclasses.replace(record)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--interactive", action="store_true", help="with the viewer in it")
    parser.add_argument("--keep", type=Path, help="folder for the files; not removed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = options.keep or Path(scratch)
        for number in range(options.cases):
            make_case(place, number)
        for _ in range(options.repeats):
            start, busy = time.perf_counter(), time.process_time()
            outcome = write_report(
                place / "masks", images=place / "images", interactive=options.interactive
            )
            took, busy = time.perf_counter() - start, time.process_time() - busy
            text = outcome.path.read_text(encoding="utf-8")
            assert outcome.pictures == options.cases == text.count("axial view of")
            size = outcome.path.stat().st_size / 2**20
            print(
                f"{options.cases} cases of {'x'.join(map(str, SHAPE))}"
                f"{', interactive' * options.interactive}: {took:.1f} s "
                f"({busy:.1f} s of processor time), {size:.1f} MiB; "
                f"medmamba {__version__}, Python {platform.python_version()}"
            )


if __name__ == "__main__":
    main()
