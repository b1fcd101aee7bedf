import re
from pathlib import Path

import pytest

from medmamba.errors import UsageError
from medmamba.io.viewer_labels import ViewerLabel, write_viewer_labels

LABELS = (
    ViewerLabel(value=1, name="left kidney", color="#ff8000"),
    ViewerLabel(value=12, name='so-called "cyst"', color="#0a141e"),
)


def test_slicer_gets_a_colour_table(tmp_path: Path) -> None:
    (path,) = write_viewer_labels(tmp_path, LABELS, ["slicer"])
    assert path.name == "labels.ctbl"
    rows = [line.split() for line in path.read_text().splitlines() if not line.startswith("#")]
    assert rows[0] == ["0", "background", "0", "0", "0", "0"]
    assert rows[1] == ["1", "left_kidney", "255", "128", "0", "255"]
    assert all(len(row) == 6 for row in rows)


def test_itksnap_gets_a_label_description(tmp_path: Path) -> None:
    (path,) = write_viewer_labels(tmp_path, LABELS, ["itksnap"])
    row = re.compile(r'\s*(\d+)\s+(\d+)\s+(\d+)\s+(\d+)\s+([\d.]+)\s+([01])\s+([01])\s+"([^"]*)"$')
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    found = [row.match(line).groups() for line in lines]
    assert found[0][0] == "0"
    assert found[1] == ("1", "255", "128", "0", "1", "1", "1", "left kidney")
    assert found[2] == ("12", "10", "20", "30", "1", "1", "1", "so-called 'cyst'")


def test_unknown_viewers_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="slicer, itksnap"):
        write_viewer_labels(tmp_path, LABELS, ["slicer", "paint"])
    assert not list(tmp_path.iterdir())
