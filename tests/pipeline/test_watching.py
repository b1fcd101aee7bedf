"""Images that arrive: taken when complete, once, through crashes and restarts."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medmamba.bundle import save_bundle
from medmamba.dataset import Case, Rejection
from medmamba.errors import UsageError
from medmamba.inference.records import read_record
from medmamba.pipeline.watching import Arrivals, watch

from ..conformance.phantom import nifti, packed, voxels
from ..test_bundle import CONFIGURATION, tiny_plan, weights


class Clock:
    """Time that passes only when somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def arrivals(folder: Path, clock: Clock, **options) -> Arrivals:
    settings = {"channels": 1, "settle_s": 10.0, "poll_s": 1.0, **options}
    return Arrivals(folder, clock=clock, sleep=clock.sleep, **settings)


def taken(stream, clock: Clock, seconds: float) -> list[str]:
    end, names = clock.now + seconds, []
    while clock.now < end:
        item = next(stream)
        if item is not None:
            names.append(item.id)
    return names


def test_a_case_is_taken_once_when_it_has_settled(tmp_path, clock) -> None:
    watched = arrivals(tmp_path, clock)
    stream = iter(watched)
    assert taken(stream, clock, 5) == []
    path = tmp_path / "a.nii.gz"
    path.write_bytes(b"half")
    assert taken(stream, clock, 8) == []
    path.write_bytes(b"half and half")  # still being copied
    assert taken(stream, clock, 8) == []
    assert taken(stream, clock, 5) == ["a"]
    assert taken(stream, clock, 30) == []


def test_a_file_that_is_replaced_is_taken_again_but_not_while_it_is_in_work(
    tmp_path, clock
) -> None:
    (tmp_path / "a.nii.gz").write_bytes(b"one")
    watched = arrivals(tmp_path, clock)
    stream = iter(watched)
    assert taken(stream, clock, 15) == ["a"]
    (tmp_path / "a.nii.gz").write_bytes(b"another")
    assert taken(stream, clock, 30) == []
    watched.decided("a")
    assert taken(stream, clock, 5) == ["a"]


def test_channels_and_series_are_waited_for(tmp_path, clock) -> None:
    (tmp_path / "a_0000.nii.gz").write_bytes(b"x")
    watched = arrivals(tmp_path, clock, channels=2, settle_s=4.0)
    stream = iter(watched)
    # A lone first file may hold both channels, which reading will tell.
    assert taken(stream, clock, 3) == []
    (tmp_path / "a_0001.nii.gz").write_bytes(b"x")
    (tmp_path / "b_0001.nii.gz").write_bytes(b"x")
    items = []
    while len(items) < 2:
        items += filter(None, [next(stream)])
    assert {item.id: type(item) for item in items} == {"a": Case, "b": Rejection}
    assert clock.now >= 7
    watched.decided("b")
    (tmp_path / "b_0000.nii.gz").write_bytes(b"x")
    assert taken(stream, clock, 6) == ["b"]


def test_a_marker_says_that_a_case_is_complete(tmp_path, clock) -> None:
    (tmp_path / "a.nii.gz").write_bytes(b"x")
    stream = iter(arrivals(tmp_path, clock, marker=".done"))
    assert taken(stream, clock, 60) == []
    (tmp_path / "a.done").touch()
    assert taken(stream, clock, 2) == ["a"]


def test_a_bids_folder_is_watched_and_doubt_is_said_once(tmp_path, clock, caplog) -> None:
    for suffix in ("T1w", "FLAIR"):
        path = tmp_path / "sub-01" / "anat" / f"sub-01_{suffix}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    assert taken(iter(arrivals(tmp_path, clock)), clock, 60) == []
    assert caplog.text.count("--bids-suffix") == 1
    stream = iter(arrivals(tmp_path, clock, modalities=("T1",)))
    assert taken(stream, clock, 15) == ["sub-01"]
    assert taken(stream, clock, 15) == []


def test_folders_must_be_apart(tmp_path) -> None:
    (tmp_path / "in").mkdir()
    for out in (tmp_path / "in" / "masks", tmp_path):
        with pytest.raises(UsageError, match="apart"):
            watch(tmp_path / "in", out, tmp_path / "model")
    with pytest.raises(UsageError, match="no folder"):
        watch(tmp_path / "none", tmp_path / "out", tmp_path / "model")


@pytest.fixture
def place(tmp_path) -> Path:
    save_bundle(
        tmp_path / "model", plan=tiny_plan(), configuration=CONFIGURATION, weights=[weights(0)],
        precision="fp32",
    )  # fmt: skip
    (tmp_path / "in").mkdir()
    return tmp_path


def start(place: Path, *options: str) -> subprocess.Popen:
    command = ["watch", "in", "out", "-m", "model", "--settle", "1.2", "--poll", "0.2", *options]
    return subprocess.Popen(
        [sys.executable, "-m", "medmamba", *command, "--device", "cpu"], cwd=place,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for(place: Path, process: subprocess.Popen, *cases: str) -> None:
    deadline = time.monotonic() + 60
    while not all((place / "out" / f"{case}.json").is_file() for case in cases):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no record"
        time.sleep(0.05)


def test_the_program_takes_what_arrives_and_survives_being_killed(place) -> None:
    good = packed(nifti(voxels(1)))
    arriving = place / "in" / "slow_0000.nii.gz"
    arriving.write_bytes(good[: len(good) // 2])
    process = start(place)
    try:
        (place / "in" / "quick_0000.nii.gz").write_bytes(packed(nifti(voxels(2))))
        for part in range(1, 9):  # copied in pieces, never still for as long as a case must be
            arriving.write_bytes(good[: len(good) // 2 + part * len(good) // 20])
            time.sleep(0.3)
        arriving.write_bytes(good)
        wait_for(place, process, "slow", "quick")
        for name in ("slow", "quick"):
            assert read_record(place / "out" / f"{name}.json").status in ("ok", "ok_with_warnings")
        (place / "in" / "bad_0000.nii.gz").write_bytes(b"rubbish")
        wait_for(place, process, "bad")
        assert read_record(place / "out" / "bad.json").status == "rejected"
        process.kill()
        process.communicate()
        before = (place / "out" / "quick.nii.gz").stat().st_mtime_ns
        shutil.copy(place / "in" / "quick_0000.nii.gz", place / "in" / "later_0000.nii.gz")
        process = start(place)
        wait_for(place, process, "later")
        process.send_signal(signal.SIGTERM)
        talk = process.communicate(timeout=60)[0]
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 143, talk
    assert (place / "out" / "quick.nii.gz").stat().st_mtime_ns == before
    assert "quick: skipped" in talk
    made = {path.name for path in (place / "out").iterdir()} - {"run"}
    assert {name for name in made if name.endswith(".nii.gz")} == {
        "slow.nii.gz", "quick.nii.gz", "later.nii.gz",
    }  # fmt: skip
    assert not [name for name in made if name.startswith(".mm-tmp")]


@pytest.mark.slow
def test_the_program_lays_out_a_bids_folder_as_it_arrives(place) -> None:
    process = start(place, "--layout", "bids", "--bids-suffix", "T1w")
    try:
        for number, subject in enumerate(("sub-01", "sub-02")):
            for suffix in ("T1w", "FLAIR"):
                path = place / "in" / subject / "anat" / f"{subject}_{suffix}.nii.gz"
                path.parent.mkdir(parents=True) if suffix == "T1w" else None
                path.write_bytes(packed(nifti(voxels(number))))
            deadline = time.monotonic() + 60
            while not list((place / "out" / subject / "anat").glob("*_dseg.nii.gz")):
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < deadline, "no mask"
                time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        talk = process.communicate(timeout=60)[0]
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 143, talk
    assert (place / "out" / "dataset_description.json").is_file()
    assert read_record(place / "out" / "medmamba" / "sub-02.json").status == "ok"
