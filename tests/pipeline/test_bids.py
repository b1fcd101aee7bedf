"""A BIDS folder in, a BIDS derivative out, through the real command; and a validator's word."""

import json
import shutil
import subprocess
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medmamba.bundle import save_bundle

from ..conformance.phantom import nifti, packed, voxels
from ..test_bundle import CONFIGURATION, tiny_plan, weights

VALIDATOR = shutil.which("bids-validator-deno")
MASK = "desc-Dataset001Tinyplainunet_dseg"


def put(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(packed(nifti(voxels(seed))))
    sidecar = path.with_name(path.name.replace(".nii.gz", ".json"))
    sidecar.write_text("{}")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two subjects, one with sessions, with files that are no images to predict."""
    root = tmp_path / "bids"
    put(root / "sub-01" / "anat" / "sub-01_T1w.nii.gz", 1)
    put(root / "sub-01" / "anat" / "sub-01_T2w.nii.gz", 2)
    put(root / "sub-02" / "ses-a" / "anat" / "sub-02_ses-a_run-1_T1w.nii.gz", 3)
    put(root / "sub-02" / "ses-a" / "anat" / "sub-02_ses-a_run-2_T1w.nii.gz", 4)
    put(root / "sub-02" / "ses-a" / "func" / "sub-02_ses-a_task-rest_bold.nii.gz", 5)
    put(root / "derivatives" / "x" / "sub-01" / "anat" / "sub-01_T1w.nii.gz", 6)
    (root / "dataset_description.json").write_text(
        json.dumps({"Name": "x", "BIDSVersion": "1.10.0", "DatasetDOI": "doi:10.1000/x"})
    )
    return root


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    save_bundle(
        folder, plan=tiny_plan(), configuration=CONFIGURATION, weights=[weights(0)],
        precision="fp32",
    )  # fmt: skip
    return folder


def test_a_bids_folder_becomes_a_bids_derivative(dataset, model, medmamba, tmp_path) -> None:
    out = dataset / "derivatives" / "medmamba"
    words = ["predict", "-i", dataset, "-o", out, "-m", model, "--layout", "bids", "--in-process"]
    code, _, error = medmamba(*words)
    assert code == 2
    assert "T1w, T2w" in error
    code, _, error = medmamba(*words, "--bids-suffix", "T1w", "--json")
    assert code == 0, error
    masks = {str(path.relative_to(out)) for path in out.glob("sub-*/**/*.nii.gz")}
    assert masks == {
        f"sub-01/anat/sub-01_{MASK}.nii.gz",
        f"sub-02/ses-a/anat/sub-02_ses-a_run-1_{MASK}.nii.gz",
        f"sub-02/ses-a/anat/sub-02_ses-a_run-2_{MASK}.nii.gz",
    }
    mask = nibabel.load(out / "sub-01" / "anat" / f"sub-01_{MASK}.nii.gz")
    image = nibabel.load(dataset / "sub-01" / "anat" / "sub-01_T1w.nii.gz")
    np.testing.assert_array_equal(mask.affine, image.affine)
    about = json.loads((out / "sub-01" / "anat" / f"sub-01_{MASK}.json").read_text())
    assert about["SpatialReference"] == "orig"
    description = json.loads((out / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"][0]["Name"] == "medmamba"
    assert description["SourceDatasets"] == [{"DOI": "doi:10.1000/x"}]
    table = (out / f"{MASK}.tsv").read_text().splitlines()
    assert table[0].split("\t") == ["index", "name", "color"]
    assert [line.split("\t")[:2] for line in table[1:]] == [["1", "front"], ["2", "back"]]
    assert len(list((out / "medmamba" / "run").glob("*/report.html"))) == 1
    assert medmamba("verify", out)[0] == 0
    assert medmamba("report", out)[0] == 0
    code, status, _ = medmamba("status", out, "--json")
    assert (code, json.loads(status)["done"]) == (0, 3)


def test_shares_of_a_bids_folder_are_accounted_for(dataset, model, medmamba, tmp_path) -> None:
    out = tmp_path / "out"
    words = ["predict", "-i", dataset, "-o", out, "-m", model, "--layout", "bids", "--in-process",
             "--bids-suffix", "T1w", "--no-report", "--shard"]  # fmt: skip
    account = ["verify", out, "--expect-shards", "2", "-i", dataset, "--bids-suffix", "T1w"]
    assert medmamba(*words, "0/2")[0] == 0
    code, told, _ = medmamba(*account, "--json")
    told = json.loads(told)
    assert code == 4
    assert [item["index"] for item in told["shards_unfinished"]] == [1]
    assert len(told["cases_missing"]) == 3 - len(list((out / "medmamba").glob("sub-*.json")))
    assert medmamba(*words, "1/2")[0] == 0
    assert medmamba(*account)[0] == 0


def test_what_is_rejected_later_is_taken_away(dataset, model, medmamba, tmp_path) -> None:
    out = tmp_path / "out"
    words = ["predict", "-i", dataset, "-o", out, "-m", model, "--layout", "bids", "--in-process",
             "--bids-suffix", "T2w", "--no-report"]  # fmt: skip
    assert medmamba(*words)[0] == 0
    shown = out / "sub-01" / "anat" / f"sub-01_{MASK}.nii.gz"
    assert shown.is_file()
    # As if the tree had been lost: finished cases are shown again, not segmented again.
    shutil.rmtree(out / "sub-01")
    assert medmamba(*words)[0] == 0
    assert shown.is_file()
    (dataset / "sub-01" / "anat" / "sub-01_T2w.nii.gz").write_bytes(b"")
    assert medmamba(*words)[0] == 5
    assert not list((out / "sub-01" / "anat").iterdir())


def test_other_folders_can_be_laid_out_too(model, medmamba, tmp_path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number, name in enumerate(("case_1", "case1")):
        (images / f"{name}_0000.nii.gz").write_bytes(packed(nifti(voxels(number))))
    out = tmp_path / "out"
    assert medmamba("predict", "-i", images, "-o", out, "-m", model, "--layout", "bids",
               "--in-process", "--no-report")[0] == 0  # fmt: skip
    subjects = sorted(path.name for path in out.glob("sub-*"))
    assert len(subjects) == 2
    assert "sub-case1" in subjects
    assert medmamba("predict", "-i", images, "-o", out, "-m", model, "--layout", "tree")[0] == 2


@pytest.mark.slow
@pytest.mark.skipif(VALIDATOR is None, reason="no BIDS validator (pip install bids-validator-deno)")
def test_a_validator_finds_no_error(dataset, model, medmamba, tmp_path) -> None:
    out = tmp_path / "out"
    assert medmamba("predict", "-i", dataset, "-o", out, "-m", model, "--layout", "bids",
               "--in-process", "--bids-suffix", "T1w")[0] == 0  # fmt: skip
    done = subprocess.run(
        [str(VALIDATOR), "--json", str(out)], capture_output=True, timeout=120, check=False
    )
    issues = json.loads(done.stdout)["issues"]["issues"]
    errors = [issue for issue in issues if issue["severity"] == "error"]
    assert not errors, errors


def test_channels_are_found_by_what_the_model_calls_them(dataset: Path) -> None:
    from medmamba.dataset import find_cases

    listing = find_cases(dataset, channels=2, modalities=("T2", "T1"))
    [case] = listing.cases
    assert case.id == "sub-01"
    assert [path.name for path in case.images] == ["sub-01_T2w.nii.gz", "sub-01_T1w.nii.gz"]
    assert [(item.id, item.code) for item in listing.rejected] == [
        ("sub-02_ses-a_run-1", "E_CHAN_COUNT"), ("sub-02_ses-a_run-2", "E_CHAN_COUNT"),
    ]  # fmt: skip
    assert [case.id for case in find_cases(dataset, channels=1, modalities=("t2w",)).cases] == [
        "sub-01"
    ]
