"""Folds of a cross-validation: here one after another, and on a cluster that loses a worker."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import medmamba
from medmamba.errors import UsageError
from medmamba.pipeline.folds import EpochFollower, train_folds
from medmamba.training.checkpoint import prediction_weights
from medmamba.training.run_files import load_state, read_log

NETWORK = "plain_unet"
HERE = Path(__file__).parent
LATEST = "checkpoint_latest.safetensors"


@pytest.fixture(scope="module")
def work(tmp_path_factory, write_raw_ellipsoids) -> Path:
    root = tmp_path_factory.mktemp("folds")
    raw = write_raw_ellipsoids(root / "Dataset901_Ellipsoids")
    medmamba.plan(raw, root / "work", network=NETWORK, workers=1)
    # Validation of 50 batches would be most of the time here.
    recipe = '[training]\noptimizer = "adamw"\nlearning_rate = 0.002\nvalidation_iterations = 2\n'
    (root / "brief.toml").write_text(recipe)
    return root / "work"


def recipe_of(work: Path) -> str:
    return str(work.parent / "brief.toml")


def run_of(work: Path, fold: int) -> Path:
    return work / "runs" / NETWORK / "3d_fullres" / f"fold_{fold}"


def test_folds_run_one_after_another_and_one_that_fails_ends_no_other(work: Path) -> None:
    said = []
    options = {"network": NETWORK, "recipe": recipe_of(work), "epochs": 1, "iterations": 1}
    blocked = run_of(work, 1)
    blocked.mkdir(parents=True)
    (blocked / "log.jsonl").write_text("")
    epochs = []
    outcomes = train_folds(
        work,
        folds=(0, 1, 2),
        on_message=said.append,
        on_epoch=lambda fold, report: epochs.append((fold, report.epoch)),
        **options,
    )
    assert [outcome.fold for outcome in outcomes] == [0, 1, 2]
    assert [outcome.code for outcome in outcomes] == ["", "E_RUN_EXISTS", ""]
    assert outcomes[1].model is None
    assert outcomes[1].exit_code == 3
    assert any("E_RUN_EXISTS" in text for text in said)
    assert epochs == [(0, 0), (2, 0)]
    for fold in (0, 2):
        assert (run_of(work, fold) / "model" / "manifest.json").exists()


def test_folds_and_engines_that_do_not_exist(work: Path) -> None:
    with pytest.raises(UsageError, match=r"folds \[7\]: the split has folds 0 to 4"):
        train_folds(work, folds=(0, 7), network=NETWORK)
    with pytest.raises(UsageError, match=r"'spark'.*local, ray"):
        train_folds(work, engine="spark", network=NETWORK)


def test_epochs_are_followed_through_a_log_that_is_cut_back(tmp_path: Path) -> None:
    said = []
    log = tmp_path / "log.jsonl"
    row = {"kind": "epoch", "epoch": 0, "epochs": 3, "loss": 0.5, "dice": None}

    def write(*epochs: int) -> None:
        lines = [json.dumps({**row, "epoch": e}, separators=(",", ":")) + "\n" for e in epochs]
        log.write_text("".join(lines))

    follower = EpochFollower({4: tmp_path}, said.append)
    follower.look()
    write(0, 1)
    log.write_text(log.read_text() + '{"kind":"epo')
    follower.look()
    assert [text.split("epoch")[1].split("/")[0].strip() for text in said] == ["1", "2"]
    write(0)
    follower.look()
    assert len(said) == 2
    write(0, 1, 2)
    follower.look()
    assert len(said) == 4


def start_cluster() -> tuple[subprocess.Popen, str]:
    process = subprocess.Popen(
        [sys.executable, str(HERE / "ray_cluster.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return process, process.stdout.readline().strip()


def wait_for(path: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_worker_that_is_killed_costs_nothing(work: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    cluster, address = start_cluster()
    length = ["--epochs", "12", "--iterations", "4"]
    options = ["--network", NETWORK, "--recipe", recipe_of(work), *length, "--precision", "fp32"]
    command = [sys.executable, "-m", "medmamba", "train", str(work), *options]
    environment = {**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "OMP_NUM_THREADS": "1"}
    folds = [*command, "--folds", "3,4", "--engine", "ray", "--address", address]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    victim = run_of(work, 3)
    try:
        with subprocess.Popen(folds, **pipes, text=True, env=environment) as driver:
            try:
                wait_for(victim / LATEST, 300)
                record = json.loads((victim / "run.json").read_text())
                os.kill(record["process"]["pid"], signal.SIGKILL)
                done = load_state(victim / LATEST).iteration
                output, talk = driver.communicate(timeout=300)
            finally:
                driver.kill()
    finally:
        cluster.stdin.close()
        cluster.wait(timeout=60)
    assert driver.returncode == 0, talk
    assert 0 < done < 48
    assert "fold 3: its process was lost" in talk
    assert "fold 4  epoch   12/12" in talk
    assert all(str(run_of(work, fold) / "model") in output for fold in (3, 4))
    record = json.loads((victim / "run.json").read_text())
    assert 0 < record["resumed_at_iteration"] < 48
    # Nothing was lost or done twice: the run equals one that nobody disturbed.
    weights = prediction_weights(victim / LATEST)
    steps = [row for row in read_log(victim / "log.jsonl") if row["kind"] == "step"]
    assert [row["iteration"] for row in steps] == list(range(48))
    again = [*command, "--fold", "3", "--overwrite"]
    subprocess.run(again, check=True, capture_output=True, env=environment)
    undisturbed = [row for row in read_log(victim / "log.jsonl") if row["kind"] == "step"]
    assert steps == undisturbed
    for name, tensor in prediction_weights(victim / LATEST).items():
        assert torch.equal(tensor, weights[name]), name
