"""Curves for TensorBoard: what the log has, and a clear refusal where it cannot be written."""

import json
import sys

import pytest

from medmamba.errors import EnvironmentFault
from medmamba.training.board import BoardLog, require_tensorboard
from medmamba.training.progress import RunLog


def test_a_missing_tensorboard_is_named_before_training_begins(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(EnvironmentFault, match=r"pip install medmamba\[tensorboard\]") as caught:
        require_tensorboard()
    assert caught.value.code == "E_NO_TENSORBOARD"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_rows_of_the_log_become_scalars_at_their_iteration(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = BoardLog(RunLog(tmp_path / "log.jsonl", keep_bytes=0), tmp_path / "board", first=0)
    log.write({"kind": "step", "iteration": 1, "loss": 0.5, "lr": 0.1, "gradient_norm": None})
    log.write(
        {
            "kind": "epoch",
            "iteration": 2,
            "dice": 0.25,
            "dice_per_class": {"liver": 0.75, "x": None},
        }
    )
    log.sync()
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2]
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    found = {
        tag: [(event.step, event.value) for event in board.Scalars(tag)]
        for tag in board.Tags()["scalars"]
    }
    assert found.keys() == {"step/loss", "step/lr", "epoch/dice", "dice/liver"}
    assert found["step/loss"] == [(1, 0.5)]
    assert found["dice/liver"] == [(2, 0.75)]
