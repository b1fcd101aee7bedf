import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from fakes import MODEL, FakeLogits, ThresholdPredictor, image, predict_cases, tree

from medmamba.dataset import Case, Rejection
from medmamba.errors import EnvironmentFault, MedMambaError, UsageError
from medmamba.inference.job import Segmented
from medmamba.inference.records import ModelIdentity, read_record
from medmamba.preprocessing.pipeline import PreprocessedCase
from medmamba.volume import Volume


def test_masks_lie_on_the_grid_and_records_say_what_happened(tmp_path: Path) -> None:
    cases = [image(tmp_path / "in", name, seed=i) for i, name in enumerate("abc")]
    seen: list[tuple[str, int, int, float]] = []
    run = predict_cases(
        cases,
        tmp_path / "out",
        ThresholdPredictor(),
        model=MODEL,
        on_case=lambda record, *rest: seen.append((record.case_id, *rest)),
    )
    assert (run.exit_code, run.succeeded, run.total) == (0, 3, 3)
    assert [entry[:3] for entry in seen] == [("a", 1, 3), ("b", 2, 3), ("c", 3, 3)]
    assert seen[-1][3] == 0
    for case in cases:
        source, mask = nib.load(case.images[0]), nib.load(tmp_path / "out" / f"{case.id}.nii.gz")
        voxels = np.asarray(source.dataobj)
        np.testing.assert_array_equal(mask.affine, source.affine)
        np.testing.assert_array_equal(
            np.asarray(mask.dataobj), (voxels > 50).astype(int) + (voxels > 100)
        )
        record = read_record(tmp_path / "out" / f"{case.id}.json")
        assert record is not None
        assert record.status == "ok"
        assert record.inputs[0].sha256 == hashlib.sha256(case.images[0].read_bytes()).hexdigest()
        mask_bytes = (tmp_path / "out" / f"{case.id}.nii.gz").read_bytes()
        assert record.output is not None
        assert record.output.sha256 == hashlib.sha256(mask_bytes).hexdigest()
        assert record.model == MODEL
        assert record.numerics == {"device": "none"}
        assert record.labels[1].voxels == (voxels > 100).sum()
        assert record.labels[1].volume_ml == pytest.approx((voxels > 100).sum() * 6e-3)
        assert {"read", "preprocess", "infer", "restore", "write"} <= record.timings_s.keys()
        assert record.geometry is not None
        assert record.geometry.shape == (4, 5, 6)


def test_a_bad_case_between_good_ones_costs_nothing(tmp_path: Path) -> None:
    cases = [image(tmp_path / "in", name, seed=i) for i, name in enumerate("abc")]
    predict_cases(cases, tmp_path / "whole", ThresholdPredictor(), model=MODEL)
    damaged = cases[1].images[0]
    damaged.write_bytes(damaged.read_bytes()[:-30])
    run = predict_cases(cases, tmp_path / "out", ThresholdPredictor(), model=MODEL)
    assert run.exit_code == 4
    assert [record.status for record in run.records] == ["ok", "rejected", "ok"]
    error = run.records[1].error
    assert error is not None
    assert (error.stage, error.code[:5]) == ("read", "E_IO_")
    assert str(tmp_path) not in error.message
    assert not (tmp_path / "out" / "b.nii.gz").exists()
    whole, partial = tree(tmp_path / "whole"), tree(tmp_path / "out")
    del whole["b.nii.gz"], whole["b.json"], partial["b.json"]
    assert whole == partial


@pytest.mark.parametrize(
    ("problem", "status", "code"),
    [
        (
            MedMambaError("logits are not finite", code="E_NUM_NONFINITE"),
            "failed",
            "E_NUM_NONFINITE",
        ),
        (EnvironmentFault("no memory", code="E_MEM_GPU"), "failed", "E_MEM_GPU"),
        (ZeroDivisionError("a bug"), "failed", "E_INTERNAL"),
    ],
)
def test_failures_inside_a_case_are_recorded(
    tmp_path: Path, problem: Exception, status: str, code: str
) -> None:
    def fail(mark: float, _: Any) -> None:
        if mark == 1:
            raise problem

    cases = [image(tmp_path / "in", name, mark=i, seed=i) for i, name in enumerate("abc")]
    run = predict_cases(cases, tmp_path / "out", ThresholdPredictor(on_infer=fail), model=MODEL)
    assert [record.status for record in run.records] == ["ok", status, "ok"]
    record = read_record(tmp_path / "out" / "b.json")
    assert record is not None
    assert record.error is not None
    assert (record.error.code, record.error.stage) == (code, "infer")
    assert run.exit_code == 4


def test_host_memory_running_out_is_tried_once_more_alone(tmp_path: Path) -> None:
    tries: list[float] = []

    def hungry(mark: float, _: Any) -> None:
        tries.append(mark)
        if mark == 2 or (mark == 1 and tries.count(1) == 1):
            raise MemoryError

    cases = [image(tmp_path / "in", name, mark=i, seed=i) for i, name in enumerate("abc")]
    run = predict_cases(cases, tmp_path / "out", ThresholdPredictor(on_infer=hungry), model=MODEL)
    assert {record.case_id: record.status for record in run.records} == {
        "a": "ok",
        "b": "ok",
        "c": "failed",
    }
    assert tries == [0, 1, 2, 1, 2]
    assert len(run.records) == 3


def test_nothing_is_done_twice_and_everything_stale_is_redone(tmp_path: Path) -> None:
    cases = [image(tmp_path / "in", name, mark=i, seed=i) for i, name in enumerate("abcd")]
    out = tmp_path / "out"
    predict_cases(cases, out, ThresholdPredictor(), model=MODEL)
    undisturbed = tree(out)

    idle = ThresholdPredictor()
    again = predict_cases(cases, out, idle, model=MODEL)
    assert idle.inferred == []
    assert again.exit_code == 0
    assert {record.status for record in again.records} == {"skipped"}
    assert tree(out) == undisturbed

    (out / "a.nii.gz").write_bytes(b"edited")
    (out / "b.json").unlink()
    (out / "c.nii.gz").unlink()
    busy = ThresholdPredictor()
    redone = predict_cases(cases, out, busy, model=MODEL)
    assert busy.inferred == [0, 1, 2]
    assert tree(out) == undisturbed
    aside = out / "run" / redone.run_id / "superseded"
    assert (aside / "a.nii.gz").read_bytes() == b"edited"
    assert {path.name for path in aside.iterdir()} == {"a.nii.gz", "b.nii.gz"}


@pytest.mark.parametrize(
    ("overwrite", "changed", "expected"),
    [
        ("stale", {}, 0),
        ("stale", {"level": 60.0}, 2),
        ("never", {"level": 60.0}, 0),
        ("always", {}, 2),
    ],
)
def test_overwrite_decides_by_content(
    tmp_path: Path, overwrite: Any, changed: dict[str, float], expected: int
) -> None:
    cases = [image(tmp_path / "in", name, seed=i) for i, name in enumerate("ab")]
    predict_cases(cases, tmp_path / "out", ThresholdPredictor(), model=MODEL)
    predictor = ThresholdPredictor(**changed)
    predict_cases(cases, tmp_path / "out", predictor, model=MODEL, overwrite=overwrite)
    assert len(predictor.inferred) == expected


def test_another_model_or_input_makes_a_mask_stale(tmp_path: Path) -> None:
    cases = [image(tmp_path / "in", "a")]
    predict_cases(cases, tmp_path / "out", ThresholdPredictor(), model=MODEL)
    other = ThresholdPredictor()
    predict_cases(
        cases, tmp_path / "out", other, model=ModelIdentity(name="threshold", sha256="1" * 64)
    )
    assert len(other.inferred) == 1
    image(tmp_path / "in", "a", seed=9)
    newer = ThresholdPredictor()
    predict_cases(
        cases, tmp_path / "out", newer, model=ModelIdentity(name="threshold", sha256="1" * 64)
    )
    assert len(newer.inferred) == 1


def test_a_case_that_became_bad_keeps_no_old_mask(tmp_path: Path) -> None:
    cases = [image(tmp_path / "in", "a")]
    out = tmp_path / "out"
    predict_cases(cases, out, ThresholdPredictor(), model=MODEL)
    cases[0].images[0].write_bytes(b"rubbish")
    run = predict_cases(cases, out, ThresholdPredictor(), model=MODEL)
    assert run.exit_code == 5
    assert not (out / "a.nii.gz").exists()
    assert (out / "run" / run.run_id / "superseded" / "a.nii.gz").exists()


def test_the_exit_code_follows_fail_on(tmp_path: Path) -> None:
    cases = [image(tmp_path / "in", name, seed=i) for i, name in enumerate("ab")]
    cases[0].images[0].write_bytes(b"rubbish")

    def code(chosen: list[Case], fail_on: Any) -> int:
        folder = tmp_path / f"{len(chosen)}{fail_on}"
        return predict_cases(
            chosen, folder, ThresholdPredictor(), model=MODEL, fail_on=fail_on
        ).exit_code

    assert [code(cases, when) for when in ("any", "all", "never")] == [4, 0, 0]
    assert [code(cases[:1], when) for when in ("any", "all", "never")] == [5, 5, 0]


def test_listed_rejections_are_recorded_under_safe_names(tmp_path: Path) -> None:
    cases = [image(tmp_path / "in", "a")]
    bad = Rejection(id="../../=etc/x", code="E_PATH_UNSAFE", message="unsafe name")
    run = predict_cases(cases, tmp_path / "out", ThresholdPredictor(), model=MODEL, rejected=[bad])
    assert run.exit_code == 4
    ok, rejected = run.records
    assert (ok.status, rejected.status) == ("ok", "rejected")
    assert (tmp_path / "out" / f"{rejected.case_id}.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_max_failures_stops_early(tmp_path: Path) -> None:
    cases = [image(tmp_path / "in", name, seed=i) for i, name in enumerate("abcdef")]
    for case in cases:
        case.images[0].write_bytes(b"rubbish")
    run = predict_cases(cases, tmp_path / "out", ThresholdPredictor(), model=MODEL, max_failures=2)
    assert 2 <= len(run.records) < 5


def test_long_cases_can_be_watched(tmp_path: Path) -> None:
    def in_two_steps(mark: float, on_tiles: Any) -> None:
        on_tiles(1, 2)
        on_tiles(2, 2)

    seen: list[tuple[str, int, int]] = []
    predict_cases(
        [image(tmp_path / "in", "a")],
        tmp_path / "out",
        ThresholdPredictor(on_infer=in_two_steps),
        model=MODEL,
        on_tiles=lambda *now: seen.append(now),
    )
    assert seen == [("a", 1, 2), ("a", 2, 2)]


def test_the_run_folder_tells_the_story(tmp_path: Path) -> None:
    cases = [image(tmp_path / "in", name, seed=i) for i, name in enumerate(["a", "-b"])]
    cases[1].images[0].write_bytes(b"rubbish")
    run = predict_cases(cases, tmp_path / "out", ThresholdPredictor(), model=MODEL)
    folder = tmp_path / "out" / "run" / run.run_id
    lines = (folder / "journal-0.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    names = [event["event"] for event in events]
    assert (names[0], sorted(names[1:-1]), names[-1]) == ("started", ["ok", "rejected"], "ended")
    for before, event in zip(lines, events[1:], strict=False):
        assert event["previous"] == hashlib.sha256(before.encode()).hexdigest()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["counts"] == {"ok": 1, "rejected": 1}
    assert manifest["journal_sha256"] == hashlib.sha256(lines[-1].encode()).hexdigest()
    rows = list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))
    assert [row["label"] for row in rows] == ["", "bright", "very bright"]
    assert rows[0]["case"] == "'-b"
    assert sorted(path.name for path in folder.iterdir()) == [
        "journal-0.jsonl",
        "manifest.json",
        "summary.csv",
    ]


def test_left_over_temporary_files_are_swept(tmp_path: Path) -> None:
    cases = [image(tmp_path / "in", "a")]
    out = tmp_path / "out"
    out.mkdir()
    (out / ".mm-tmp-123-a.nii.gz").write_bytes(b"half")
    live = out / "run" / "other" / "running"
    live.parent.mkdir(parents=True)
    live.write_text(f"{os.uname().nodename} {os.getpid()}")
    predict_cases(cases, out, ThresholdPredictor(), model=MODEL)
    assert (out / ".mm-tmp-123-a.nii.gz").exists(), "another run may be writing it"
    finished = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                              capture_output=True, text=True, check=True)  # fmt: skip
    live.write_text(f"{os.uname().nodename} {finished.stdout.strip()}")
    predict_cases(cases, out, ThresholdPredictor(), model=MODEL)
    assert not (out / ".mm-tmp-123-a.nii.gz").exists()


@pytest.mark.parametrize("place", ["in", "."])
def test_masks_never_go_among_the_inputs(tmp_path: Path, place: str) -> None:
    cases = [image(tmp_path / "in", "a")]
    with pytest.raises(UsageError, match="input images"):
        predict_cases(cases, tmp_path / place, ThresholdPredictor(), model=MODEL)


def test_a_folder_that_cannot_be_written_is_an_environment_fault(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(EnvironmentFault):
        predict_cases(
            [image(tmp_path / "in", "a")], tmp_path / "out", ThresholdPredictor(), model=MODEL
        )


def test_reading_ahead_never_exceeds_one_case(tmp_path: Path) -> None:
    alive: list[int] = []
    state = {"now": 0}
    lock = threading.Lock()

    class Counting(ThresholdPredictor):
        def prepare(self, volume: Volume) -> PreprocessedCase:
            with lock:
                state["now"] += 1
                alive.append(state["now"])
            return super().prepare(volume)

        def restore(self, inferred: FakeLogits) -> Segmented:
            with lock:
                state["now"] -= 1
            return super().restore(inferred)

    cases = [image(tmp_path / "in", f"c{i}", seed=i) for i in range(8)]
    predict_cases(cases, tmp_path / "out", Counting(), model=MODEL)
    assert max(alive) <= 3  # one read ahead, one in the network, one being written
    alive.clear()
    predict_cases(cases, tmp_path / "other", Counting(), model=MODEL, prefetch_bytes=0)
    assert max(alive) <= 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_a_second_run_completes(tmp_path: Path, number: signal.Signals) -> None:
    def interrupt(mark: float, on_tiles: Any) -> None:
        on_tiles(1, 1000)
        if mark == 1:
            os.kill(os.getpid(), number)
            on_tiles(1000, 1000)

    cases = [image(tmp_path / "in", name, mark=i, seed=i) for i, name in enumerate("abcd")]
    out = tmp_path / "out"
    before = signal.getsignal(number)
    run = predict_cases(cases, out, ThresholdPredictor(on_infer=interrupt), model=MODEL)
    assert signal.getsignal(number) is before
    assert run.exit_code == 128 + number
    assert [record.case_id for record in run.records] == ["a", "b"]
    assert not (out / "c.json").exists()
    second = predict_cases(cases, out, ThresholdPredictor(), model=MODEL)
    assert [record.status for record in second.records] == ["skipped", "skipped", "ok", "ok"]


def test_a_case_that_would_outlast_the_grace_period_is_abandoned(tmp_path: Path) -> None:
    def interrupt(mark: float, on_tiles: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        on_tiles(1, 10**9)

    cases = [image(tmp_path / "in", "a")]
    run = predict_cases(
        cases, tmp_path / "out", ThresholdPredictor(on_infer=interrupt), model=MODEL, grace_s=0.0
    )
    assert run.exit_code == 143
    assert run.records == ()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run"]


def test_a_mask_that_cannot_be_written_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medmamba.inference import casework

    real = casework.write_labels

    def full(path: Path, *rest: Any, **options: Any) -> None:
        if path.name.startswith("b"):
            raise EnvironmentFault("disk full", code="E_IO_WRITE")
        real(path, *rest, **options)

    monkeypatch.setattr(casework, "write_labels", full)
    cases = [image(tmp_path / "in", name, seed=i) for i, name in enumerate("abc")]
    run = predict_cases(cases, tmp_path / "out", ThresholdPredictor(), model=MODEL)
    assert [record.status for record in run.records] == ["ok", "failed", "ok"]
    assert run.records[1].error is not None
    assert run.records[1].error.code == "E_IO_WRITE"


def test_a_record_that_cannot_be_written_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medmamba.inference import ledger

    def full(path: Path, content: str) -> None:
        raise EnvironmentFault("disk full", code="E_IO_WRITE")

    monkeypatch.setattr(ledger, "write_atomic", full)
    cases = [image(tmp_path / "in", name, seed=i) for i, name in enumerate("abc")]
    with pytest.raises(EnvironmentFault, match="disk full"):
        predict_cases(cases, tmp_path / "out", ThresholdPredictor(), model=MODEL)
    assert not list((tmp_path / "out").glob("*.json"))
    assert not list((tmp_path / "out").glob("run/*/running"))


def test_pictures_are_answered_with_pictures(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "in").mkdir()
    grey = np.random.default_rng(0).integers(1, 200, (9, 7)).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "in" / "photo.png")
    cases = [Case(id="photo", images=(tmp_path / "in" / "photo.png",))]
    run = predict_cases(cases, tmp_path / "out", ThresholdPredictor(), model=MODEL)
    assert run.exit_code == 0
    with Image.open(tmp_path / "out" / "photo.png") as mask:
        np.testing.assert_array_equal(np.asarray(mask), (grey > 50).astype(int) + (grey > 100))


def test_a_stream_is_read_one_case_ahead_and_may_pause(tmp_path: Path) -> None:
    cases = [image(tmp_path / "in", name, seed=i) for i, name in enumerate("abc")]
    out = tmp_path / "out"
    missing_at_pause: list[bool] = []

    def stream():
        yield cases[0]
        yield Rejection(id="x", code="E_PATH_ESCAPE", message="leaves the folder")
        yield cases[1]
        yield None  # nothing at the moment: the network goes on
        # Asked again, whoever gives the cases knows that those before are done.
        missing_at_pause.extend(not (out / f"{name}.json").exists() for name in "axb")
        yield None
        yield cases[2]

    seen = []
    run = predict_cases(
        stream(), out, ThresholdPredictor(), model=MODEL,
        on_case=lambda record, done, total, left: seen.append((record.case_id, done, total)),
    )  # fmt: skip
    assert missing_at_pause == [False, False, False]
    assert run.counts == {"ok": 3, "rejected": 1}
    assert [record.case_id for record in run.records] == ["a", "b", "c", "x"]
    assert [entry[1:] for entry in seen] == [(1, 1), (2, 2), (3, 3), (4, 4)]
