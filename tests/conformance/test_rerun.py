"""Running again over a finished folder: nothing is loaded, nothing changed goes unnoticed."""

import json

import pytest

from medmamba.pipeline import predicting

from .conftest import predict
from .phantom import nifti, packed, voxels


@pytest.fixture
def done(model, images, medmamba, tmp_path):
    out = tmp_path / "out"
    assert predict(medmamba, images, out, model)[0] == 0
    return out


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """Every time a model is loaded."""
    found: list[str] = []
    make = predicting.make_predictor

    def counted(*arguments, **options):
        found.append("loaded")
        return make(*arguments, **options)

    monkeypatch.setattr(predicting, "make_predictor", counted)
    return found


def statuses(medmamba, images, out, model, *options: str) -> dict[str, str]:
    code, records = predict(medmamba, images, out, model, "--in-process", *options)
    assert code == 0
    return {name: record["status"] for name, record in records.items()}


def test_nothing_is_loaded_when_all_is_done(done, loads, model, images, medmamba) -> None:
    before = {path.name: path.read_bytes() for path in done.glob("case*")}
    for _ in range(2):  # the second follows a run that loaded nothing either
        found = statuses(medmamba, images, done, model)
        assert found == {"case0": "skipped", "case1": "skipped"}
    assert loads == []
    assert {path.name: path.read_bytes() for path in done.glob("case*")} == before
    assert medmamba("verify", done, "-i", images)[0] == 0
    runs = [json.loads(path.read_text()) for path in done.glob("run/*/manifest.json")]
    assert len(runs) == 3
    assert sum(run["counts"] == {"skipped": 2} for run in runs) == 2


def test_what_changed_is_done_again(done, loads, model, images, medmamba) -> None:
    (images / "case0_0000.nii.gz").write_bytes(packed(nifti(voxels(5))))
    assert statuses(medmamba, images, done, model) == {"case0": "ok", "case1": "skipped"}
    mask = done / "case1.nii.gz"
    mask.write_bytes(mask.read_bytes()[:-1])
    assert statuses(medmamba, images, done, model) == {"case0": "skipped", "case1": "ok"}
    (images / "case2_0000.nii.gz").write_bytes(packed(nifti(voxels(6))))
    assert statuses(medmamba, images, done, model)["case2"] == "ok"
    assert len(loads) == 3


@pytest.mark.parametrize("options", [("--tta",), ("--step", "0.25"), ("--overwrite", "always")])
def test_another_request_is_not_taken_for_the_same(
    options, done, loads, model, images, medmamba
) -> None:
    statuses(medmamba, images, done, model, *options)
    assert loads == ["loaded"]


def test_another_machine_judges_anew(done, loads, model, images, medmamba, monkeypatch) -> None:
    monkeypatch.setattr(predicting, "describe_machine", lambda: {"processor": "another"})
    found = statuses(medmamba, images, done, model)
    assert found == {"case0": "skipped", "case1": "skipped"}
    assert loads == ["loaded"]


def test_strays_of_another_format_are_no_missing_cases(done, model, images, medmamba) -> None:
    (images / "notes.png").write_bytes(b"")
    assert medmamba("verify", done, "-i", images)[0] == 0
    (images / "late_0000.nii.gz").write_bytes(packed(nifti()))
    code, out, _ = medmamba("verify", done, "-i", images)
    assert code == 4
    assert "late" in out
