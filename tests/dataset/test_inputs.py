"""Which cases a path means, and which are rejected without harm to the others."""

import json
import os
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmamba.dataset import CaseListing, find_cases, safe_id
from medmamba.dataset.inputs import SAFE_ID
from medmamba.errors import UsageError


def touch(folder: Path, *names: str) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / name for name in names]
    for path in paths:
        path.write_bytes(b"x")
    return paths


def ids(listing: CaseListing) -> list[str]:
    return [case.id for case in listing.cases]


def codes(listing: CaseListing) -> dict[str, str]:
    return {rejection.id: rejection.code for rejection in listing.rejected}


def test_folder_of_channels(tmp_path: Path) -> None:
    names = ("a_0000", "a_0001", "b_0000", "b_0001", "b_0002", "c_0001", "four", "._a_0000")
    touch(tmp_path, "notes.txt", *(f"{name}.nii.gz" for name in names))
    listing = find_cases(tmp_path, channels=2)
    assert ids(listing) == ["a", "four"]
    assert [path.name for path in listing.cases[0].images] == ["a_0000.nii.gz", "a_0001.nii.gz"]
    assert codes(listing) == {"b": "E_CHAN_COUNT", "c": "E_CHAN_COUNT"}
    messages = {rejection.id: rejection.message for rejection in listing.rejected}
    assert "too many: 0002" in messages["b"]
    assert "missing 0000" in messages["c"]


def test_folder_of_single_channels_with_any_names(tmp_path: Path) -> None:
    touch(tmp_path, "a_0000.nii.gz", "scan.nii", "patient_0007.nii.gz", "patient_0008.nii.gz")
    listing = find_cases(tmp_path, channels=1)
    assert ids(listing) == ["a", "patient_0007", "patient_0008", "scan"]
    assert not listing.rejected


def test_formats(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "b.nii", "c.png", "d.NII.GZ", "e.json")
    listing = find_cases(tmp_path, channels=1, file_ending=".nii.gz")
    assert ids(listing) == ["a", "b", "d"]
    assert [path.name for path in listing.ignored] == ["c.png", "e.json"]
    assert ids(find_cases(tmp_path, channels=1)) == ["a", "b", "c", "d"]


def test_single_file(tmp_path: Path) -> None:
    first, *_ = touch(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "patient_0007.nii.gz")
    (case,) = find_cases(first, channels=2).cases
    assert (case.id, len(case.images)) == ("a", 2)
    assert ids(find_cases(first, channels=1)) == ["a"]
    assert ids(find_cases(tmp_path / "patient_0007.nii.gz", channels=1)) == ["patient_0007"]
    assert codes(find_cases(tmp_path / "a_0001.nii.gz", channels=3)) == {"a": "E_CHAN_COUNT"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("l.txt", "# cases\nsub/a_0000.nii.gz\tsub/a_0001.nii.gz\n\nsub/b.nii.gz\n"),
        ("l.csv", "case_id,channel_0,channel_1\n"
                  "a,sub/a_0000.nii.gz,sub/a_0001.nii.gz\nb,sub/b.nii.gz,\n"),
        ("m.csv", "sub/a_0000.nii.gz,sub/a_0001.nii.gz\nsub/b.nii.gz\n"),
        ("l.json", json.dumps([["sub/a_0000.nii.gz", "sub/a_0001.nii.gz"], "sub/b.nii.gz"])),
        ("m.json", json.dumps({"a": ["sub/a_0000.nii.gz", "sub/a_0001.nii.gz"],
                               "b": "sub/b.nii.gz"})),
        ("l.jsonl", '{"case_id": "a", "channel_0": "sub/a_0000.nii.gz",'
                    ' "channel_1": "sub/a_0001.nii.gz"}\n'
                    '{"case_id": "b", "images": ["sub/b.nii.gz"]}\n'),
    ],
)  # fmt: skip
def test_lists(name: str, content: str, tmp_path: Path) -> None:
    touch(tmp_path / "sub", "a_0000.nii.gz", "a_0001.nii.gz", "b.nii.gz")
    path = tmp_path / name
    path.write_text(content)
    listing = find_cases(path, channels=2)
    assert ids(listing) == ["a", "b"]
    assert [len(case.images) for case in listing.cases] == [2, 1]
    assert not listing.rejected


def test_lists_that_cannot_be_read(tmp_path: Path) -> None:
    for name, content in (("a.json", "{"), ("b.json", "3"), ("c.json", "[3]"), ("d.txt", "\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UsageError):
            find_cases(tmp_path / name, channels=1)


def test_paths_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        find_cases(tmp_path / "none", channels=1)
    with pytest.raises(UsageError, match="holds no image"):
        find_cases(tmp_path, channels=1)
    touch(tmp_path, "scan.xyz")
    with pytest.raises(UsageError, match="unknown file ending"):
        find_cases(tmp_path / "scan.xyz", channels=1)


@pytest.mark.parametrize(
    "name", ["../../etc/x", "/etc/x", "a\0b", "a\nb", "a\x1bb", "..", "a\\b", ""]
)
def test_unsafe_names_are_rejected(name: str, tmp_path: Path) -> None:
    touch(tmp_path, "good.nii.gz", "bad.nii.gz")
    path = tmp_path / "l.json"
    path.write_text(json.dumps([{"case_id": "good", "images": "good.nii.gz"},
                                {"case_id": name, "images": "bad.nii.gz"}]))  # fmt: skip
    listing = find_cases(path, channels=1)
    assert ids(listing) == ["good"]
    assert [rejection.code for rejection in listing.rejected] == ["E_PATH_UNSAFE"]
    assert SAFE_ID.fullmatch(listing.rejected[0].id)
    assert "\n" not in listing.rejected[0].message


def test_awkward_names_get_safe_ids(tmp_path: Path) -> None:
    names = ["-dash", "with space", "\N{BRAIN}", "<script>", "=cmd()", "x" * 200]
    touch(tmp_path, *(f"{name}.nii.gz" for name in names))
    listing = find_cases(tmp_path, channels=1)
    assert not listing.rejected
    assert dict(listing.renamed).keys() == set(ids(listing))
    assert set(dict(listing.renamed).values()) == set(names)
    for case_id in ids(listing):
        assert SAFE_ID.fullmatch(case_id)


def test_collisions_reject_both(tmp_path: Path) -> None:
    accent = "caf\u00e9"
    touch(tmp_path, "A.nii.gz", "a.nii.gz", "x.nii", "x.nii.gz", "good.nii.gz",
          f"{accent}.nii.gz", f"{unicodedata.normalize('NFD', accent)}.nii.gz")  # fmt: skip
    listing = find_cases(tmp_path, channels=1)
    assert ids(listing) == ["good"]
    assert [rejection.code for rejection in listing.rejected] == ["E_ID_COLLISION"] * 6


def test_links_pipes_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    touch(folder, "good.nii.gz")
    (outside,) = touch(tmp_path / "out", "secret.nii.gz")
    (folder / "inside.nii.gz").symlink_to("good.nii.gz")
    (folder / "escape.nii.gz").symlink_to(outside)
    (folder / "loop.nii.gz").symlink_to("loop.nii.gz")
    (folder / "dangling.nii.gz").symlink_to("none.nii.gz")
    (folder / "folder.nii.gz").mkdir()
    os.mkfifo(folder / "pipe.nii.gz")
    listing = find_cases(folder, channels=1)
    assert ids(listing) == ["good", "inside"]
    assert codes(listing) == {
        "escape": "E_PATH_ESCAPE", "loop": "E_PATH_LOOP", "dangling": "E_IO_MISSING",
        "folder": "E_PATH_NOTFILE", "pipe": "E_PATH_NOTFILE",
    }  # fmt: skip
    assert "escape" in ids(find_cases(folder, channels=1, follow_links=True))


def test_many_files_are_listed_quickly(tmp_path: Path) -> None:
    for index in range(5_000):
        (tmp_path / f"case_{index:05d}.nii.gz").touch()
    start = time.perf_counter()
    assert len(find_cases(tmp_path, channels=1).cases) == 5_000
    assert time.perf_counter() - start < 2


@settings(max_examples=50)
@given(st.text(max_size=200))
def test_safe_ids_are_safe(name: str) -> None:
    assert SAFE_ID.fullmatch(safe_id(name))
    assert safe_id(safe_id(name)) == safe_id(name)
