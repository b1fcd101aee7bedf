"""medmamba plan as a user meets it: exit codes, reports, choices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = "import sys; from medmamba.cli.app import main; sys.exit(main())"


def plan(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "TERM": "dumb"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, "plan", *map(str, arguments)],
        capture_output=True, text=True, timeout=300, env=environment, check=False,
    )  # fmt: skip


def test_every_problem_is_reported_at_once_and_nothing_else_is_written(
    ellipsoids: Path, tmp_path: Path
) -> None:
    (ellipsoids / "labelsTr" / "case_001.nii.gz").unlink()
    image = ellipsoids / "imagesTr" / "case_003_0000.nii.gz"
    image.write_bytes(image.read_bytes()[:-500])
    done = plan(ellipsoids, "-o", tmp_path / "work", "--json")
    assert done.returncode == 3
    report = json.loads(done.stdout)
    fatal = {p["case"]: p for p in report["problems"] if p["severity"] == "fatal"}
    assert set(fatal) == {"case_001", "case_003"}
    assert all(problem["suggestion"] for problem in fatal.values())
    written = {path.name for path in (tmp_path / "work").rglob("*")}
    assert written == {"verification.json"}
    assert json.loads((tmp_path / "work" / "verification.json").read_text()) == report


@pytest.mark.parametrize(
    ("until", "expected"),
    [
        ("verify", {"verification.json"}),
        ("fingerprint", {"fingerprint.json", "dataset_fingerprint.json", "dataset.json"}),
    ],
)
def test_steps_run_alone(ellipsoids: Path, tmp_path: Path, until: str, expected: set[str]) -> None:
    done = plan(ellipsoids, "-o", tmp_path / "work", "--until", until, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cases"] == 6
    files = {path.name for path in (tmp_path / "work").glob("*.json")}
    assert files == expected | {"verification.json"}
    assert not (tmp_path / "work" / "plans").exists()


def test_planner_memory_and_spacing_are_the_users(ellipsoids: Path, tmp_path: Path) -> None:
    done = plan(
        ellipsoids, "-o", tmp_path / "work", "--network", "resenc_unet", "--until", "plan",
        "--planner", "nnUNetPlannerResEncL", "--gpu-memory", "16", "--spacing", "1.5,1,1",
        "--plans-name", "mine",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "work" / "plans" / "resenc_unet.json").read_text())
    assert found["plans_name"] == "mine"
    assert found["experiment_planner_used"] == "nnUNetPlannerResEncL"
    assert sorted(found["configurations"]["3d_fullres"]["spacing"]) == [1.0, 1.0, 1.5]


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--until", "train", "verify, fingerprint, plan, preprocess"),
        ("--sampling", "all", "exact, compatible"),
        ("--spacing", "1,2", "three positive numbers"),
    ],
)
def test_choices_that_do_not_exist_are_refused(
    ellipsoids: Path, tmp_path: Path, option: str, value: str, words: str
) -> None:
    done = plan(ellipsoids, "-o", tmp_path / "work", option, value)
    assert done.returncode == 2
    assert words in done.stderr
    assert not (tmp_path / "work").exists()


def test_preprocess_goes_by_the_plan_that_is_there(ellipsoids: Path, tmp_path: Path) -> None:
    import medmamba
    from medmamba.pipeline.planning import preprocess

    work = tmp_path / "work"
    medmamba.plan(ellipsoids, work, network="plain_unet", until="plan")
    path = work / "plans" / "plain_unet.json"
    edited = json.loads(path.read_text())
    edited["configurations"]["coarse"] = {"inherits_from": "3d_fullres", "spacing": [3.0, 2.0, 2.0]}
    path.write_text(json.dumps(edited))
    before = path.read_bytes()
    stores = preprocess(ellipsoids, work, network="plain_unet", configurations=("coarse", "2d"))
    assert path.read_bytes() == before
    assert [store.name.rpartition("-")[0] for store in stores] == ["coarse", "2d"]
    assert all(len(list(store.glob("*_seg.b2nd"))) == 6 for store in stores)
    again = medmamba.plan(ellipsoids, work, network="plain_unet", until="plan")
    assert again.plan is not None
    assert "coarse" in again.plan.configurations
