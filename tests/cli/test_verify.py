"""``medmamba verify MODEL`` as a user runs it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medmamba.acceptance import Acceptance
from medmamba.cli.app import app
from medmamba.errors import SecurityError, UsageError

from ..test_bundle import bundle  # noqa: F401


def run(*arguments: object):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def test_a_sound_model_passes(bundle) -> None:  # noqa: F811
    result = run(bundle.folder)
    assert result.exit_code == 0
    assert "identical mask (100.0000% of voxels equal" in result.output
    found = json.loads(run(bundle.folder, "--json").stdout)
    assert (found["outcome"], found["passed"], found["sha256"]) == (
        "identical", True, bundle.sha256,
    )  # fmt: skip


def test_a_changed_file_is_refused(bundle) -> None:  # noqa: F811
    path = bundle.folder / "weights" / "fold_0.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    result = run(bundle.folder)
    assert isinstance(result.exception, SecurityError)


def test_a_machine_that_computes_otherwise_fails(bundle, monkeypatch) -> None:  # noqa: F811
    other = Acceptance(outcome="different", agreement=0.5, logits_difference=3.0)
    monkeypatch.setattr("medmamba.bundle.verify_bundle", lambda _: other)
    result = run(bundle.folder)
    assert result.exit_code == 4
    assert "different mask" in result.output


@pytest.mark.parametrize("name", ["empty", "absent"])
def test_what_is_no_model_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    result = run(tmp_path / name)
    assert isinstance(result.exception, UsageError)
    assert "manifest.json" in result.exception.message
