import json
import math
from pathlib import Path

import numpy as np
import pytest

from medmamba.errors import DatasetError, GeometryError
from medmamba.evaluation.report import (
    evaluate_case,
    evaluate_folder,
    score_labels,
    write_evaluation,
)
from medmamba.io import SourceHeader, read_header, write_labels
from medmamba.labels import LabelMap
from medmamba.volume import Geometry

TWO = LabelMap(values={"background": (0,), "front": (1,), "back": (2,)})
REGIONS = LabelMap(
    values={"background": (0,), "whole": (1, 2), "core": (2,), "ignore": (3,)},
    region_order=(1, 2),
)


def golden_folders(root: Path) -> list[Path]:
    return sorted(
        path.parent for path in root.rglob("summary.json") if path.parent.name != "postprocessed"
    )


def as_found(evaluation_summary: object) -> object:
    return json.loads(json.dumps(evaluation_summary))


def assert_same_numbers(found: object, expected: object) -> None:
    if isinstance(expected, dict):
        assert isinstance(found, dict)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same_numbers(found[key], value)
    elif isinstance(expected, list):
        assert isinstance(found, list)
        assert len(found) == len(expected)
        for left, right in zip(found, expected, strict=True):
            assert_same_numbers(left, right)
    elif isinstance(expected, str):
        assert Path(str(found)).name == Path(expected).name
    else:
        assert found == pytest.approx(expected, rel=1e-9, nan_ok=True)


def label_map_of(summary: dict) -> LabelMap:
    values = {"background": (0,)}
    for key in summary["mean"]:
        value = json.loads(key.replace("(", "[").replace(")", "]"))
        values[f"label {key}"] = tuple(value) if isinstance(value, list) else (value,)
    return LabelMap(values=values)


def test_summaries_equal_the_golden_ones(fixtures_dir: Path) -> None:
    folders = golden_folders(fixtures_dir / "evaluation")
    if not folders:
        pytest.skip(f"no golden summaries under {fixtures_dir}")
    for folder in folders:
        expected = json.loads((folder / "summary.json").read_text())
        for part, against in (("prediction", expected), ("postprocessed", None)):
            if against is None:
                against = json.loads((folder / part / "summary.json").read_text())
            evaluation = evaluate_folder(
                folder / "reference", folder / part, label_map=label_map_of(expected)
            )
            assert_same_numbers(as_found(evaluation.summary(extra=False)), against)


@pytest.fixture
def header(tmp_path: Path) -> SourceHeader:
    """Header of a plain NIfTI image, made by hand so that no test needs another's files."""
    import nibabel as nib

    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    path = tmp_path / "image.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((7, 6, 5), dtype=np.int16), affine), path)
    return read_header(path)


def write(folder: Path, name: str, labels: np.ndarray, header: SourceHeader) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.nii.gz"
    write_labels(path, labels, header)
    return path


def some_labels(seed: int, top: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, top, (5, 6, 7)).astype(np.uint8)


def test_counts_follow_the_definitions(tmp_path: Path) -> None:
    reference, prediction = some_labels(1), some_labels(2)
    geometry = Geometry.from_spacing((5, 6, 7), (3.0, 2.0, 1.0))
    scores = score_labels(reference, prediction, label_map=TWO, geometry=geometry)
    overlap = scores["front"].overlap
    truth, guess = reference == 1, prediction == 1
    assert overlap.tp == (truth & guess).sum()
    assert overlap.fp == (~truth & guess).sum()
    assert overlap.fn == (truth & ~guess).sum()
    assert overlap.tn == (~truth & ~guess).sum()
    assert overlap.dice == pytest.approx(2 * overlap.tp / (truth.sum() + guess.sum()))
    assert scores["front"].metrics()["volume_ref_ml"] == pytest.approx(truth.sum() * 6 / 1000)


def test_ignored_voxels_and_regions() -> None:
    reference, prediction = some_labels(3, top=4), some_labels(4)
    geometry = Geometry.from_spacing((5, 6, 7), (1.0, 1.0, 1.0))
    scores = score_labels(reference, prediction, label_map=REGIONS, geometry=geometry)
    kept = reference != 3
    truth, guess = np.isin(reference, (1, 2))[kept], np.isin(prediction, (1, 2))[kept]
    overlap = scores["whole"].overlap
    assert list(scores) == ["whole", "core"]
    assert overlap.tp == (truth & guess).sum()
    assert overlap.tn == (~truth & ~guess).sum()
    assert overlap.tp + overlap.fp + overlap.fn + overlap.tn == kept.sum()


def test_a_label_that_is_nowhere_enters_no_mean(tmp_path: Path, header: SourceHeader) -> None:
    with_back, without = some_labels(5), np.minimum(some_labels(6), 1)
    for name, labels in (("a", with_back), ("b", without)):
        write(tmp_path / "ref", name, labels, header)
        write(tmp_path / "pred", name, labels, header)
    evaluation = evaluate_folder(tmp_path / "ref", tmp_path / "pred", label_map=TWO)
    assert math.isnan(evaluation.cases[1].labels["back"].overlap.dice)
    row = evaluation.rows()[1]
    assert (row.label, row.cases, row.dice) == ("back", 1, 1.0)
    assert evaluation.foreground_dice == 1.0
    summary_path, table = write_evaluation(tmp_path / "out", evaluation)
    stored = json.loads(summary_path.read_text(), parse_constant=pytest.fail)
    assert stored["metric_per_case"][1]["metrics"]["2"]["Dice"] is None
    assert stored["labels"] == {"1": "front", "2": "back"}
    lines = table.read_text().splitlines()
    assert len(lines) == 1 + 2 * 2
    assert lines[0].startswith("case,label,Dice")


def test_one_empty_mask_gives_valid_json(tmp_path: Path, header: SourceHeader) -> None:
    write(tmp_path / "ref", "a", some_labels(7), header)
    write(tmp_path / "pred", "a", np.zeros((5, 6, 7), np.uint8), header)
    evaluation = evaluate_folder(tmp_path / "ref", tmp_path / "pred", label_map=TWO)
    assert evaluation.cases[0].labels["front"].surface.hd95_mm == math.inf
    summary_path, _ = write_evaluation(tmp_path / "out", evaluation)
    stored = json.loads(summary_path.read_text(), parse_constant=pytest.fail)
    assert stored["metric_per_case"][0]["metrics"]["1"]["HD95_mm"] is None
    assert stored["metric_per_case"][0]["metrics"]["1"]["NSD"] == 0


def test_another_grid_is_an_error_that_names_both(tmp_path: Path, header: SourceHeader) -> None:
    import nibabel as nib

    reference = write(tmp_path / "ref", "a", some_labels(8), header)
    (tmp_path / "pred").mkdir()
    prediction = tmp_path / "pred" / "a.nii.gz"
    moved = nib.load(reference).affine.copy()
    moved[0, 3] += 5
    nib.save(nib.Nifti1Image(np.asarray(nib.load(reference).dataobj), moved), prediction)
    with pytest.raises(GeometryError) as caught:
        evaluate_case(reference, prediction, label_map=TWO, case_id="a")
    assert str(reference) in caught.value.message
    assert str(prediction) in caught.value.message


def test_missing_predictions_fail_unless_allowed(tmp_path: Path, header: SourceHeader) -> None:
    for name in "abc":
        write(tmp_path / "ref", name, some_labels(9), header)
    write(tmp_path / "pred", "b", some_labels(9), header)
    with pytest.raises(DatasetError, match=r"2 of 3 .*\(a, c\)"):
        evaluate_folder(tmp_path / "ref", tmp_path / "pred", label_map=TWO)
    allowed = evaluate_folder(
        tmp_path / "ref", tmp_path / "pred", label_map=TWO, allow_missing=True
    )
    assert allowed.missing == ("a", "c")
    assert [case.case_id for case in allowed.cases] == ["b"]
    write(tmp_path / "other", "x", some_labels(9), header)
    with pytest.raises(DatasetError, match="named like"):
        evaluate_folder(tmp_path / "ref", tmp_path / "other", label_map=TWO, allow_missing=True)


def test_two_files_may_have_any_names(tmp_path: Path, header: SourceHeader) -> None:
    first = write(tmp_path / "ref", "truth", some_labels(10), header)
    second = write(tmp_path / "pred", "guess", some_labels(10), header)
    evaluation = evaluate_folder(first, second, label_map=TWO)
    assert evaluation.foreground_dice == 1.0


@pytest.mark.parametrize("content", ["nothing", "empty"])
def test_folders_without_masks_are_refused(tmp_path: Path, content: str) -> None:
    if content == "empty":
        (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError):
        evaluate_folder(tmp_path / content, tmp_path / content, label_map=TWO)
