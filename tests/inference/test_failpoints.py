"""A run may be killed, or denied a write, at every point; nothing is lost, torn or wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import MODEL, ThresholdPredictor, image, predict_cases, tree
from test_supervision import run_fake, statuses, undisturbed

from medmamba.errors import EnvironmentFault
from medmamba.failpoints import failpoint
from medmamba.files import write_atomic

WRITES = ("before_open", "mid_write", "before_fsync", "after_fsync", "after_replace")


@pytest.mark.parametrize(
    ("which", "kills"), [("first", 19), pytest.param("all", 70, marks=pytest.mark.slow)]
)
def test_a_run_killed_at_any_point_is_completed_to_the_same_bytes(
    tmp_path: Path, which: str, kills: int
) -> None:
    sweep = [sys.executable, str(Path(__file__).parent / "sweep.py"), str(tmp_path), which]
    done = subprocess.run(sweep, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["missing"] == [], "the sweep passes every point there is"
    assert found["problems"] == []
    assert found["kills"] >= kills


@pytest.mark.parametrize("action", ["enospc", "eio"])
@pytest.mark.parametrize("point", WRITES)
def test_a_write_that_fails_leaves_the_old_file_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, action: str
) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")
    monkeypatch.setenv("MEDMAMBA_FAILPOINTS", f"{point}={action}")
    with pytest.raises(EnvironmentFault) as caught:
        write_atomic(path, "new")
    assert caught.value.code == {"enospc": "E_IO_NOSPACE", "eio": "E_IO_WRITE"}[action]
    assert path.read_text() == ("new" if point == "after_replace" else "old")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


@pytest.mark.parametrize("name", ["b.nii.gz", "b.json"])
@pytest.mark.parametrize("point", WRITES[:3])
def test_a_full_disk_is_named_and_what_was_finished_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, name: str
) -> None:
    cases = [image(tmp_path / "in", case, mark=i, seed=i) for i, case in enumerate("abc")]
    predict_cases(cases, tmp_path / "whole", ThresholdPredictor(), model=MODEL)
    monkeypatch.setenv("MEDMAMBA_FAILPOINTS", f"{point}:{name}=enospc")
    out = tmp_path / "out"
    if name == "b.json":
        with pytest.raises(EnvironmentFault) as caught:
            predict_cases(cases, out, ThresholdPredictor(), model=MODEL)
        assert caught.value.code == "E_IO_NOSPACE"
        assert not (out / "b.json").exists()
    else:
        run = predict_cases(cases, out, ThresholdPredictor(), model=MODEL)
        assert [record.status for record in run.records] == ["ok", "failed", "ok"]
        assert run.records[1].error is not None
        assert run.records[1].error.code == "E_IO_NOSPACE"
        assert not (out / "b.nii.gz").exists()
    monkeypatch.delenv("MEDMAMBA_FAILPOINTS")
    predict_cases(cases, out, ThresholdPredictor(), model=MODEL)
    assert tree(out) == tree(tmp_path / "whole")


def test_a_point_nobody_knows_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDMAMBA_FAILPOINTS", "before_luch=kill")
    with pytest.raises(ValueError, match="before_luch"):
        failpoint("before_open")


WORKER_POINTS = (
    "before_case:b",
    "before_infer:b",
    "before_export:b",
    "after_clear:b",
    "mid_write:b.nii.gz",
    "after_replace:b.nii.gz",
    "before_record:b",
    "mid_write:b.json",
    "after_replace:b.json",
    "after_folder_sync:b.json",
)


@pytest.mark.parametrize("action", ["kill", "crash"])
@pytest.mark.parametrize(
    "point",
    [
        pytest.param(point, marks=() if point == "mid_write:b.nii.gz" else pytest.mark.slow)
        for point in WORKER_POINTS
    ],
)
def test_a_worker_that_ends_at_any_point_is_replaced_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, action: str
) -> None:
    monkeypatch.setenv("MEDMAMBA_FAILPOINTS", f"{point}={action}")
    monkeypatch.setenv("MEDMAMBA_FAILPOINTS_ONCE", str(tmp_path / "spent_point"))
    run = run_fake(tmp_path, "abc")
    assert (tmp_path / "spent_point").exists()
    assert run.exit_code == 0
    assert set(statuses(run)) == set("abc")
    monkeypatch.undo()
    assert tree(tmp_path / "out") == undisturbed(tmp_path, "abc")
