"""Verification: every kind of problem, all of them at once, with values and proposals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from medmamba.dataset import (
    VerificationReport,
    open_dataset,
    orientation_code,
    survey_dataset,
    verify,
)
from medmamba.errors import DatasetError
from medmamba.files import from_plain, to_json
from medmamba.volume import Geometry

Edit = Callable[..., None]
Write = Callable[..., Path]
SHAPE = (10, 12, 8)


def values(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, SHAPE).astype(np.float32)


def labels() -> np.ndarray:
    array = np.zeros(SHAPE, np.uint8)
    array[2:5, 3:6, 2:5] = 1
    array[6:8, 7:10, 3:6] = 2
    return array


def found(folder: Path) -> dict[tuple[str | None, str], str]:
    report = verify(open_dataset(folder), workers=2)
    return {(problem.case, problem.code): problem.message for problem in report.problems}


def test_sound_dataset(raw_dataset: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = verify(
        open_dataset(raw_dataset), progress=lambda done, total: calls.append((done, total))
    )
    assert report.problems == ()
    assert not report.fatal
    assert report.orientations == {"RAS": 6}
    assert report.label_voxels == {0: 6 * (960 - 45), 1: 6 * 27, 2: 6 * 18}
    assert report.label_cases == {0: 6, 1: 6, 2: 6}
    assert calls == [(index, 6) for index in range(1, 7)]
    restored = from_plain(
        VerificationReport, json.loads(to_json(report)), what="report", error=DatasetError
    )
    assert restored == report


def test_faults_of_the_description_come_together_with_those_of_cases(
    raw_dataset: Path, edit: Edit
) -> None:
    path = raw_dataset / "imagesTr" / "case_01_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:-1000])
    edit(
        raw_dataset,
        file_ending=".nii.zip",
        channel_names=None,
        labels={"background": 0, "a": 1, "b": 3},
        numTraining=7,
    )
    (raw_dataset / "splits_final.json").write_text("[{]")
    report = verify(survey_dataset(raw_dataset))
    faults = [problem.message for problem in report.problems if problem.code == "E_DATASET"]
    for part, fault in zip(
        ("'channel_names'", "'file_ending' is '.nii.zip'", "[0, 1, 3] have gaps", "splits_final"),
        faults,
        strict=True,
    ):
        assert part in fault
    others = {(problem.case, problem.code) for problem in report.fatal[len(faults) :]}
    undeclared = {(f"case_{index:02d}", "E_LABEL_UNDECLARED") for index in range(6)}
    assert others == {("case_01", "E_IO_TRUNCATED"), (None, "E_DATA_COUNT")} | undeclared
    with pytest.raises(DatasetError, match="4 problems"):
        open_dataset(raw_dataset)


def test_entries_of_a_file_list_are_all_named(raw_dataset: Path, edit: Edit) -> None:
    entry = {"images": ["imagesTr/case_00_0000.nii.gz", "imagesTr/case_00_0001.nii.gz"]}
    edit(raw_dataset, dataset={"case_00": entry, "case_01": {}, "case_02": {"images": "x"}})
    report = verify(survey_dataset(raw_dataset))
    faults = [problem.message for problem in report.problems if problem.code == "E_DATASET"]
    assert ["case_01" in faults[0], "case_02" in faults[1], len(faults)] == [True, True, 2]
    assert ("case_00", "E_LABEL_MISSING") in {(p.case, p.code) for p in report.problems}


def test_all_problems_at_once(raw_dataset: Path, volume: Write, edit: Edit) -> None:
    images, targets = raw_dataset / "imagesTr", raw_dataset / "labelsTr"
    (images / "case_00_0001.nii.gz").unlink()
    path = images / "case_01_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:-1000])
    volume(targets / "case_02.nii.gz", labels()[:, :, :7])
    wrong = labels()
    wrong[0, 0, :3] = 7
    volume(targets / "case_03.nii.gz", wrong)
    (targets / "case_04.nii.gz").unlink()
    volume(images / "case_05_0002.nii.gz", values(1))
    edit(raw_dataset, numTraining=7)
    problems = found(raw_dataset)
    assert "0001 is missing" in problems["case_00", "E_CHAN_COUNT"]
    assert "case_01_0000.nii.gz" in problems["case_01", "E_IO_TRUNCATED"]
    grid = problems["case_02", "E_LABEL_GRID"]
    assert "7x12x10" in grid
    assert "8x12x10" in grid
    assert "7 (3 voxels)" in problems["case_03", "E_LABEL_UNDECLARED"]
    assert "case_04.nii.gz" in problems["case_04", "E_LABEL_MISSING"]
    assert "0002" in problems["case_05", "E_CHAN_COUNT"]
    assert "7, but there are 6" in problems[None, "E_DATA_COUNT"]
    assert len(problems) == 7
    report = verify(open_dataset(raw_dataset))
    assert len(report.fatal) == 7
    assert all(problem.suggestion for problem in report.fatal)
    assert all("\n" not in str(problem) for problem in report.problems)


def shift(path: Path, write: Write) -> None:
    write(path, labels(), origin=(0.0, 3.0, 0.0))


def coarse(path: Path, write: Write) -> None:
    write(path, labels(), (1.0, 1.5, 2.5))


def rounded(path: Path, write: Write) -> None:
    write(path, labels(), origin=(0.02, 0.0, 0.0))


def empty(path: Path, write: Write) -> None:
    write(path, np.zeros(SHAPE, np.uint8))


def almost(path: Path, write: Write) -> None:
    write(path, labels() * np.float32(0.9999))


def halves(path: Path, write: Write) -> None:
    write(path, labels() * np.float32(0.5))


def nonfinite(path: Path, write: Write) -> None:
    array = labels().astype(np.float32)
    array[0, 0, 0] = np.nan
    write(path, array)


def channels(path: Path, write: Write) -> None:
    write(path, np.stack([labels(), labels()], -1))


@pytest.mark.parametrize(
    ("spoil", "code", "texts"),
    [
        (shift, "E_LABEL_GRID", ("origin (0, 3, 0)", "expected (0, 0, 0)", "2 voxels apart")),
        (coarse, "E_LABEL_GRID", ("spacing (2.5, 1.5, 1) mm", "expected (2, 1.5, 1) mm")),
        (rounded, "W_GRID_ROUNDING", ("0.02",)),
        (empty, "W_LABEL_EMPTY", ("no foreground",)),
        (almost, "W_VAL_ROUNDED", ("45 label values",)),
        (halves, "E_VAL_FRACTIONS", ("27 label values", "0.5")),
        (nonfinite, "E_VAL_NONFINITE", ("1 label values",)),
        (channels, "E_SHAPE_4D", ("2 values per voxel",)),
    ],
)
def test_one_label_file(
    spoil: Callable[[Path, Write], None],
    code: str,
    texts: tuple[str, ...],
    raw_dataset: Path,
    volume: Write,
) -> None:
    spoil(raw_dataset / "labelsTr" / "case_02.nii.gz", volume)
    problems = found(raw_dataset)
    assert list(problems) == [("case_02", code)]
    for text in texts:
        assert text in problems["case_02", code]


def test_one_image_file(raw_dataset: Path, volume: Write) -> None:
    images = raw_dataset / "imagesTr"
    spoiled = values(5)
    spoiled[0, 0, :2] = np.inf
    volume(images / "case_00_0000.nii.gz", spoiled)
    volume(images / "case_01_0001.nii.gz", values(6), origin=(9.0, 0.0, 0.0))
    volume(images / "case_02_0001.nii.gz", np.zeros(SHAPE, np.int16))
    for channel in range(2):
        volume(images / f"case_03_{channel:04d}.nii.gz", np.full(SHAPE, channel, np.int16))
    problems = found(raw_dataset)
    assert "2 of 960 values" in problems["case_00", "E_VAL_NONFINITE"]
    assert "case_01_0001.nii.gz" in problems["case_01", "E_CHAN_GRID"]
    assert "case_02_0001.nii.gz" in problems["case_02", "W_VAL_CONSTANT"]
    # Without a single channel to see anything in, the case is unusable.
    assert "every value is 1" in problems["case_03", "E_VAL_CONSTANT"]
    assert len(problems) == 4


def test_values_that_no_image_of_its_kind_has(raw_dataset: Path, volume: Write, edit: Edit) -> None:
    edit(raw_dataset, channel_names={"0": "CT", "1": "MRI"})
    images = raw_dataset / "imagesTr"
    for index in range(6):
        volume(images / f"case_{index:02d}_0000.nii.gz", values(index) - 500)
    volume(images / "case_01_0000.nii.gz", values(7) + 950)
    volume(images / "case_02_0000.nii.gz", values(8))
    problems = found(raw_dataset)
    assert list(problems) == [("case_01", "W_HU_RANGE"), ("case_02", "W_MODALITY")]


def test_a_unit_that_makes_voxels_of_metres(raw_dataset: Path) -> None:
    for path in [*raw_dataset.glob("*Tr/case_01*")]:
        image = nibabel.load(path)
        image.header.set_xyzt_units("meter")
        nibabel.save(image, path)
    message = found(raw_dataset)["case_01", "E_GEOM_SPACING"]
    assert "1000" in message


def test_files_of_no_case_absent_classes_and_orientations(
    raw_dataset: Path, volume: Write, edit: Edit
) -> None:
    edit(raw_dataset, labels={"background": 0, "liver": 1, "tumour": 2, "vessel": 3})
    volume(raw_dataset / "imagesTr" / "unnumbered.nii.gz", values(1))
    volume(raw_dataset / "labelsTr" / "orphan.nii.gz", labels())
    for name in ("imagesTr/case_05_0000", "imagesTr/case_05_0001", "labelsTr/case_05"):
        content = labels() if name.startswith("labels") else values(len(name))
        volume(raw_dataset / f"{name}.nii.gz", content + 0, (-1.0, -1.5, 2.0))
    problems = found(raw_dataset)
    assert "unnumbered.nii.gz" in problems[None, "W_NAME_STRAY"]
    assert "orphan.nii.gz" in problems[None, "W_LABEL_STRAY"]
    assert "'vessel' [3]" in problems[None, "W_CLASS_ABSENT"]
    assert "RAS (5 cases), LPS (1 cases)" in problems[None, "W_ORIENTATION"]
    assert not verify(open_dataset(raw_dataset)).fatal


def test_copies_across_folds(raw_dataset: Path, volume: Write) -> None:
    for channel in range(2):
        source = raw_dataset / "imagesTr" / f"case_01_{channel:04d}.nii.gz"
        target = raw_dataset / "imagesTr" / f"case_04_{channel:04d}.nii.gz"
        target.write_bytes(source.read_bytes())
    assert "case_04" in found(raw_dataset)["case_01", "W_DUPLICATE"]
    ids = [f"case_{index:02d}" for index in range(6)]
    splits = [{"train": ids[:3], "val": ids[3:]}, {"train": ids[2:], "val": ["case_00", "ghost"]}]
    (raw_dataset / "splits_final.json").write_text(json.dumps(splits))
    problems = found(raw_dataset)
    assert "case_01 and case_04" in problems[None, "E_SPLIT_LEAK"]
    assert "ghost" in problems[None, "E_SPLIT_CASES"]


def test_listed_file_that_does_not_exist(raw_dataset: Path, edit: Edit) -> None:
    entry = {"images": ["imagesTr/none.nii.gz"], "label": "labelsTr/none.nii.gz"}
    edit(raw_dataset, dataset={"a": entry}, numTraining=1)
    problems = found(raw_dataset)
    assert set(problems) == {("a", "E_IO_MISSING")}


def test_orientation_code() -> None:
    assert orientation_code(Geometry.from_spacing((3, 4, 5), (1, 2, 3))) == "RAS"
    turned = np.array([[0.1, 0, -1, 0], [-2, 0.1, 0, 0], [0, 3, 0, 0], [0, 0, 0, 1.0]])
    assert orientation_code(Geometry.from_matrix((3, 4, 5), turned)) == "LSP"


def test_real_datasets_are_sound(data_dir: Path) -> None:
    for path in sorted(data_dir.glob("*/dataset.json")):
        assert not verify(open_dataset(path.parent), workers=2).problems


def test_counts_negative_and_wide_labels(raw_dataset: Path, volume: Write) -> None:
    array: Any = labels().astype(np.int32)
    array[0, 0, 0], array[0, 0, 1] = -3, 200_000
    volume(raw_dataset / "labelsTr" / "case_00.nii.gz", array)
    message = found(raw_dataset)["case_00", "E_LABEL_UNDECLARED"]
    assert "-3 (1 voxels), 200000 (1 voxels)" in message
    array[0, 0, 1] = 0
    volume(raw_dataset / "labelsTr" / "case_00.nii.gz", array)
    assert "-3 (1 voxels)." in found(raw_dataset)["case_00", "E_LABEL_UNDECLARED"]


def test_every_problem_of_the_description_at_once(raw_dataset: Path, edit: Edit) -> None:
    edit(raw_dataset, channel_names={"1": "CT"}, file_ending=".jpg", numTraining=None,
         labels={"background": 0, "liver": 2})  # fmt: skip
    with pytest.raises(
        DatasetError, match=r"(?s)4 problems.*channel_names.*file_ending.*gaps.*numTraining"
    ):
        open_dataset(raw_dataset)
