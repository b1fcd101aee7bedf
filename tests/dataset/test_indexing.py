"""An index finds every image, names each case once, and can be predicted from where it lies."""

import json
import os
from pathlib import Path

import pytest

from medmamba.dataset import Case
from medmamba.dataset.indexing import index_folder
from medmamba.dataset.manifest import open_manifest
from medmamba.errors import UsageError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def entries(path: Path) -> dict[str, list[str]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["case_id"] for row in rows}) == len(rows)
    return {row.pop("case_id"): list(row.values()) for row in rows}


def test_channels_are_grouped_and_counted(tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    touch(archive, "one/a_0000.nii.gz", "one/a_0001.nii.gz", "two/deep/b.nii", "two/notes.txt",
          "patient_0007.nii.gz", "patient_0008.nii.gz", ".hidden/c.nii.gz", "two/._b.nii",
          "gap_0000.nii.gz", "gap_0002.nii.gz")  # fmt: skip
    outcome = index_folder(archive, tmp_path / "cases.jsonl")
    assert entries(tmp_path / "cases.jsonl") == {
        "patient_0007": ["archive/patient_0007.nii.gz"],
        "patient_0008": ["archive/patient_0008.nii.gz"],
        "a": ["archive/one/a_0000.nii.gz", "archive/one/a_0001.nii.gz"],
        "b": ["archive/two/deep/b.nii"],
    }
    assert (outcome.cases, outcome.by_channels) == (4, {1: 3, 2: 1})
    assert (outcome.folders, outcome.other_files) == (4, 1)
    assert outcome.left_out == 1
    assert "gap: channel 0001" in outcome.problems[0]


def test_what_is_indexed_can_be_predicted(tmp_path: Path) -> None:
    archive, elsewhere = tmp_path / "archive", tmp_path / "lists"
    touch(archive, "x/a.nii.gz", "umlaut ü/b.nii.gz", os.fsdecode(b"odd\xff.nii.gz"))
    elsewhere.mkdir()
    for place in (archive, tmp_path, elsewhere):
        outcome = index_folder(archive, place / "cases.jsonl")
        stream = open_manifest(place / "cases.jsonl", channels=1, root=outcome.root)
        found = list(stream)
        assert all(isinstance(case, Case) for case in found), found
        assert len(found) == stream.total == 3
        (place / "cases.jsonl").unlink()


def test_names_that_several_cases_have(tmp_path: Path) -> None:
    touch(tmp_path, "in/p1/scan.nii.gz", "in/p2/scan.nii.gz", "in/p2/other.nii.gz", "in/t1.nii",
          "in/t1_0000.nii")  # fmt: skip
    target = tmp_path / "cases.jsonl"
    outcome = index_folder(tmp_path / "in", target)
    assert list(entries(target)) == ["other"]
    assert (outcome.cases, outcome.left_out, outcome.by_channels) == (1, 4, {1: 1})
    outcome = index_folder(tmp_path / "in", target, id_from="path")
    assert sorted(entries(target)) == ["p1_scan", "p2_other", "p2_scan"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cases.jsonl", "in"]


def test_the_channels_of_a_model_are_asked_for(tmp_path: Path) -> None:
    touch(tmp_path, "a_0000.nii", "a_0001.nii", "b_0000.nii", "b_0001.nii", "b_0002.nii", "c.nii")
    outcome = index_folder(tmp_path, tmp_path / "cases.jsonl", channels=2)
    # A lone file may hold both channels itself; reading decides.
    assert sorted(entries(tmp_path / "cases.jsonl")) == ["a", "c"]
    assert outcome.problems == ("b: 3 channels, not 2",)


def test_series_and_archives_are_cases(tmp_path: Path) -> None:
    from dicom_phantom import make_series, save

    save(make_series(), tmp_path / "in" / "study" / "ct")
    touch(tmp_path, "in/study/report/readme.txt")
    outcome = index_folder(tmp_path / "in", tmp_path / "cases.jsonl")
    assert entries(tmp_path / "cases.jsonl") == {"ct": ["in/study/ct"]}
    assert (outcome.cases, outcome.series, outcome.other_files) == (1, 1, 1)
    (case,) = open_manifest(tmp_path / "cases.jsonl", channels=1)
    assert case.images == (tmp_path / "in" / "study" / "ct",)


def test_links_are_not_followed_and_nothing_is_written_without_images(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    with pytest.raises(UsageError, match="holds no image"):
        index_folder(tmp_path / "in", tmp_path / "cases.jsonl")
    assert not (tmp_path / "cases.jsonl").exists()
    with pytest.raises(UsageError, match="jsonl"):
        index_folder(tmp_path / "in", tmp_path / "cases.xml")
    with pytest.raises(UsageError, match="no folder"):
        index_folder(tmp_path / "none", tmp_path / "cases.jsonl")
