"""Faults of the process and the machine through the real command (rows A19 and G).

Between two good cases others are struck by failpoints, several in one run. Rows that need a GPU
are simulated in ``tests/inference``: a fake allocator that runs out of memory (G1, G2), a worker
that says that its device is lost (G6). The sweep over all points (G10) is there, too.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import medmamba
from medmamba.files import to_plain
from medmamba.inference.records import read_record

from ..test_bundle import change_manifest
from .phantom import nifti, packed, voxels

GOOD = ("00good", "zzgood")
THREE = ("00good", "bad", "zzgood")


def write(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        content = packed(nifti(voxels(zlib.crc32(name.encode()))))
        (folder / f"{name}_0000.nii.gz").write_bytes(content)
    return folder


def command(images: Path, output: Path, model: Path, *options: object) -> list[str]:
    return [sys.executable, "-m", "medmamba", "predict", "-i", str(images), "-o", str(output),
            "-m", str(model), "--no-report", *map(str, options)]  # fmt: skip


def run(*arguments: object, **variables: str) -> tuple[int, dict, float]:
    """The exit code, the records by case, and the seconds it took."""
    begun = time.monotonic()
    done = subprocess.run(
        [*command(*arguments), "--json"], capture_output=True, text=True, check=False,
        env={**os.environ, **variables},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    records = {
        item["case_id"]: item for item in json.loads(done.stdout or '{"cases": []}')["cases"]
    }
    return done.returncode, records, time.monotonic() - begun


def go_on(images: Path, output: Path, model: Path) -> dict[str, str]:
    """Run again, in this process, to the end; statuses by case."""
    run = medmamba.predict(images, output, model, supervised=False, report=False)
    assert run.exit_code == 0
    return {record.case_id: record.status for record in run.run.records}


@dataclass(frozen=True)
class Fault:
    """What strikes a case, and the code that it is to have then."""

    name: str
    point: str
    code: str


FAULTS = {
    "at once": [
        Fault("G03", "before_export:G03=memory", "E_MEM_HOST"),
        Fault("G04", "before_infer:G04=kill", "E_WORKER_DIED"),
        Fault("G07", "mid_write:G07.nii.gz=enospc", "E_IO_NOSPACE"),
        Fault("G08", "before_fsync:G08.nii.gz=eio", "E_IO_WRITE"),
    ],
    "in time": [
        Fault("A19", "before_case:A19=sleep", "E_TIMEOUT"),
        Fault("G04b", "before_export:G04b=crash", "E_WORKER_DIED"),
        Fault("G05", "before_infer:G05=sleep", "E_TIMEOUT"),
    ],
}
"""One run takes those that show at once, another those that need a time limit."""

NAMES = (*THREE, *(fault.name for faults in FAULTS.values() for fault in faults))


@pytest.fixture(scope="session")
def alone(made, tmp_path_factory) -> Path:
    """Masks of all cases, none of which is struck."""
    place = tmp_path_factory.mktemp("alone")
    assert set(go_on(write(place / "images", *NAMES), place / "out", made).values()) == {"ok"}
    return place / "out"


@dataclass(frozen=True)
class Struck:
    """A run with faults, its exit code and records, and what the next run made of its output."""

    out: Path
    code: int
    records: dict
    files: frozenset[str]
    resumed: dict[str, str]


@pytest.fixture(scope="session")
def struck(made, tmp_path_factory) -> Callable[[str], Struck]:
    @cache
    def strike(which: str) -> Struck:
        place, faults = tmp_path_factory.mktemp("struck"), FAULTS[which]
        images = write(place / "images", *GOOD, *(fault.name for fault in faults))
        options = ["--timeout-per-case", 3] if which == "in time" else []
        points = ",".join(fault.point for fault in faults)
        out = place / "out"
        code, records, _ = run(images, out, made, *options, MEDMAMBA_FAILPOINTS=points)
        files = frozenset(path.name for path in out.rglob("*"))
        for fault in faults:
            stored = read_record(out / f"{fault.name}.json")
            assert stored is not None
            assert to_plain(stored) == records[fault.name]
        return Struck(out, code, records, files, go_on(images, out, made))

    return strike


ROWS = [
    pytest.param(which, fault, id=fault.name, marks=[pytest.mark.slow] * (which == "in time"))
    for which, faults in FAULTS.items()
    for fault in faults
]


@pytest.mark.parametrize(("which", "fault"), ROWS)
def test_a_case_that_fails_says_why_and_can_be_done_again(which, fault, struck, alone) -> None:
    found = struck(which)
    record = found.records[fault.name]
    assert (record["status"], record["error"]["code"]) == ("failed", fault.code)
    assert f"{fault.name}.nii.gz" not in found.files
    assert found.resumed[fault.name] == "ok"
    mask = f"{fault.name}.nii.gz"
    assert (found.out / mask).read_bytes() == (alone / mask).read_bytes()


@pytest.mark.parametrize("which", ["at once", pytest.param("in time", marks=pytest.mark.slow)])
def test_cases_that_fail_cost_the_others_nothing(which, struck, alone) -> None:
    found = struck(which)
    assert found.code == 4
    assert not [name for name in found.files if name.startswith(".mm-tmp")]
    for name in GOOD:
        assert found.records[name]["status"] == "ok"
        assert found.resumed[name] == "skipped"
        mask = f"{name}.nii.gz"
        assert (found.out / mask).read_bytes() == (alone / mask).read_bytes()


@pytest.mark.slow
def test_a_disk_too_full_for_a_record_ends_the_run_and_can_be_resumed(
    made, alone, tmp_path
) -> None:
    images, out = write(tmp_path / "images", *THREE), tmp_path / "out"
    found, _, _ = run(images, out, made, MEDMAMBA_FAILPOINTS="mid_write:bad.json=enospc")
    assert found == 6
    assert not (out / "bad.json").exists()
    assert not list(out.glob("run/*/running"))
    go_on(images, out, made)
    for name in THREE:
        assert (out / f"{name}.nii.gz").read_bytes() == (alone / f"{name}.nii.gz").read_bytes()


@pytest.mark.slow
def test_records_never_precede_their_masks_on_disk(made, tmp_path) -> None:
    """What was synced when the power goes is all there is: mask, its name, then the record."""
    log = tmp_path / "log"
    run(write(tmp_path / "images", *GOOD), tmp_path / "out", made, MEDMAMBA_FAILPOINTS_LOG=str(log))
    lines = [line.split() for line in log.read_text().splitlines()]
    passed = [(point, name) for point, _, *rest in lines for name in rest]
    for case in GOOD:
        steps = [("after_fsync", f"{case}.nii.gz"), ("after_folder_sync", f"{case}.nii.gz"),
                 ("before_open", f"{case}.json"), ("after_fsync", f"{case}.json"),
                 ("after_folder_sync", f"{case}.json")]  # fmt: skip
        places = [passed.index(step) for step in steps]
        assert places == sorted(places)


@pytest.mark.parametrize(
    ("point", "signals"),
    [
        pytest.param("before_infer:bad=sleep", 1, id="G11 amid a case", marks=pytest.mark.slow),
        pytest.param("before_infer:bad=sleep", 2, id="G11 twice", marks=pytest.mark.slow),
        pytest.param("", 1, id="G11 while the model loads"),
    ],
)
def test_sigterm_ends_a_run_cleanly(made, alone, tmp_path, point, signals) -> None:
    images, out = write(tmp_path / "images", *THREE), tmp_path / "out"
    events = tmp_path / "events"
    process = subprocess.Popen(
        command(images, out, made, "--grace", 2, "--events", events),
        env={**os.environ, "MEDMAMBA_FAILPOINTS": point}, stderr=subprocess.PIPE,
    )  # fmt: skip
    wanted = '"case": "bad"' if point else '"started"'
    while wanted not in (events.read_text() if events.exists() else ""):
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.3 if point else 0.0)
    begun = time.monotonic()
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 143
    assert time.monotonic() - begun < 10
    assert b"Traceback" not in error
    assert not (out / "bad.json").exists()
    if signals == 1:
        assert not list(out.rglob(".mm-tmp*"))
    go_on(images, out, made)
    for name in THREE:
        assert (out / f"{name}.nii.gz").read_bytes() == (alone / f"{name}.nii.gz").read_bytes()
    assert not list(out.rglob(".mm-tmp*"))


@pytest.mark.slow
def test_two_runs_at_once_on_one_folder_both_finish(made, alone, tmp_path) -> None:
    images, out = write(tmp_path / "images", *THREE), tmp_path / "out"
    both = [subprocess.Popen(command(images, out, made), stderr=subprocess.PIPE) for _ in range(2)]
    for process in both:
        assert process.communicate(timeout=60)[1].count(b"Traceback") == 0
        assert process.returncode == 0
    for name in THREE:
        assert (out / f"{name}.nii.gz").read_bytes() == (alone / f"{name}.nii.gz").read_bytes()
    verify = [sys.executable, "-m", "medmamba", "verify", str(out)]
    assert subprocess.run(verify, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
@pytest.mark.parametrize("how", ["umount /dev/shm || mount -t tmpfs -o size=4k none /dev/shm",
                                 "mount -t tmpfs -o size=64k none /dev/shm"])  # fmt: skip
def test_shared_memory_is_not_needed(made, tmp_path, how) -> None:
    images = write(tmp_path / "images", *GOOD)
    inner = f'({how}) 2>/dev/null || exit 99; exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", inner, "sh",
         *command(images, tmp_path / "out", made)],
        capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode in (1, 99) and not (tmp_path / "out").exists():
        pytest.skip("mounts cannot be changed here")
    assert done.returncode == 0, done.stderr


def test_clocks_decide_nothing(made, tmp_path) -> None:
    images, out = write(tmp_path / "images", *GOOD), tmp_path / "out"
    go_on(images, out, made)
    paths = sorted(images.iterdir())
    yesterday = time.time() - 86400
    os.utime(paths[0], (yesterday, yesterday))
    before = paths[1].stat()
    paths[1].write_bytes(packed(nifti(voxels(7))))
    os.utime(paths[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    statuses = go_on(images, out, made)
    assert [statuses[name] for name in GOOD] == ["skipped", "ok"]


@pytest.mark.slow
def test_a_closed_standard_output_is_no_crash(made, tmp_path) -> None:
    images = write(tmp_path / "images", *GOOD)
    process = subprocess.Popen(
        [*command(images, tmp_path / "out", made), "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()
    process.wait()
    process.stderr.close()
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2


def test_output_that_is_not_finite_is_never_a_mask(model, tmp_path) -> None:
    weights = model / "weights" / "fold_0.safetensors"
    state = load_file(weights)
    for name in state:
        if state[name].is_floating_point():
            state[name] = torch.full_like(state[name], 3e38)
    save_file(state, weights)
    size = weights.stat().st_size
    change_manifest(model, lambda manifest: manifest["weights"][0].update(size_bytes=size))
    images = write(tmp_path / "images", *GOOD)
    found = medmamba.predict(images, tmp_path / "out", model, supervised=False, report=False)
    assert found.exit_code == 5
    codes = {record.error.code for record in found.run.records if record.error is not None}
    assert codes == {"E_NUM_NONFINITE"}
    assert not list((tmp_path / "out").glob("*.nii.gz"))


SCRIPT = """
import medmamba
outcome = medmamba.predict({images!r}, {out!r}, {model!r}, report=False)
assert outcome.exit_code == 0, outcome.summary()
import sys
assert "torch" not in sys.modules, "the model is another process's affair"
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["script", "stdin", "-c"])
def test_a_script_without_a_main_guard_predicts(made, alone, tmp_path, how) -> None:
    images, out = write(tmp_path / "images", *THREE), tmp_path / "out"
    program = SCRIPT.format(images=str(images), out=str(out), model=str(made))
    (tmp_path / "torch.py").write_text("raise SystemExit('a file in the working folder was run')")
    (tmp_path / "elsewhere").mkdir()
    script = tmp_path / "elsewhere" / "predict.py"
    script.write_text(program)
    arguments = {"script": [str(script)], "stdin": ["-P"], "-c": ["-P", "-c", program]}[how]
    done = subprocess.run(
        [sys.executable, *arguments], input=program if how == "stdin" else None, text=True,
        capture_output=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    masks = [(place / "bad.nii.gz").read_bytes() for place in (out, alone)]
    assert np.array_equal(*masks)
