"""The log and what is drawn of it."""

from pathlib import Path

import pytest

from medmamba.errors import EnvironmentFault
from medmamba.evaluation.curves import plot_curves
from medmamba.training.progress import RunLog
from medmamba.training.run_files import read_log


def epoch_row(epoch: int) -> dict:
    return {
        "kind": "epoch", "epoch": epoch, "loss": 1.0 / (1 + epoch), "validation_loss": 0.5,
        "dice": 0.5, "ema_dice": 0.4, "learning_rate": 0.01,
        "dice_per_class": {"a": 0.5, "b": float("nan")},
    }  # fmt: skip


def test_a_log_is_cut_back_to_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = RunLog(path, keep_bytes=0)
    log.write({"kind": "step", "loss": 1.0})
    length = log.sync()
    log.write({"kind": "step", "loss": float("nan")})
    log.close()
    assert [row["loss"] for row in read_log(path)] == [1.0, None]
    again = RunLog(path, keep_bytes=length)
    again.write({"kind": "step", "loss": 3.0})
    again.close()
    assert [row["loss"] for row in read_log(path)] == [1.0, 3.0]


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a":1}\n{"a":')
    assert read_log(path) == [{"a": 1}]


def test_a_log_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match=r"log\.jsonl"):
        RunLog(tmp_path / "file" / "log.jsonl", keep_bytes=0)


def test_curves_are_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    plot_curves([{"kind": "step"}], path)
    assert not path.exists()
    plot_curves([epoch_row(0), {"kind": "step"}, epoch_row(1)], path)
    assert path.read_bytes().startswith(b"\x89PNG")
