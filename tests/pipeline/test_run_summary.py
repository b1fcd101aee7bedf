"""What `medmamba info RUN` says of a run: finished, interrupted, running, without torch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from medmamba.errors import CheckpointError
from medmamba.networks.weights import save_weights
from medmamba.pipeline.run_summary import is_run, summarize_run
from medmamba.training.run_files import LATEST, STATE_KEY

EPOCH = {
    "kind": "epoch", "epochs": 3, "learning_rate": 0.01, "patches_per_s": 4.0, "memory_gb": 1.5,
    "dice_per_class": {"shell": 0.5, "core": None}, "skipped_steps": 1,
}  # fmt: skip


def write_run(folder: Path, *, dice: tuple[float, ...], **state: Any) -> Path:
    """Write what a run leaves after some epochs of two steps."""
    folder.mkdir(parents=True)
    rows = []
    for epoch, value in enumerate(dice):
        rows += [{"kind": "step", "iteration": 2 * epoch + k, "loss": 0.5} for k in (0, 1)]
        times = {"elapsed_s": 60.0 * (epoch + 1), "remaining_s": 60.0 * (2 - epoch)}
        found = {"loss": 1.0 - value, "validation_loss": 1.1 - value, "dice": value}
        rows.append({**EPOCH, **found, **times, "ema_dice": value, "epoch": epoch})
    rows.append({"kind": "step", "iteration": 2 * len(dice), "loss": 0.5})
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = {
        "command": ["medmamba", "train", "work dir", "--overwrite"],
        "process": {"host": os.uname().nodename, "pid": os.getpid()},
        "started": "2099-01-01T00:00:00+00:00",
        "device": "cpu", "precision": "bf16", "batch_size": 2, "seed": 0,
        "length": "3 epochs of 2 iterations",
        "recipe": {"epochs": 3, "loss": "dice_ce", "optimizer": "sgd", "learning_rate": 0.01},
        "network": {"name": "plain_unet"},
        "identity": {},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record))
    content = {"version": 1, "identity": {"network": "plain_unet"}, "epoch": len(dice), **state}
    save_weights(folder / LATEST, {}, {STATE_KEY: json.dumps(content)})
    return folder


def end_process(folder: Path) -> None:
    """Let the record name a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    record = json.loads((folder / "run.json").read_text())
    record["process"]["pid"] = child.pid
    (folder / "run.json").write_text(json.dumps(record))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "3d_fullres" / "fold_1", dice=(0.4, 0.7, 0.6), iteration=7)


def test_what_has_been_reached_is_told(run: Path) -> None:
    found = summarize_run(run)
    assert (found.network, found.configuration, found.fold) == ("plain_unet", "3d_fullres", "1")
    assert (found.epochs_done, found.epochs_planned, found.iterations) == (3, 3, 7)
    assert found.last["dice"] == 0.6
    assert found.best["dice"] == {"value": 0.7, "epoch": 2}
    assert found.best["loss"] == {"value": pytest.approx(0.3), "epoch": 2}
    assert found.dice_per_class == {"shell": 0.5, "core": None}
    assert found.elapsed_s == 180.0
    assert found.skipped_steps == 3
    assert set(found.files) == {"latest_checkpoint", "log"}


def test_finished_running_interrupted_or_elsewhere(run: Path, tmp_path: Path) -> None:
    assert summarize_run(run).status == "running"
    end_process(run)
    assert summarize_run(run).status == "interrupted"
    record = json.loads((run / "run.json").read_text())
    record["process"]["host"] = "another-machine"
    (run / "run.json").write_text(json.dumps(record))
    assert summarize_run(run).status == "elsewhere"
    done = write_run(tmp_path / "fold_0", dice=(0.4,), finished=True)
    assert (summarize_run(done).status, summarize_run(done).remaining_s) == ("finished", 0.0)


def test_number_of_an_older_process_is_no_sign_of_life(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    record["started"] = "2001-01-01T00:00:00+00:00"
    (run / "run.json").write_text(json.dumps(record))
    assert summarize_run(run).status == "interrupted"


def test_run_without_an_epoch_and_run_with_a_time_budget(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "fold_0", dice=())
    (folder / LATEST).unlink()
    found = summarize_run(folder)
    assert (found.epochs_done, found.epochs_planned, found.iterations) == (0, 3, 1)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "length": "600 s"}))
    assert summarize_run(folder).epochs_planned is None


def test_damaged_checkpoint_is_named(run: Path) -> None:
    (run / LATEST).write_bytes(b"\x00" * 20)
    with pytest.raises(CheckpointError, match=LATEST):
        summarize_run(run)
    shutil.rmtree(run)
    assert not is_run(run)


def test_command_prints_it_without_importing_torch(run: Path) -> None:
    end_process(run)
    code = (
        "import sys; from medmamba.cli.app import main\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules"
    )
    result, as_json = (
        subprocess.run(
            [sys.executable, "-c", code, "info", str(run), *extra],
            capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"},
        ).stdout
        for extra in ([], ["--json"])
    )  # fmt: skip
    assert "interrupted; --resume goes on" in result
    assert "0.6000, best 0.7000 in epoch 2" in result
    assert result.rstrip().endswith("medmamba train 'work dir' --resume")
    content = json.loads(as_json)
    assert (content["status"], content["model"]) == ("interrupted", None)
