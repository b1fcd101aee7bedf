"""Prediction on a cluster of two machines that loses workers, its driver, and meets poison."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_engine import MODEL, ThresholdPredictor, image, predict_cases

import medmamba
from medmamba import __version__
from medmamba.bundle import save_bundle
from medmamba.dataset import find_cases
from medmamba.errors import BundleError, SecurityError, UsageError
from medmamba.inference.history import events
from medmamba.inference.records import read_record
from medmamba.inference.worker import WorkerSetup
from medmamba.pipeline.cluster_worker import Segmenter

from ..conformance.phantom import nifti, packed, voxels
from ..test_bundle import CONFIGURATION, tiny_plan, weights

HERE = Path(__file__).parent
POISON = 77
CASES = 200
KILL_EVERY_S = 5.0
ENVIRONMENT = {
    **os.environ,
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(HERE),
}

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@contextmanager
def running_cluster(**environment: str) -> Iterator[tuple[subprocess.Popen, str]]:
    pytest.importorskip("ray")
    process = subprocess.Popen(
        [sys.executable, str(HERE / "ray_cluster.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=ENVIRONMENT | environment,
    )  # fmt: skip
    yield process, process.stdout.readline().strip()
    process.stdin.close()
    process.wait(timeout=60)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running_cluster() as (_, place):
        yield place


def start(address: str, place: Path, *, seconds: float, workers: int = 2) -> subprocess.Popen:
    arguments = [address, str(place / "in"), str(place / "out"), str(seconds), str(workers)]
    return subprocess.Popen(
        [sys.executable, str(HERE / "ray_driver.py"), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip


def outcome(driver: subprocess.Popen) -> dict:
    output, talk = driver.communicate(timeout=400)
    assert output, talk
    return json.loads(output.splitlines()[-1])


def images(place: Path, count: int, poison: int | None = None) -> None:
    for number in range(count):
        image(place / "in", f"c{number:03d}", mark=POISON * (number == poison), seed=number)


def journal(place: Path) -> list[dict]:
    return [event for run in sorted((place / "out" / "run").iterdir()) for event in events(run)]


def hashes(folder: Path) -> dict[str, str]:
    records = (read_record(path) for path in sorted(folder.glob("*.json")))
    return {record.case_id: record.output.sha256 for record in records if record.output}


@pytest.mark.slow
def test_workers_that_are_killed_and_a_driver_that_is_cost_nothing(address, tmp_path) -> None:
    images(tmp_path, CASES)
    cases = find_cases(tmp_path / "in", channels=1).cases
    predict_cases(cases, tmp_path / "alone", ThresholdPredictor(), model=MODEL)
    driver = start(address, tmp_path, seconds=0.25)
    killed: list[int] = []

    def rage() -> None:
        chance = random.Random(3)
        while driver.poll() is None:
            time.sleep(KILL_EVERY_S)
            living = [
                event["pid"]
                for event in (journal(tmp_path) if (tmp_path / "out" / "run").is_dir() else [])
                if event["event"] == "joined" and Path(f"/proc/{event['pid']}").exists()
            ]
            if living and driver.poll() is None:
                killed.append(chance.choice(living))
                os.kill(killed[-1], signal.SIGKILL)

    rager = threading.Thread(target=rage)
    rager.start()
    found = outcome(driver)
    rager.join()
    assert found["exit_code"] == 0
    assert sum(found["counts"].values()) == CASES
    assert found["torch"] is False
    assert len(killed) >= 3
    died = [event for event in journal(tmp_path) if event["event"] == "worker_died"]
    assert len(died) >= 3
    assert hashes(tmp_path / "out") == hashes(tmp_path / "alone")
    assert len(hashes(tmp_path / "out")) == CASES
    assert not list((tmp_path / "out").glob(".mm-tmp*"))


@pytest.mark.slow
def test_a_driver_that_is_killed_recomputes_nothing(address, tmp_path) -> None:
    images(tmp_path, 30)
    driver = start(address, tmp_path, seconds=0.3)
    out = tmp_path / "out"
    while len(list(out.glob("c*.json"))) < 8:
        assert driver.poll() is None
        time.sleep(0.1)
    driver.kill()
    driver.communicate()
    time.sleep(2.0)  # workers end with their driver
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("c*.nii.gz")}
    recorded = [path.stem for path in out.glob("c*.json")]
    assert 8 <= len(recorded) < 30
    found = outcome(start(address, tmp_path, seconds=0.3))
    assert found["counts"]["skipped"] == len(recorded)
    assert found["counts"]["skipped"] + found["counts"]["ok"] == 30
    for case in recorded:
        name = f"{case}.nii.gz"
        assert (out / name).stat().st_mtime_ns == before[name]


@pytest.mark.slow
def test_a_poison_case_is_set_aside_and_the_others_are_done(address, tmp_path) -> None:
    images(tmp_path, 12, poison=5)
    found = outcome(start(address, tmp_path, seconds=0.1))
    assert found["counts"] == {"ok": 11, "failed": 1}
    assert found["exit_code"] == 4
    record = read_record(tmp_path / "out" / "c005.json")
    assert record.error.code == "E_POISON"
    assert not (tmp_path / "out" / "c005.nii.gz").exists()
    kinds = [event["event"] for event in journal(tmp_path)]
    assert kinds.count("worker_died") == 3
    assert kinds.count("quarantined") == 1


@pytest.mark.slow
def test_two_workers_do_nearly_twice_as_much(address, tmp_path) -> None:
    spent = {}
    for workers in (1, 2):
        (tmp_path / str(workers)).mkdir()
        images(tmp_path / str(workers), 40)
        found = outcome(start(address, tmp_path / str(workers), seconds=0.4, workers=workers))
        assert found["counts"] == {"ok": 40}
        spent[workers] = found["spent_s"]
    assert spent[1] >= 1.8 * spent[2], spent


@pytest.mark.slow
def test_a_machine_that_is_lost_costs_nothing(tmp_path) -> None:
    images(tmp_path, 60)
    with running_cluster() as (cluster, address):
        driver = start(address, tmp_path, seconds=0.3)
        while len(list((tmp_path / "out").glob("c*.json"))) < 10:
            assert driver.poll() is None
            time.sleep(0.1)
        cluster.stdin.write("lose one\n")
        cluster.stdin.flush()
        found = outcome(driver)
    assert found["exit_code"] == 0
    assert sum(found["counts"].values()) == 60
    assert len(hashes(tmp_path / "out")) == 60
    assert [event for event in journal(tmp_path) if event["event"] == "worker_died"]


def program(place: Path, address: str, *options: object) -> subprocess.CompletedProcess:
    """The real command on a cluster, with a tiny model."""
    save_bundle(
        place / "model", plan=tiny_plan(), configuration=CONFIGURATION, weights=[weights(0)],
        precision="fp32",
    )  # fmt: skip
    command = ["predict", "-i", place / "in", "-o", place / "out", "-m", place / "model",
               "--engine", "ray", "--address", address, "--device", "cpu", *options]  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "medmamba", *map(str, command)], capture_output=True, text=True,
        env=ENVIRONMENT, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_bids_folder_goes_through_a_cluster_too(address, tmp_path) -> None:
    for number, session in enumerate(("a", "b")):
        folder = tmp_path / "in" / "sub-01" / f"ses-{session}" / "anat"
        folder.mkdir(parents=True)
        path = folder / f"sub-01_ses-{session}_T1w.nii.gz"
        path.write_bytes(packed(nifti(voxels(number))))
    done = program(tmp_path, address, "--layout", "bids", "--bids-suffix", "T1w")
    assert done.returncode == 0, done.stderr
    masks = sorted(path.name for path in (tmp_path / "out").glob("sub-*/**/*_dseg.nii.gz"))
    assert [name[:12] for name in masks] == ["sub-01_ses-a", "sub-01_ses-b"]
    local = [sys.executable, "-m", "medmamba", "predict", "-i", tmp_path / "in", "-o",
             tmp_path / "alone", "-m", tmp_path / "model", "--layout", "bids", "--bids-suffix",
             "T1w", "--device", "cpu"]  # fmt: skip
    subprocess.run(local, check=True, capture_output=True, env=ENVIRONMENT, timeout=300)
    assert hashes(tmp_path / "out" / "medmamba") == hashes(tmp_path / "alone" / "medmamba")


@pytest.mark.slow
def test_machines_with_another_version_are_refused_at_the_door(tmp_path) -> None:
    # What Python reads first on those machines makes them say another version (row J4).
    shim = tmp_path / "shim"
    shim.mkdir()
    (shim / "sitecustomize.py").write_text("import medmamba\nmedmamba.__version__ = '0.0.9'\n")
    images(tmp_path, 1)
    with running_cluster(PYTHONPATH=f"{shim}:{HERE}") as (_, address):
        done = program(tmp_path, address)
    assert done.returncode == 3, done.stderr
    assert "E_VERSION_MIXED" in done.stderr
    assert "0.0.9" in done.stderr
    assert not list((tmp_path / "out").glob("*.nii.gz"))


def test_a_worker_that_differs_from_the_driver_is_refused(tmp_path) -> None:
    setup = WorkerSetup(folder=tmp_path, model=MODEL, options={})
    with pytest.raises(BundleError, match="version") as refused:
        Segmenter().join(setup, lambda _: (ThresholdPredictor(), {}), "0.0.1")
    assert (refused.value.code, refused.value.exit_code) == ("E_VERSION_MIXED", 3)

    def another_model(_: WorkerSetup):
        raise SecurityError("its files have changed", code="E_MODEL_HASH")

    with pytest.raises(BundleError, match="files have changed") as refused:
        Segmenter().join(setup, another_model, __version__)
    assert refused.value.exit_code == 3


def test_a_worker_keeps_what_is_done_and_says_so(tmp_path) -> None:
    case = image(tmp_path / "in", "a")
    (tmp_path / "out" / "run" / "r").mkdir(parents=True)
    setup = WorkerSetup(
        folder=tmp_path / "out", run_folder=tmp_path / "out" / "run" / "r", model=MODEL, options={}
    )
    predictor = ThresholdPredictor()
    worker = Segmenter()
    about = worker.join(setup, lambda _: (predictor, {}), __version__)
    assert (about["parameters"], about["pid"]) == ({"level": 50.0}, os.getpid())
    told = [worker.segment(case) for _ in range(2)]
    assert [answer["record"]["status"] for answer in told] == ["ok", "skipped"]
    assert [[event for event, _ in answer["events"]] for answer in told] == [["ok"], ["skipped"]]
    assert len(predictor.inferred) == 1


def test_engines_that_do_not_exist(tmp_path) -> None:
    with pytest.raises(UsageError, match="local, ray"):
        medmamba.predict(tmp_path, tmp_path / "out", tmp_path, engine="spark")
