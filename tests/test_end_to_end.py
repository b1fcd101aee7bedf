"""The main job as a user runs it: plan, train, predict, evaluate on labelled ellipsoids."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import medmamba
from medmamba.errors import BundleError, CheckpointError, PlanError, SecurityError, UsageError
from medmamba.io import read_header, read_labels

NETWORK = "lightm_unet_s"
PRESETS = Path(__file__).parent.parent / "plans"
LEARNED = 0.75
"""Foreground Dice that nothing but a trained network reaches on these cases."""


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_raw_ellipsoids):
    """One planned and trained work folder for the tests that only look at it."""
    root = tmp_path_factory.mktemp("run")
    raw = write_raw_ellipsoids(root / "Dataset901_Ellipsoids")
    planned = medmamba.plan(raw, root / "work", network=NETWORK, workers=1)
    # Validation of 50 batches an epoch would be most of the time here.
    own = (PRESETS / f"{NETWORK}.toml").read_text().partition("[training]\n")[2]
    (root / "brief.toml").write_text(f"[training]\nvalidation_iterations = 5\n{own}")
    trained = medmamba.train(root / "work", epochs=3, iterations=25, **options(root / "work"))
    return raw, root / "work", planned, trained


def options(work):
    """What every training here has in common."""
    return {"network": NETWORK, "fold": "all", "recipe": str(work.parent / "brief.toml")}


def test_a_trained_network_segments_cases_it_has_not_seen(run, tmp_path):
    raw, _, _, trained = run
    outcome = medmamba.predict(raw / "imagesTs", tmp_path / "masks", trained.run_folder)
    assert (outcome.succeeded, outcome.total, outcome.exit_code) == (2, 2, 0)
    scores = medmamba.evaluate(raw / "labelsTs", tmp_path / "masks")
    assert scores.foreground_dice > LEARNED
    summary = json.loads((tmp_path / "masks" / "summary.json").read_text())
    assert summary["foreground_mean"]["Dice"] == pytest.approx(scores.foreground_dice)
    assert (tmp_path / "masks" / "metrics.csv").read_text().startswith("case,label,Dice")


def test_masks_lie_on_the_grid_of_their_image(run, tmp_path):
    raw, _, _, trained = run
    medmamba.predict(raw / "imagesTs", tmp_path, trained.model)
    for image in sorted((raw / "imagesTs").iterdir()):
        mask = tmp_path / image.name.replace("_0000", "")
        assert read_header(mask).geometry == read_header(image).geometry
        labels, _ = read_labels(mask)
        assert set(np.unique(labels.array)) <= {0, 1, 2}
        assert json.loads((tmp_path / f"{mask.name[:-7]}.json").read_text())["status"] == "ok"


def test_predicting_again_does_only_what_is_missing(run, tmp_path):
    raw, _, _, trained = run
    medmamba.predict(raw / "imagesTs", tmp_path, trained.model)
    first = {path.name: path.read_bytes() for path in tmp_path.glob("*.nii.gz")}
    (tmp_path / "case_006.nii.gz").unlink()
    again = medmamba.predict(raw / "imagesTs", tmp_path, trained.model)
    statuses = {record.case_id: record.status for record in again.run.records}
    assert statuses == {"case_006": "ok", "case_007": "skipped"}
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.nii.gz")} == first


def test_a_bad_case_costs_no_other(run, tmp_path):
    raw, _, _, trained = run
    images = tmp_path / "images"
    shutil.copytree(raw / "imagesTs", images)
    bad = images / "broken_0000.nii.gz"
    whole = (images / "case_006_0000.nii.gz").read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    outcome = medmamba.predict(images, tmp_path / "masks", trained.model)
    assert outcome.exit_code == 4
    assert sorted(path.name for path in (tmp_path / "masks").glob("*.nii.gz")) == [
        "case_006.nii.gz",
        "case_007.nii.gz",
    ]
    record = json.loads((tmp_path / "masks" / "broken.json").read_text())
    assert (record["status"], record["error"]["code"]) == ("rejected", "E_IO_TRUNCATED")


def test_fine_tuning_begins_where_a_trained_model_ended(run, tmp_path):
    _, work, _, trained = run
    copy = tmp_path / "work"
    shutil.copytree(work, copy, ignore=shutil.ignore_patterns("runs"))
    brief = options(work) | {"epochs": 1, "iterations": 1}
    tuned = medmamba.train(copy, **brief, init=trained.run_folder)
    assert tuned.dice > 0.5, "one step of a fresh network finds nothing"
    start = json.loads((tuned.run_folder / "start.json").read_text())
    assert (start["remade"], start["skipped"]) == ({}, {})
    manifest = json.loads((tuned.model / "manifest.json").read_text())
    assert manifest["training"]["started_from"].startswith("Dataset901_Ellipsoids")
    with pytest.raises(CheckpointError, match="its start is"):
        medmamba.train(copy, **brief, resume=True)


def test_the_plan_says_what_was_decided_and_why(run):
    _, work, planned, _ = run
    stored = json.loads((work / "plans" / f"{NETWORK}.json").read_text())
    assert stored["configurations"]["3d_fullres"]["patch_size"]
    topics = " ".join(reason.topic for reason in planned.plan.reasons)
    for word in ("spacing", "patch", "batch", "memory", "normalisation"):
        assert word in topics
    assert all(reason.why for reason in planned.plan.reasons)


def test_planning_again_makes_nothing_anew(run):
    raw, work, _, _ = run
    files = {path: path.stat().st_mtime_ns for path in (work / "preprocessed").rglob("*.b2nd")}
    medmamba.plan(raw, work, network=NETWORK, workers=1)
    assert files == {
        path: path.stat().st_mtime_ns for path in (work / "preprocessed").rglob("*.b2nd")
    }


def test_a_run_is_never_overwritten_unasked(run):
    _, work, _, _ = run
    with pytest.raises(CheckpointError, match="--resume"):
        medmamba.train(work, network=NETWORK, fold="all", epochs=1, iterations=1)


def test_a_network_must_be_planned_first(run):
    _, work, _, _ = run
    with pytest.raises(PlanError, match="medmamba plan DATASET"):
        medmamba.train(work, network="plain_unet", fold=0, epochs=1)


def test_options_that_exclude_each_other(run):
    _, work, _, _ = run
    with pytest.raises(UsageError, match="exclude"):
        medmamba.train(work, network=NETWORK, epochs=1, max_time=10)
    with pytest.raises(UsageError, match="exclude"):
        medmamba.train(work, network=NETWORK, resume=True, overwrite=True)
    with pytest.raises(UsageError, match="dice_ce"):
        medmamba.train(work, network=NETWORK, loss="hinge")


def test_a_plan_of_another_version(run, tmp_path):
    _, work, _, _ = run
    shutil.copytree(work / "plans", tmp_path / "plans")
    path = tmp_path / "plans" / f"{NETWORK}.json"
    plan = json.loads(path.read_text())
    plan["medmamba"]["version"] = 999
    path.write_text(json.dumps(plan))
    with pytest.raises(PlanError, match="999"):
        medmamba.train(tmp_path, network=NETWORK)


def test_a_model_with_changed_or_missing_weights(run, tmp_path):
    raw, _, _, trained = run
    model = tmp_path / "model"
    shutil.copytree(trained.model, model)
    weights = next((model / "weights").iterdir())
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(SecurityError):
        medmamba.predict(raw / "imagesTs", tmp_path / "out", model)
    weights.unlink()
    with pytest.raises(BundleError, match=weights.name):
        medmamba.predict(raw / "imagesTs", tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_time_budget_is_kept(run):
    _, work, _, _ = run
    import time

    begin = time.monotonic()
    outcome = medmamba.train(work, network=NETWORK, fold=0, max_time=20)
    assert time.monotonic() - begin < 30
    rows = [
        json.loads(line) for line in (outcome.run_folder / "log.jsonl").read_text().splitlines()
    ]
    steps = [row for row in rows if row["kind"] == "step"]
    assert steps[-1]["lr"] < 0.1 * max(row["lr"] for row in steps)
    assert outcome.model.is_dir()


def test_a_planned_folder_can_move(run, tmp_path):
    _, work, _, _ = run
    moved = tmp_path / "elsewhere"
    shutil.copytree(work, moved, ignore=shutil.ignore_patterns("runs"))
    outcome = medmamba.train(moved, epochs=1, iterations=1, **options(work))
    assert Path(outcome.model).is_relative_to(moved)
