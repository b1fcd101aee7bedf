"""Runs that start in one output folder at the same moment do not disturb each other."""

import multiprocessing
from pathlib import Path

import pytest
from fakes import MODEL, ThresholdPredictor, image, predict_cases, tree

from medmamba.dataset import Case
from medmamba.errors import UsageError
from medmamba.files import require_writable_folder
from medmamba.inference.journal import sweep_temporary_files
from medmamba.inference.records import ModelIdentity
from medmamba.inference.verification import verify_output
from medmamba.pipeline.evaluating import evaluate


def test_a_folder_is_proved_writable_while_another_run_sweeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def write_and_be_swept(path: Path, content: bytes) -> int:
        written = write(path, content)
        assert sweep_temporary_files(path.parent) == 1
        return written

    monkeypatch.setattr(Path, "write_bytes", write_and_be_swept)
    assert require_writable_folder(tmp_path / "out") == tmp_path / "out"
    assert not list((tmp_path / "out").iterdir())


def predict_again_and_again(cases: list[Case], folder: Path, sha256: str) -> None:
    model = ModelIdentity(name="m", sha256=sha256)
    for _ in range(4):
        run = predict_cases(cases, folder, ThresholdPredictor(), model=model, overwrite="always")
        assert run.exit_code == 0, [record.error for record in run.records]


@pytest.mark.parametrize("models", [("0" * 64, "0" * 64), ("0" * 64, "1" * 64)])
def test_runs_at_once_on_the_same_cases_all_succeed(
    tmp_path: Path, models: tuple[str, str]
) -> None:
    cases = [image(tmp_path / "in", name, mark=i, seed=i) for i, name in enumerate("abcd")]
    fork = multiprocessing.get_context("fork")
    both = [
        fork.Process(target=predict_again_and_again, args=(cases, tmp_path / "out", model))
        for model in models
    ]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert all(state.sound for state in verify_output(tmp_path / "out"))
    assert not list((tmp_path / "out").rglob(".mm-tmp-*"))
    if models[0] == models[1]:
        predict_cases(cases, tmp_path / "alone", ThresholdPredictor(), model=MODEL)
        masks = [{name: mask for name, mask in tree(tmp_path / place).items() if "nii" in name}
                 for place in ("out", "alone")]  # fmt: skip
        assert masks[0] == masks[1]


def test_scores_beside_the_masks_are_no_damaged_record(tmp_path: Path) -> None:
    out = tmp_path / "out"
    cases = [image(tmp_path / "in", name, mark=i, seed=i) for i, name in enumerate("ab")]
    assert predict_cases(cases, out, ThresholdPredictor(), model=MODEL).exit_code == 0
    evaluate(out, out)
    assert (out / "summary.json").is_file()
    assert [state.state for state in verify_output(out)] == ["holds", "holds"]
    (out / "b.json").write_text((out / "b.json").read_text()[:100])
    assert {(state.case_id, state.state) for state in verify_output(out) if not state.sound} == {
        ("b", "unreadable"), ("b", "unclaimed"),
    }  # fmt: skip


def test_scores_do_not_replace_the_record_of_a_case_of_that_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict_cases([image(tmp_path / "in", "summary")], out, ThresholdPredictor(), model=MODEL)
    with pytest.raises(UsageError, match="--output"):
        evaluate(out, out)
    evaluate(out, out, output=tmp_path / "scores")
    assert all(state.sound for state in verify_output(out))


def test_nothing_is_written_through_a_link_in_the_output(tmp_path: Path) -> None:
    cases = [image(tmp_path / "in", "a")]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mask").write_bytes(b"precious")
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.nii.gz").symlink_to(elsewhere / "mask")
    (out / "a.json").symlink_to(elsewhere / "record")
    assert predict_cases(cases, out, ThresholdPredictor(), model=MODEL).exit_code == 0
    assert not (out / "a.nii.gz").is_symlink()
    assert not (out / "a.json").is_symlink()
    assert [path.name for path in elsewhere.iterdir()] == ["mask"]
    assert (elsewhere / "mask").read_bytes() == b"precious"

    other = tmp_path / "other"
    other.mkdir()
    (other / "run").symlink_to(elsewhere)
    with pytest.raises(UsageError, match="symbolic link"):
        predict_cases(cases, other, ThresholdPredictor(), model=MODEL)
    assert [path.name for path in elsewhere.iterdir()] == ["mask"]
