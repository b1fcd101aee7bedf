"""Folds: nnU-Net's, read from files, and the rules for folds beyond them."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmamba.dataset import make_splits, open_dataset, read_splits, split_for_fold, write_splits
from medmamba.errors import DatasetError


def test_equal_to_the_reference(fixtures_dir: Path) -> None:
    paths = sorted(fixtures_dir.rglob("splits_final.json"))
    if not paths:
        pytest.skip("no golden splits under the fixtures folder")
    for path in paths:
        expected = read_splits(path)
        ids = [*expected[0].train, *expected[0].validation]
        assert make_splits(list(reversed(ids))) == expected


@given(st.lists(st.text("abc0123_", min_size=1, max_size=6), min_size=2, max_size=40, unique=True))
def test_every_case_validates_once(ids: list[str]) -> None:
    splits = make_splits(ids)
    assert len(splits) == min(5, len(ids))
    assert sorted(name for split in splits for name in split.validation) == sorted(ids)
    for split in splits:
        assert sorted([*split.train, *split.validation]) == sorted(ids)
        assert list(split.train) == sorted(split.train)
        assert list(split.validation) == sorted(split.validation)
    sizes = [len(split.validation) for split in splits]
    assert max(sizes) - min(sizes) <= 1


def test_folds_beyond_and_all() -> None:
    ids = [f"case_{index}" for index in range(10)]
    splits = make_splits(ids)
    assert split_for_fold(splits, 2, ids) == splits[2]
    assert split_for_fold(splits, "2", ids) == splits[2]
    everything = split_for_fold(splits, "all", ids)
    assert everything.train == everything.validation == tuple(ids)
    beyond = split_for_fold(splits, 7, ids)
    chosen = np.random.RandomState(12345 + 7).choice(10, 8, replace=False)
    assert beyond.train == tuple(ids[index] for index in sorted(chosen))
    assert len(beyond.validation) == 2


def test_what_is_refused(tmp_path: Path) -> None:
    ids = [f"case_{index}" for index in range(10)]
    splits = make_splits(ids)
    for fold in (-1, "x"):
        with pytest.raises(DatasetError, match="a number from 0 or 'all'"):
            split_for_fold(splits, fold, ids)
    with pytest.raises(DatasetError, match="not in the dataset"):
        split_for_fold(splits, 0, ids[:5])
    with pytest.raises(DatasetError, match="cannot be divided"):
        make_splits(["one"])
    with pytest.raises(DatasetError, match="occurs twice"):
        make_splits(["a", "b", "a"])
    path = tmp_path / "splits_final.json"
    for text, message in (
        ("[]", "a list of folds"),
        ('[{"train": ["a"]}]', "needs the lists"),
        ('[{"train": ["a", "b"], "val": ["b"]}]', "both trains and validates on b"),
    ):
        path.write_text(text)
        with pytest.raises(DatasetError, match=message):
            read_splits(path)


def test_file_round_trip_and_folds_of_the_dataset(raw_dataset: Path) -> None:
    assert open_dataset(raw_dataset).splits == ()
    splits = make_splits([f"case_{index:02d}" for index in range(6)])[:2]
    write_splits(raw_dataset / "splits_final.json", splits)
    value = json.loads((raw_dataset / "splits_final.json").read_text())
    assert list(value[0]) == ["train", "val"]
    assert open_dataset(raw_dataset).splits == splits
