"""Cases of one person stay together."""

import pytest

from medmamba.dataset import Split, make_splits, read_subjects, shared_subjects
from medmamba.errors import DatasetError

CASES = tuple(f"p{number:02d}_{side}" for number in range(7) for side in "LR")


def test_a_map_or_an_expression_says_whose_a_case_is() -> None:
    by_pattern = read_subjects({"subjects": "^(.+)_[LR]$"}, [*CASES, "other"])
    assert by_pattern["p03_L"] == by_pattern["p03_R"] == "p03"
    assert by_pattern["other"] == "other"
    by_map = read_subjects({"subjects": {"p00_L": "x", "p01_L": "x"}}, CASES)
    assert by_map["p00_L"] == by_map["p01_L"] == "x"
    assert by_map["p02_L"] == "p02_L"
    assert read_subjects({}, CASES) == {case: case for case in CASES}


@pytest.mark.parametrize("entry", ["p.._.", "(", 5, {"a": 1}])
def test_what_says_nothing_is_refused(entry) -> None:
    with pytest.raises(DatasetError, match="'subjects'"):
        read_subjects({"subjects": entry}, CASES)


def test_default_folds_keep_subjects_together_and_use_every_case_once() -> None:
    subjects = read_subjects({"subjects": "^(.+)_[LR]$"}, CASES)
    splits = make_splits(CASES, subjects)
    assert len(splits) == 5
    assert sorted(case for split in splits for case in split.validation) == sorted(CASES)
    for split in splits:
        assert shared_subjects(split, subjects) == []
        assert sorted({*split.train, *split.validation}) == sorted(CASES)
    # The folds of nnU-Net where nobody has two cases.
    assert make_splits(CASES, {case: case for case in CASES}) == make_splits(CASES)
    assert any(shared_subjects(split, subjects) for split in make_splits(CASES))


def test_training_on_every_case_is_no_leak() -> None:
    split = Split(train=CASES, validation=CASES)
    assert shared_subjects(split, dict.fromkeys(CASES, "one")) == []
