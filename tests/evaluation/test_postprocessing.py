import json
from pathlib import Path

import numpy as np
import pytest

from medmamba.errors import PlanError
from medmamba.evaluation.postprocessing import (
    Postprocessing,
    apply_to_folder,
    determine_postprocessing,
    load_postprocessing,
    save_postprocessing,
)
from medmamba.io import read_labels
from medmamba.labels import LabelMap


def golden_files(root: Path) -> list[Path]:
    files = sorted(root.rglob("postprocessing.json"))
    if not files:
        pytest.skip(f"no golden postprocessing under {root}")
    return files


def label_map_of(content: dict) -> LabelMap:
    values = {"background": (0,)}
    values |= {key: (int(key),) for key in content["input_folder"]["mean"]}
    return LabelMap(values=values)


def test_the_choice_equals_the_golden_one(fixtures_dir: Path, tmp_path: Path) -> None:
    for path in golden_files(fixtures_dir / "evaluation"):
        expected = json.loads(path.read_text())
        choice = determine_postprocessing(
            path.parent / "reference",
            path.parent / "prediction",
            label_map=label_map_of(expected),
        )
        save_postprocessing(tmp_path / "postprocessing.json", choice)
        assert json.loads((tmp_path / "postprocessing.json").read_text()) == expected
        assert load_postprocessing(path) == choice.postprocessing


def test_the_result_equals_the_golden_one(fixtures_dir: Path, tmp_path: Path) -> None:
    for path in golden_files(fixtures_dir / "evaluation"):
        folder = path.parent
        apply_to_folder(load_postprocessing(path), folder / "prediction", tmp_path / "clean")
        for mask in sorted((folder / "postprocessed").glob("*.nii.gz")):
            found, _ = read_labels(tmp_path / "clean" / mask.name)
            expected, _ = read_labels(mask)
            np.testing.assert_array_equal(found.array, expected.array)


def test_steps_are_applied_in_order() -> None:
    labels = np.zeros((1, 1, 9), dtype=np.uint8)
    labels[0, 0] = [1, 1, 2, 0, 2, 2, 2, 2, 0]
    both = Postprocessing(steps=((1, 2), (2,)))
    np.testing.assert_array_equal(both.apply(labels)[0, 0], [0, 0, 0, 0, 2, 2, 2, 2, 0])
    other = Postprocessing(steps=((2,), (1, 2)))
    np.testing.assert_array_equal(other.apply(labels)[0, 0], [0, 0, 0, 0, 2, 2, 2, 2, 0])
    assert Postprocessing().apply(labels) is labels


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        '{"postprocessing_fns": ["run"], "postprocessing_kwargs": [{"labels_or_regions": 1}]}',
        '{"postprocessing_fns": [], "postprocessing_kwargs": [{"labels_or_regions": "x"}]}',
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "postprocessing.json"
    path.write_text(content)
    with pytest.raises(PlanError, match=r"postprocessing\.json"):
        load_postprocessing(path)
