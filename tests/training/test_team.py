"""Several processes train one network as one process does, and end together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from medmamba.errors import UsageError
from medmamba.training.checkpoint import prediction_weights
from medmamba.training.run_files import load_state, read_log
from medmamba.training.team import ALONE, Team, first_of_team

from .conftest import build_setup

SCRIPT = Path(__file__).with_name("run_fold.py")
END_S = 60.0
"""All ranks have ended this long after one died."""

CLOSE = 1e-5
"""Loss of two processes against one with the same batch, relative."""


def launch(store: Path, run: Path, recipe: dict, *options: str, ranks: int = 2) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
        str(ranks), str(SCRIPT), str(store), str(run), json.dumps(recipe), *options,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> str:
    _, talk = process.communicate(timeout=240)
    return talk


def rows(run: Path, kind: str) -> list[dict]:
    return [row for row in read_log(run / "log.jsonl") if row["kind"] == kind]


def recipe_of(**changes) -> dict:
    return {
        "epochs": 2, "iterations": 3, "validation_iterations": 2, "batch_size": 3,
        "batch_dice": True, "optimizer": "sgd", "learning_rate": 1e-3, **changes,
    }  # fmt: skip


def alone(store: Path, run: Path, recipe: dict) -> None:
    from medmamba.training.trainer import train_fold

    train_fold(build_setup(store, run, recipe=recipe))


def assert_same_training(one: Path, two: Path) -> None:
    expected, found = rows(one, "step"), rows(two, "step")
    assert len(found) == len(expected) == 6
    for a, b in zip(expected, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=CLOSE, abs=CLOSE)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-4)
    for a, b in zip(rows(one, "epoch"), rows(two, "epoch"), strict=True):
        assert b["validation_loss"] == pytest.approx(a["validation_loss"], rel=CLOSE, abs=CLOSE)
        assert b["dice"] == pytest.approx(a["dice"], abs=1e-3)
    weights = prediction_weights(one / "checkpoint_latest.safetensors")
    for name, tensor in prediction_weights(two / "checkpoint_latest.safetensors").items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-4, atol=1e-5)


def test_two_processes_train_as_one_does_with_the_same_batch(store_folder, tmp_path) -> None:
    # Three patches, so that the ranks' shares differ; Dice over the batch needs sums of both.
    process = launch(store_folder, tmp_path / "two", recipe_of())
    alone(store_folder, tmp_path / "one", recipe_of())
    talk = finish(process)
    assert process.returncode == 0, talk
    assert_same_training(tmp_path / "one", tmp_path / "two")
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
    assert (tmp_path / "two" / "curves.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"batch_dice": False},
        {"loss": "region_tversky"},
        {"loss": "tversky_ce", "batch_dice": False},
        {"loss": "focal_tversky", "weight_averaging": 0.9},
    ],
)
def test_every_loss_is_that_of_the_whole_batch(store_folder, tmp_path, changes: dict) -> None:
    recipe = recipe_of(**changes)
    process = launch(store_folder, tmp_path / "two", recipe)
    alone(store_folder, tmp_path / "one", recipe)
    talk = finish(process)
    assert process.returncode == 0, talk
    assert_same_training(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["error", "kill"])
def test_all_end_when_one_rank_dies(store_folder, tmp_path, how: str) -> None:
    recipe = recipe_of(epochs=2000)
    process = launch(store_folder, tmp_path / "run", recipe, "--die", f"1:7:{how}")
    latest = tmp_path / "run" / "checkpoint_latest.safetensors"
    deadline = time.monotonic() + 120
    while not latest.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    begun = time.monotonic()
    talk = finish(process)
    assert time.monotonic() - begun < END_S
    assert process.returncode != 0
    if how == "error":
        assert "rank 1 of 2 failed" in talk
        assert "Traceback" in talk
        assert "a bug of this rank" in talk
    else:
        assert "SIGKILL" in talk or "-9" in talk
    state = load_state(latest)
    assert 0 < state.iteration <= 7
    assert not state.finished


@pytest.mark.slow
def test_sigterm_saves_on_every_rank(store_folder, tmp_path) -> None:
    process = launch(store_folder, tmp_path / "run", recipe_of(epochs=2000))
    for line in process.stdout:
        if line.strip() == "epoch 1":
            process.send_signal(signal.SIGTERM)
            break
    talk = finish(process)
    assert "training stopped by SIGTERM" in talk
    state = load_state(tmp_path / "run" / "checkpoint_latest.safetensors")
    assert state.iteration >= 6
    assert not state.finished


def test_shares_cover_the_batch_once() -> None:
    for size, batch in ((2, 2), (2, 5), (3, 4)):
        shares = [Team(rank, size).share(batch) for rank in range(size)]
        assert sorted(place for share in shares for place in share) == list(range(batch))
    assert ALONE.share(4) is None
    with pytest.raises(UsageError, match="3 processes for a batch of 2"):
        Team(0, 3).share(2)


@pytest.mark.parametrize(("rank", "first"), [(None, True), ("0", True), ("1", False)])
def test_one_process_talks_before_they_meet(monkeypatch, rank, first) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert first_of_team() is first
