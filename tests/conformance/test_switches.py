"""The switches of ``medmamba predict`` as an operator uses them."""

import json
import subprocess
import sys

import pytest

from .conftest import predict
from .phantom import AFFINE, nifti, packed, voxels


def tilted() -> bytes:
    affine = AFFINE.copy()
    affine[0, 2] = 0.6
    return packed(nifti(affine=affine, codes=(1, 0)))


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    model, images, medmamba, tmp_path
) -> None:
    out = tmp_path / "out"
    (images / "bad_0000.nii.gz").write_bytes(b"")

    def plan(*options: object) -> tuple[int, dict]:
        arguments = ("predict", "-i", images, "-o", out, "-m", model, "--dry-run", "--json")
        code, text, _ = medmamba(*arguments, *options)
        return code, {item["case_id"]: item for item in json.loads(text)["cases"]}

    code, cases = plan()
    assert code == 4
    assert {name: case["decision"] for name, case in cases.items()} == {
        "bad": "reject", "case0": "predict", "case1": "predict",
    }  # fmt: skip
    assert cases["bad"]["reason"].startswith("E_IO_EMPTY")
    assert cases["case0"]["output"] == "case0.nii.gz"
    assert cases["case0"]["shape"] == [16, 24, 20]
    assert cases["case0"]["memory_bytes"] >= 16 * 24 * 20 * 8
    assert not out.exists()

    (images / "bad_0000.nii.gz").unlink()
    assert predict(medmamba, images, out, model)[0] == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (images / "case1_0000.nii.gz").write_bytes(packed(nifti(voxels(9))))
    code, cases = plan()
    assert code == 0
    assert {name: case["decision"] for name, case in cases.items()} == {
        "case0": "keep", "case1": "predict",
    }  # fmt: skip
    assert "input has changed" in cases["case1"]["reason"]
    assert plan("--overwrite", "always")[1]["case0"]["decision"] == "predict"
    assert plan("--max-ram", "1K", "--overwrite", "always")[1]["case0"]["decision"] == "reject"
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_dry_run_needs_no_torch(model, images, tmp_path) -> None:
    program = (
        "import sys; from pathlib import Path; from medmamba.pipeline.dry_run import dry_run; "
        f"dry_run({str(images)!r}, 'nowhere', {str(model)!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_events_tell_of_a_run_line_by_line(model, images, medmamba, tmp_path) -> None:
    events = tmp_path / "events.jsonl"
    (images / "bad_0000.nii.gz").write_bytes(b"")
    for number, options in ((1, []), (2, ["--in-process"])):
        code, _, _ = medmamba("predict", "-i", images, "-o", tmp_path / "out", "-m", model,
                              "--events", events, *options)  # fmt: skip
        assert code == 4
        lines = [json.loads(line) for line in events.read_text().splitlines()]
        names = [line["event"] for line in lines]
        assert names.count("ended") == number, "a file is appended to"
    assert names[0] == "started"
    # A worker process and this one write the same bytes.
    assert predict(medmamba, images, tmp_path / "here", model)[0] == 4
    for name in ("case0.nii.gz", "case1.nii.gz"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert {"begun", "progress", "ok", "rejected", "skipped", "ended"} <= set(names)
    ended = [line for line in lines if line["event"] == "ok"]
    assert {line["case"] for line in ended} == {"case0", "case1"}
    assert all(line["output"] for line in ended)

    code, text, _ = medmamba("predict", "-i", images, "-o", tmp_path / "other", "-m", model,
                             "--events", "-", "--in-process")  # fmt: skip
    assert code == 4
    assert json.loads(text.splitlines()[-1])["event"] == "ended"
    code, _, error = medmamba("predict", "-i", images, "-o", tmp_path / "out", "-m", model,
                              "--events", "-", "--json")  # fmt: skip
    assert code == 2
    assert "--events" in error


@pytest.mark.parametrize(
    ("content", "options", "lenient", "code"),
    [
        (tilted(), ["--strict"], "ok_with_warnings", "E_GEOM_SHEAR"),
        (packed(nifti(codes=(0, 0))), ["--assume-identity"], "rejected", ""),
        (packed(nifti()), ["--max-voxels", "1000"], "ok", "E_LIMIT_VOXELS"),
        (packed(nifti()), ["--max-ram", "10K"], "ok", "E_LIMIT_RAM"),
    ],
    ids=["strict", "assume-identity", "max-voxels", "max-ram"],
)
def test_the_gate_can_be_made_stricter_or_laxer(
    model, images, medmamba, tmp_path, content, options, lenient, code
) -> None:
    for path in images.iterdir():
        path.unlink()
    (images / "case_0000.nii.gz").write_bytes(content)
    _, records = predict(medmamba, images, tmp_path / "plain", model)
    assert records["case"]["status"] == lenient
    _, records = predict(medmamba, images, tmp_path / "out", model, "--in-process", *options)
    if code:
        assert records["case"]["error"]["code"] == code
    else:
        assert records["case"]["status"] == "ok_with_warnings"
    if "--max-ram" not in options:
        arguments = ["check", images, "-m", model, "--json", *options]
        judged = json.loads(medmamba(*arguments)[1])["cases"][0]
        assert judged["accepted"] is not bool(code)


def test_a_size_nobody_can_read_is_a_usage_error(model, images, medmamba, tmp_path) -> None:
    code, _, error = medmamba("predict", "-i", images, "-o", tmp_path / "out", "-m", model,
                              "--max-ram", "much")  # fmt: skip
    assert code == 2
    assert "much" in error


def test_a_full_disk_behind_standard_error_stops_nothing(model, images, tmp_path) -> None:
    command = [sys.executable, "-m", "medmamba", "predict", "-i", images, "-o", tmp_path / "out",
               "-m", model]  # fmt: skip
    with open("/dev/full", "w") as full:  # noqa: PTH123 a device
        done = subprocess.run(
            list(map(str, command)), stderr=full, stdout=subprocess.PIPE, check=False
        )
    assert done.returncode == 0
    assert b"2 of 2" in done.stdout
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2
