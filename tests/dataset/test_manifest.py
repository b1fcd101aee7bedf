"""Lists of any length: read as a stream, judged case by case, divided into shares."""

import json
import tracemalloc
from pathlib import Path

import pytest

from medmamba.dataset import Case, Rejection, find_cases
from medmamba.dataset.manifest import CaseStream, open_cases, open_manifest
from medmamba.dataset.shards import Shard
from medmamba.errors import UsageError


def images(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def manifest(folder: Path, *entries: object, name: str = "cases.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def judged(path: Path, **options) -> tuple[list[str], dict[str, str]]:
    found = list(open_manifest(path, **{"channels": 1, **options}))
    taken = [item.id for item in found if isinstance(item, Case)]
    return taken, {item.id: item.code for item in found if isinstance(item, Rejection)}


def test_columns_and_keys_name_channels_by_number(tmp_path: Path) -> None:
    images(tmp_path, *(f"a{number}.nii.gz" for number in range(11)))
    head = [f"channel_{number}" for number in (10, *range(10))]
    cells = [f"a{number}.nii.gz" for number in (10, *range(10))]
    table = tmp_path / "cases.csv"
    table.write_text(f"Site,{','.join(head)},case_id\nnorth,{','.join(cells)},a\n")
    lines = manifest(tmp_path, {"id": "a", **dict(zip(head, cells, strict=True)), "site": "north"})
    for path in (table, lines):
        (case,) = open_manifest(path, channels=11)
        assert case.id == "a"
        assert [item.name for item in case.images] == [f"a{number}.nii.gz" for number in range(11)]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_stream_says_what_a_list_says(kind: str, tmp_path: Path) -> None:
    images(tmp_path, "a.nii.gz", "b.nii.gz", "twin.nii.gz")
    rows = [("a", "a.nii.gz"), ("b", "b.nii.gz"), ("gone", "none.nii.gz"), ("", "a.nii.gz"),
            ("Twin", "twin.nii.gz"), ("twin", "twin.nii.gz"), ("x/y", "a.nii.gz")]  # fmt: skip
    path = tmp_path / f"cases.{kind}"
    if kind == "csv":
        path.write_text("case_id,channel_0\n" + "".join(f"{name},{file}\n" for name, file in rows))
    else:
        manifest(tmp_path, *({"case_id": name, "channel_0": file} for name, file in rows))
    taken, rejected = judged(path)
    assert taken == ["a", "b"]
    assert sorted(rejected.values()) == [
        "E_ID_COLLISION", "E_ID_COLLISION", "E_IO_MISSING", "E_PATH_UNSAFE", "E_PATH_UNSAFE",
    ]  # fmt: skip
    listing = find_cases(path, channels=1)
    assert [case.id for case in listing.cases] == taken
    assert {item.id: item.code for item in listing.rejected} == rejected
    assert open_manifest(path, channels=1).total == listing.total == 7


def test_paths_never_leave_the_folder_they_belong_to(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    images(inside, "good.nii.gz", "sub/deep.nii.gz")
    images(outside, "secret.nii.gz")
    (inside / "link").symlink_to(outside)
    path = manifest(
        inside,
        {"case_id": "good", "channel_0": "good.nii.gz"},
        {"case_id": "deep", "channel_0": "sub/../sub/deep.nii.gz"},
        {"case_id": "own", "channel_0": str(inside / "good.nii.gz")},
        {"case_id": "dots", "channel_0": "../out/secret.nii.gz"},
        {"case_id": "absolute", "channel_0": str(outside / "secret.nii.gz")},
        {"case_id": "linked", "channel_0": "link/secret.nii.gz"},
        {"case_id": "nul", "channel_0": "good\0.nii.gz"},
        {"case_id": "long", "channel_0": "x" * 5000},
    )
    taken, rejected = judged(path)
    assert taken == ["good", "deep", "own"]
    assert rejected == {
        "dots": "E_PATH_ESCAPE", "absolute": "E_PATH_ESCAPE", "linked": "E_PATH_ESCAPE",
        "nul": "E_PATH_UNSAFE", "long": "E_IO_READ",
    }  # fmt: skip
    assert {"absolute", "dots", "linked"} <= set(judged(path, follow_links=True)[0])


def test_paths_may_be_relative_to_another_folder(tmp_path: Path) -> None:
    images(tmp_path / "archive", "a.nii.gz")
    (tmp_path / "lists").mkdir()
    path = manifest(tmp_path / "lists", {"case_id": "a", "channel_0": "a.nii.gz"})
    assert judged(path)[1] == {"a": "E_IO_MISSING"}
    assert judged(path, root=tmp_path / "archive")[0] == ["a"]
    with pytest.raises(UsageError, match="--root"):
        open_cases(tmp_path / "archive", channels=1, root=tmp_path)


def test_masks_are_never_taken_for_images(tmp_path: Path) -> None:
    images(tmp_path, "a.nii.gz", "out/b.nii.gz")
    path = manifest(tmp_path, {"images": "a.nii.gz"}, {"images": "out/b.nii.gz"})
    assert judged(path, apart_from=tmp_path / "out") == (["a"], {"b": "E_PATH_OUTPUT"})


@pytest.mark.parametrize("start", ["=", "+", "-", "@"])
def test_formulas_of_spreadsheets_are_refused(start: str, tmp_path: Path) -> None:
    text = f"{start}HYPERLINK(1)"
    images(tmp_path, f"{text}.nii.gz", "a.nii.gz")
    path = tmp_path / "cases.csv"
    path.write_text(
        f"case_id,channel_0\n{text},a.nii.gz\nname,{text}.nii.gz\nplain,./{text}.nii.gz\n"
    )
    taken, rejected = judged(path)
    assert taken == ["plain"]
    assert set(rejected.values()) == {"E_PATH_UNSAFE"}
    assert "name" in rejected


def test_missing_channels_are_not_taken_for_files_that_hold_all(tmp_path: Path) -> None:
    images(tmp_path, "a0.nii.gz", "a1.nii.gz")
    path = tmp_path / "cases.csv"
    path.write_text(
        "case_id,channel_0,channel_1\nboth,a0.nii.gz,a1.nii.gz\nfirst,,a1.nii.gz\n"
        "whole,a0.nii.gz,\nnone,,\n"
    )
    taken, rejected = judged(path, channels=2)
    assert taken == ["both", "whole"]
    assert rejected == {"first": "E_CHAN_COUNT", "none": "E_CHAN_COUNT"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"case_id": "a", "channel_0": "x"}\n{"case_id"\n', "line 2"),
        ("b.jsonl", '{"case_id": "a", "channel_0": 3}\n', "line 1"),
        ("c.jsonl", "[" * 100_000 + "\n", "line 1"),
        ("d.jsonl", "\n\n", "no case"),
        ("e.csv", "case_id,age\na,3\n", "no column of files"),
        ("f.csv", "case_id,channel_x\na,3\n", "channel_x"),
        ("g.csv", "case_id,channel_0,channel_00\na,x,y\n", "two columns"),
        ("h.csv", "case_id,channel_0\na,\xff\n", "cannot be read"),
        ("i.csv", "case_id,channel_0\na," + "x" * 200_000 + "\n", "line 2"),
    ],
)
def test_a_list_that_cannot_be_understood_starts_nothing(name, content, words, tmp_path) -> None:
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UsageError, match=words):
        open_manifest(tmp_path / name, channels=1)


def test_shares_of_a_stream(tmp_path: Path) -> None:
    images(tmp_path, *(f"c{number}.nii.gz" for number in range(30)))
    path = manifest(tmp_path, *({"images": f"c{number}.nii.gz"} for number in range(30)))
    shares = [open_cases(path, channels=1, shard=Shard(index=at, count=3)) for at in range(3)]
    assert all(isinstance(share, CaseStream) for share in shares)
    assert sum(share.total for share in shares) == 30
    taken = [[case.id for case in share] for share in shares]
    assert [len(part) for part in taken] == [share.total for share in shares]
    assert {name for part in taken for name in part} == {f"c{number}" for number in range(30)}


def test_memory_does_not_grow_with_the_list(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    with path.open("w") as lines:
        for number in range(20_000):
            line = {"case_id": f"case_{number:06d}", "channel_0": f"{number}/image_0000.nii.gz"}
            lines.write(json.dumps(line) + "\n")
    tracemalloc.start()
    try:
        stream = open_manifest(path, channels=1)
        first = next(iter(stream))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert stream.total == 20_000
    assert isinstance(first, Rejection)
    # A list of cases would take ten times as much.
    assert peak < 50 * stream.total
