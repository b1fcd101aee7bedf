"""Spoil image files at random and hold the input gate to its word.

``python cli/bench/fuzz.py [--mutations 10000] [--seed 0]``. Small NIfTI files (both versions, both
byte orders, compressed and plain) are cut, lengthened and overwritten. For every one the gate must
answer within two seconds, with a code and never with a traceback, in less than 300 MB more memory;
and a compressed file, whose checksum covers every byte of content, must be rejected or read as the
very image it was. Exit code 1 where it is not so.
"""

import argparse
import gzip
import platform
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import nibabel  # noqa: TID251 writes the corpus
import numpy as np

from medmamba.errors import InputError
from medmamba.io import check_file, read_image

LIMIT_S = 2
LIMIT_BYTES = 300 * 2**20
HEADER_BYTES = {1: 352, 2: 544}
EXTREMES = (b"\0\0", b"\xff\xff", b"\xff\x7f", b"\0\x80", b"\0\0\xc0\x7f", b"\0\0\x80\x7f")


def corpus() -> list[tuple[str, bytes]]:
    """Return names' endings and contents of good files."""
    affine = np.diag([1.0, 1.25, 2.0, 1.0])
    values = np.random.default_rng(0).integers(-40, 900, (20, 24, 16)).astype(np.int16)
    files = []
    for version, kind in ((1, nibabel.Nifti1Image), (2, nibabel.Nifti2Image)):
        for order in "<>":
            header = kind.header_class(endianness=order)
            image = kind(values, affine, header)
            image.set_sform(affine, 1)
            image.set_qform(affine, 1)
            raw = image.to_bytes()
            assert len(raw) > HEADER_BYTES[version]
            files += [(".nii", raw), (".nii.gz", gzip.compress(raw, 6, mtime=0))]
    return files


def mutate(content: bytes, dice: random.Random, header: int) -> bytes:
    """Cut, lengthen, or overwrite one to eight places, half of them in the header."""
    data = bytearray(content)
    kind = dice.randrange(10)
    if kind == 0:
        return bytes(data[: dice.randrange(len(data))])
    if kind == 1:
        return bytes(data) + dice.randbytes(dice.randrange(1, 4096))
    if kind == 2:
        start = dice.randrange(len(data))
        del data[start : start + dice.randrange(1, 64)]
        return bytes(data)
    for _ in range(dice.randint(1, 8)):
        place = dice.randrange(header if dice.random() < 0.5 else len(data))
        new = dice.choice(EXTREMES) if dice.random() < 0.3 else dice.randbytes(1)
        data[place : place + len(new)] = new
    return bytes(data)


class TooSlowError(BaseException):
    """The gate did not answer in time."""


def _ring(number: int, frame: object) -> None:
    raise TooSlowError


def judge(path: Path, original: bytes) -> str:
    """Return the code the gate gave, ``accepted``, or in capitals what it must not do."""
    signal.alarm(LIMIT_S)
    try:
        errors = [finding.code for finding in check_file(path) if finding.code.startswith("E_")]
        if errors:
            return errors[0]
        if path.name.endswith(".gz") and path.read_bytes() != original:
            return "accepted" if _same_image(path, original) else "SILENTLY ACCEPTED"
    except TooSlowError:
        return "HANG"
    except Exception as error:
        return f"CRASH {type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    return "accepted"


def _same_image(path: Path, original: bytes) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        good = Path(folder) / "good.nii.gz"
        good.write_bytes(original)
        try:
            found, expected = (read_image(each)[0] for each in (path, good))
        except InputError:
            return False
    same = np.array_equal(found.array, expected.array)
    return bool(same) and found.geometry == expected.geometry


def main() -> int:
    """Run the mutations and print what the gate made of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, _ring)
    dice = random.Random(options.seed)
    files = corpus()
    verdicts: Counter[str] = Counter()
    begun = time.monotonic()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(options.mutations):
            ending, content = files[number % len(files)]
            path = Path(folder) / f"image{ending}"
            path.write_bytes(mutate(content, dice, min(352, len(content))))
            start = time.monotonic()
            verdicts[judge(path, content)] += 1
            slowest = max(slowest, time.monotonic() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    bad = sum(count for verdict, count in verdicts.items() if verdict[:2] not in ("E_", "ac"))
    bad += grown > LIMIT_BYTES
    for verdict, count in verdicts.most_common():
        print(f"{count:7} {verdict}")
    print(
        f"{options.mutations} mutations in {time.monotonic() - begun:.0f} s, "
        f"slowest {slowest:.3f} s, memory grew by {grown / 2**20:.0f} MiB; "
        f"Python {platform.python_version()}; "
        f"{'all as promised' if not bad else f'{bad} broken promises'}"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
