"""``check`` finds the cases that ``predict`` finds, by the same options; and row J5."""

import json
from pathlib import Path

import pytest
from dicom_phantom import save

from .dicom_rows import _acquisitions
from .phantom import nifti, packed, voxels


def judged(medmamba, *words: object) -> dict[str, bool]:
    _, out, error = medmamba("check", *words, "--json")
    assert out, error
    return {item["case_id"]: item["accepted"] for item in json.loads(out)["cases"]}


def test_images_of_a_bids_folder_are_named(medmamba, model, tmp_path) -> None:
    for number, suffix in enumerate(("T1w", "T2w")):
        path = tmp_path / "bids" / "sub-01" / "anat" / f"sub-01_{suffix}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(packed(nifti(voxels(number))) if number else b"")
    code, _, error = medmamba("check", tmp_path / "bids", "-m", model)
    assert code == 2
    assert "--bids-suffix" in error
    for options in (("-m", model), ()):
        found = [
            judged(medmamba, tmp_path / "bids", *options, "--bids-suffix", suffix)
            for suffix in ("T1w", "T2w")
        ]
        assert found == [{"sub-01": False}, {"sub-01": True}]


def test_lists_are_completed_by_a_folder(medmamba, model, images, tmp_path) -> None:
    listed = tmp_path / "lists" / "cases.csv"
    listed.parent.mkdir()
    listed.write_text("case_id,channel_0\na,case0_0000.nii.gz\n")
    assert judged(medmamba, listed, "-m", model) == {"a": False}
    assert judged(medmamba, listed, "-m", model, "--root", images) == {"a": True}
    listed.write_text(f"case_id,channel_0\na,{images}/case0_0000.nii.gz\n")
    assert judged(medmamba, listed, "-m", model) == {"a": False}
    assert judged(medmamba, listed, "-m", model, "--follow-links") == {"a": True}


def test_acquisitions_are_judged_one_by_one(medmamba, model, tmp_path) -> None:
    save(_acquisitions(), tmp_path / "in" / "mixed")
    assert judged(medmamba, tmp_path / "in", "-m", model) == {"mixed": False}
    for options in (("-m", model), ()):
        found = judged(medmamba, tmp_path / "in", *options, "--split-acquisitions")
        assert found == {"mixed-acq1": True, "mixed-acq2": True}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "bids"])
def test_a_listing_that_is_behind_costs_double_work_only(
    medmamba, model, images, tmp_path, layout
) -> None:
    # Row J5: a store that does not show a record yet. The case is done again, to the same bytes.
    out = tmp_path / "out"
    words = ("predict", "-i", images, "-o", out, "-m", model, "--in-process", "--no-report",
             "--layout", layout)  # fmt: skip
    assert medmamba(*words)[0] == 0
    before = contents(out)
    for path in out.rglob("case*.json"):
        if "sub-" not in path.name:
            path.unlink()
    code, printed, _ = medmamba(*words, "--json")
    assert code == 0
    assert {item["status"] for item in json.loads(printed)["cases"]} == {"ok"}
    assert contents(out) == before


def contents(folder: Path) -> dict[str, bytes]:
    masks = [path for path in folder.rglob("*.nii.gz") if "run" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in masks}
