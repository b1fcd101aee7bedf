"""Faults of the process and the machine through the real command (rows A19 and G).

Between two good cases one is struck by a failpoint. Rows that need a GPU are simulated in
``tests/inference``: a fake allocator that runs out of memory (G1, G2), a worker that says that its
device is lost (G6). The sweep over all points (G10) is there, too.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from medmamba.inference.records import read_record

from ..test_bundle import change_manifest
from .phantom import nifti, packed, voxels

GOOD = ("00good", "zzgood")


def write(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for seed, name in enumerate(names):
        (folder / f"{name}_0000.nii.gz").write_bytes(packed(nifti(voxels(seed))))
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


@pytest.fixture(scope="session")
def alone(made, tmp_path_factory) -> Path:
    """Masks of the good cases without any other."""
    place = tmp_path_factory.mktemp("alone")
    write(place / "images", "00good", "bad", "zzgood")
    assert run(place / "images", place / "out", made)[0] == 0
    return place / "out"


ROWS = [
    ("A19 a read that never ends", "before_case:bad=sleep", "E_TIMEOUT", ["--timeout-per-case", 3]),
    ("G3 host memory", "before_export:bad=memory", "E_MEM_HOST", []),
    ("G4 killed", "before_infer:bad=kill", "E_WORKER_DIED", []),
    ("G4 crashed", "before_export:bad=crash", "E_WORKER_DIED", []),
    ("G5 hangs", "before_infer:bad=sleep", "E_TIMEOUT", ["--timeout-per-case", 3]),
    ("G7 disk full", "mid_write:bad.nii.gz=enospc", "E_IO_NOSPACE", []),
    ("G8 EIO on fsync", "before_fsync:bad.nii.gz=eio", "E_IO_WRITE", []),
]


@pytest.mark.parametrize(
    ("point", "code", "options"),
    [
        pytest.param(*row[1:], id=row[0], marks=() if row[0] == "G4 killed" else pytest.mark.slow)
        for row in ROWS
    ],
)
def test_a_case_that_fails_costs_the_others_nothing(
    made, alone, tmp_path, point, code, options
) -> None:
    images, out = write(tmp_path / "images", "00good", "bad", "zzgood"), tmp_path / "out"
    found, records, _ = run(images, out, made, *options, MEDMAMBA_FAILPOINTS=point)
    assert found == 4
    assert records["bad"]["status"] == "failed"
    assert records["bad"]["error"]["code"] == code
    stored = read_record(out / "bad.json")
    assert stored is not None
    assert stored.error is not None
    assert stored.error.code == code
    assert not (out / "bad.nii.gz").exists()
    assert not list(out.rglob(".mm-tmp*"))
    for name in GOOD:
        assert records[name]["status"] == "ok"
        assert (out / f"{name}.nii.gz").read_bytes() == (alone / f"{name}.nii.gz").read_bytes()
    found, records, _ = run(images, out, made)
    assert found == 0
    assert {name: records[name]["status"] for name in records} == {
        "00good": "skipped", "bad": "ok", "zzgood": "skipped",
    }  # fmt: skip
    assert (out / "bad.nii.gz").read_bytes() == (alone / "bad.nii.gz").read_bytes()


@pytest.mark.slow
def test_a_disk_too_full_for_a_record_ends_the_run_and_can_be_resumed(
    made, alone, tmp_path
) -> None:
    images, out = write(tmp_path / "images", "00good", "bad", "zzgood"), tmp_path / "out"
    found, _, _ = run(images, out, made, MEDMAMBA_FAILPOINTS="mid_write:bad.json=enospc")
    assert found == 6
    assert not (out / "bad.json").exists()
    assert not list(out.glob("run/*/running"))
    assert run(images, out, made)[0] == 0
    for name in ("00good", "bad", "zzgood"):
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
    images, out = write(tmp_path / "images", "00good", "bad", "zzgood"), tmp_path / "out"
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
    assert run(images, out, made)[0] == 0
    for name in ("00good", "bad", "zzgood"):
        assert (out / f"{name}.nii.gz").read_bytes() == (alone / f"{name}.nii.gz").read_bytes()
    assert not list(out.rglob(".mm-tmp*"))


@pytest.mark.slow
def test_two_runs_at_once_on_one_folder_both_finish(made, alone, tmp_path) -> None:
    images, out = write(tmp_path / "images", "00good", "bad", "zzgood"), tmp_path / "out"
    both = [subprocess.Popen(command(images, out, made), stderr=subprocess.PIPE) for _ in range(2)]
    for process in both:
        assert process.communicate(timeout=60)[1].count(b"Traceback") == 0
        assert process.returncode == 0
    for name in ("00good", "bad", "zzgood"):
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


@pytest.mark.slow
def test_clocks_decide_nothing(made, tmp_path) -> None:
    images, out = write(tmp_path / "images", *GOOD), tmp_path / "out"
    run(images, out, made)
    paths = sorted(images.iterdir())
    yesterday = time.time() - 86400
    os.utime(paths[0], (yesterday, yesterday))
    before = paths[1].stat()
    paths[1].write_bytes(packed(nifti(voxels(7))))
    os.utime(paths[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    records = run(images, out, made)[1]
    assert [records[name]["status"] for name in GOOD] == ["skipped", "ok"]


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
    found, records, _ = run(write(tmp_path / "images", *GOOD), tmp_path / "out", model)
    assert found == 5
    assert {record["error"]["code"] for record in records.values()} == {"E_NUM_NONFINITE"}
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
    images, out = write(tmp_path / "images", "00good", "bad", "zzgood"), tmp_path / "out"
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
