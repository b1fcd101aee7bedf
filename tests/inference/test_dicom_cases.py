"""DICOM series through the engine: what is listed, what is written, and what is not."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_phantom import SENTINEL, localizer, make_series, phantom, save
from fakes import MODEL, ThresholdPredictor, predict_cases

from medmamba.dataset import find_cases
from medmamba.errors import UsageError
from medmamba.inference.assignment import PredictionRun


def run(source: Path, out: Path) -> PredictionRun:
    listing = find_cases(source, channels=1, file_ending=".nii.gz")
    return predict_cases(
        listing.cases, out, ThresholdPredictor(), model=MODEL, rejected=listing.rejected
    )


def test_each_series_of_a_folder_is_a_case_and_a_bad_one_costs_nothing(tmp_path: Path) -> None:
    source = tmp_path / "in"
    save(make_series(), source / "a")
    with_gap = make_series()
    save(with_gap[:3] + with_gap[4:], source / "b")
    save(make_series(), source / "c" / "deeper")
    save([localizer()], source / "c")
    (source / "notes").mkdir()
    (source / "notes" / "text.txt").write_text("nothing")
    result = run(source, tmp_path / "out")
    assert [record.case_id for record in result.records] == ["a", "b", "c"]
    assert [record.status for record in result.records] == ["ok", "rejected", "ok_with_warnings"]
    assert result.records[2].warnings[0].startswith("W_DCM_SERIES")
    assert result.exit_code == 4
    assert (tmp_path / "out" / "a.seg.dcm").is_file()
    assert not (tmp_path / "out" / "b.seg.dcm").exists()
    mask = nib.load(tmp_path / "out" / "a.nii.gz")
    np.testing.assert_array_equal(
        np.asarray(mask.dataobj).T, (phantom() > 50).astype(int) + (phantom() > 100)
    )
    again = run(source, tmp_path / "out")
    assert [record.status for record in again.records] == ["skipped", "rejected", "skipped"]


def test_a_folder_of_slices_or_an_archive_is_one_case(tmp_path: Path) -> None:
    folder = save(make_series(), tmp_path / "study")
    [case] = find_cases(folder, channels=1).cases
    assert (case.id, case.images) == ("study", (folder,))
    (tmp_path / "bad.zip").write_bytes(b"PK nothing")
    assert [case.id for case in find_cases(tmp_path, channels=1).cases] == ["bad", "study"]
    with pytest.raises(UsageError, match="inside an input series"):
        run(folder, folder / "out")


def test_nothing_that_names_the_patient_is_written(tmp_path: Path) -> None:
    def mark(index: int, dataset: object) -> None:
        dataset.ImageComments = f"{SENTINEL} comment"  # type: ignore[attr-defined]
        dataset.StudyDescription = f"{SENTINEL} study"  # type: ignore[attr-defined]
        dataset.SeriesDescription = f"{SENTINEL} series"  # type: ignore[attr-defined]

    save(make_series(change=mark), tmp_path / SENTINEL / "in" / "good")
    save(make_series(change=mark)[::3], tmp_path / SENTINEL / "in" / "two")
    save(make_series(change=mark)[:4] + make_series(change=mark), tmp_path / SENTINEL / "in" / "x")
    result = run(tmp_path / SENTINEL / "in", tmp_path / "out")
    assert len(result.records) == 3
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file() and path.suffix != ".dcm":
            content = path.read_bytes()
            if path.name.endswith(".gz"):
                content = nib.load(path).header.binaryblock
            assert SENTINEL.encode() not in content, path.name
            assert b"19010203" not in content, path.name
