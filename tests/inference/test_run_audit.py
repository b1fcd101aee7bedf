"""Later edits of a run's journal show; killed runs are no edits."""

from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import MODEL, ThresholdPredictor, image
from typer.testing import CliRunner

from medmamba.cli.app import app
from medmamba.inference.assignment import Assignment
from medmamba.inference.engine import predict_cases
from medmamba.inference.run_audit import verify_runs


@pytest.fixture
def out(tmp_path: Path) -> Path:
    cases = [image(tmp_path / "in", name, mark=i, seed=i) for i, name in enumerate("ab")]
    predict_cases(Assignment(cases=cases), tmp_path / "out", ThresholdPredictor(), model=MODEL)
    return tmp_path / "out"


def run_folder(out: Path) -> Path:
    (folder,) = (place for place in (out / "run").iterdir() if place.is_dir())
    return folder


def states(out: Path) -> list[str]:
    return [run.state for run in verify_runs(out)]


EDITS: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "changed": lambda lines: [*lines[:1], lines[1].replace(b'"ok"', b'"no"'), *lines[2:]],
    "taken out": lambda lines: [*lines[:1], *lines[2:]],
    "first taken out": lambda lines: lines[1:],
    "last taken out": lambda lines: lines[:-1],
    "added": lambda lines: [*lines, lines[-1]],
    "torn": lambda lines: [*lines[:-1], lines[-1][:-5]],
    "no text": lambda lines: [*lines[:-1], b"\xff\n"],
    "empty": lambda lines: [],
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_journal_that_was_edited_is_found(out: Path, edit) -> None:
    assert states(out) == ["holds"]
    journal = run_folder(out) / "journal-0.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    edited = edit(lines)
    assert edited != lines
    journal.write_bytes(b"".join(edited))
    assert states(out) == ["changed"]
    result = CliRunner().invoke(app, ["verify", str(out)])
    assert result.exit_code == 4
    assert "0 of 1 runs" in result.output
    assert "changed   run" in result.output


def test_a_manifest_that_was_damaged_is_found(out: Path) -> None:
    (run_folder(out) / "manifest.json").write_text("{")
    assert states(out) == ["changed"]


def test_a_killed_run_is_no_edit(out: Path) -> None:
    folder = run_folder(out)
    (folder / "manifest.json").unlink()
    journal = folder / "journal-0.jsonl"
    journal.write_bytes(journal.read_bytes()[:-9])
    assert states(out) == ["open"]
    assert CliRunner().invoke(app, ["verify", str(out)]).exit_code == 0


def test_without_runs_there_is_nothing_to_judge(tmp_path: Path) -> None:
    assert verify_runs(tmp_path) == ()
