"""Every bad input through the real command, between good cases: right status, code and files.

One run takes the whole table, with a good case before and after it; the same good cases alone
must give the same bytes.
"""

import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medmamba.bundle import save_bundle
from medmamba.cli.app import app

from ..test_bundle import CONFIGURATION, tiny_plan, weights
from .phantom import nifti, packed, voxels
from .rows import ROWS

GOOD = ("00good", "zzgood")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("conformance") / "model"
    save_bundle(
        folder, plan=tiny_plan(), configuration=CONFIGURATION, weights=[weights(0)],
        precision="fp32",
    )  # fmt: skip
    return folder


def write_good(folder: Path) -> None:
    folder.mkdir()
    for seed, name in enumerate(GOOD):
        (folder / f"{name}_0000.nii.gz").write_bytes(packed(nifti(voxels(seed))))


def predict(images: Path, output: Path, model: Path, *options: str):
    return CliRunner().invoke(
        app, ["predict", "-i", str(images), "-o", str(output), "-m", str(model), "--json", *options]
    )


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, model) -> tuple[dict, Path, Path, float]:
    """The run over the whole table, and one over the good cases alone."""
    place = tmp_path_factory.mktemp("rows")
    write_good(place / "images")
    for row in ROWS:
        row.make(place / "images", row.name)
    begun = time.monotonic()
    result = predict(place / "images", place / "out", model)
    took = time.monotonic() - begun
    assert result.exit_code == 4, result.output
    write_good(place / "alone")
    alone = predict(place / "alone", place / "out_alone", model, "--in-process")
    assert alone.exit_code == 0
    records = {item["case_id"]: item for item in json.loads(result.stdout)["cases"]}
    return records, place / "out", place / "out_alone", took


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row(row, outcome) -> None:
    records, out, _, _ = outcome
    record = records[row.name]
    found = (record["error"] or {}).get("code", "")
    assert record["status"] == row.status, (found, record["warnings"], record["error"])
    mask, stored = out / f"{row.name}.nii.gz", out / f"{row.name}.json"
    assert stored.is_file()
    if row.status == "rejected":
        assert found == row.code, record["error"]
        assert not mask.exists()
    else:
        assert mask.is_file()
        assert any(text.startswith(row.code) for text in record["warnings"]) or not row.code
        assert row.status != "ok" or not record["warnings"]


def test_good_cases_do_not_notice_the_bad_ones(outcome) -> None:
    _, out, alone, _ = outcome
    for name in GOOD:
        assert (out / f"{name}.nii.gz").read_bytes() == (alone / f"{name}.nii.gz").read_bytes()


def test_nothing_partial_is_left(outcome) -> None:
    _, out, _, _ = outcome
    names = {path.name for path in out.iterdir()} - {"run"}
    assert not [name for name in names if name.startswith(".")]
    allowed = {f"{case}{end}" for case in (*GOOD, *(r.name for r in ROWS)) for end in
               (".json", ".nii.gz")}  # fmt: skip
    assert names <= allowed


def test_a_bad_case_is_judged_quickly(outcome) -> None:
    # Two seconds a case is the promise; the whole table stays far below that.
    assert outcome[3] < 2.0 * len(ROWS)


def test_the_output_verifies_and_a_changed_mask_does_not(outcome) -> None:
    _, out, _, _ = outcome
    assert CliRunner().invoke(app, ["verify", str(out)]).exit_code == 0
    mask = out / f"{GOOD[0]}.nii.gz"
    kept = mask.read_bytes()
    try:
        mask.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        result = CliRunner().invoke(app, ["verify", str(out)])
        assert result.exit_code == 4
        assert "changed" in result.output
    finally:
        mask.write_bytes(kept)


def test_check_says_the_same_without_predicting(outcome, model, tmp_path) -> None:
    write_good(tmp_path / "images")
    chosen = [row for row in ROWS if row.name.startswith(("A0", "B0", "C0"))]
    for row in chosen:
        row.make(tmp_path / "images", row.name)
    result = CliRunner().invoke(
        app, ["check", str(tmp_path / "images"), "-m", str(model), "--json"]
    )
    assert result.exit_code == 4
    judged = {item["case_id"]: item for item in json.loads(result.stdout)["cases"]}
    for row in chosen:
        assert judged[row.name]["accepted"] is (row.status != "rejected"), judged[row.name]
        if row.status == "rejected":
            assert judged[row.name]["errors"][0].startswith(row.code), judged[row.name]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_rejected(model, tmp_path) -> None:
    write_good(tmp_path / "images")
    (tmp_path / "images" / f"{GOOD[0]}_0000.nii.gz").chmod(0)
    result = predict(tmp_path / "images", tmp_path / "out", model, "--in-process")
    assert result.exit_code == 4
    records = {item["case_id"]: item for item in json.loads(result.stdout)["cases"]}
    assert records[GOOD[0]]["error"]["code"] == "E_IO_PERMISSION"
