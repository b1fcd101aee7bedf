"""Runs that start in one output folder at the same moment do not disturb each other."""

from pathlib import Path

import pytest

from medmamba.files import require_writable_folder
from medmamba.inference.journal import sweep_temporary_files


def test_a_folder_is_proved_writable_while_another_run_sweeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def write_and_be_swept(path: Path, content: bytes) -> int:
        written = write(path, content)
        assert sweep_temporary_files(path.parent) == 1
        return written

    monkeypatch.setattr(Path, "write_bytes", write_and_be_swept)
    assert require_writable_folder(tmp_path / "out") == tmp_path / "out"
    assert not list((tmp_path / "out").iterdir())
