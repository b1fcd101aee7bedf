"""Places, archives, machines and memory through the real command (rows C10, D4, F6, F8, G1, G15).

Memory of a GPU is a fake here: the network's passes say that it ran out.
"""

import gzip
import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medmamba.bundle import save_bundle
from medmamba.inference import sliding_window

from ..test_bundle import CONFIGURATION, tiny_plan, weights
from .conftest import predict
from .phantom import nifti, packed, voxels

LONG = 2000


def test_a_case_beyond_the_budget_is_refused_before_it_is_read(
    model, images, medmamba, tmp_path
) -> None:
    """C10: the header alone decides."""
    tall = np.zeros((256, 24, LONG), np.int16)
    (images / "tall_0000.nii.gz").write_bytes(gzip.compress(nifti(tall), 1))
    code, records = predict(
        medmamba, images, tmp_path / "out", model, "--in-process", "--max-ram", "90M"
    )
    assert code == 4
    assert records["tall"]["error"]["code"] == "E_LIMIT_RAM"
    assert "read" not in records["tall"]["timings_s"]
    assert [records[name]["status"] for name in ("case0", "case1")] == ["ok", "ok"]


@pytest.mark.slow
def test_two_thousand_slices_within_the_budget_are_predicted(
    model, images, medmamba, tmp_path
) -> None:
    """C10, just inside and just outside."""
    array = np.tile(voxels(), (1, 1, LONG // 16))
    (images / "long_0000.nii.gz").write_bytes(packed(nifti(array)))
    needed = array.size * 8
    for limit, status in ((needed - 1, "rejected"), (needed, "ok")):
        _, records = predict(
            medmamba, images, tmp_path / status, model, "--in-process", "--max-ram", str(limit)
        )
        assert records["long"]["status"] == status


def test_nothing_is_written_through_links_in_the_output(model, images, medmamba, tmp_path) -> None:
    """D4."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "mask").write_bytes(b"precious")
    out = tmp_path / "out"
    out.mkdir()
    (out / "case0.nii.gz").symlink_to(victim / "mask")
    (out / "case0.json").symlink_to(victim / "record")
    (out / "labels.ctbl").symlink_to(victim / "colours")
    code, _ = predict(medmamba, images, out, model, "--in-process", "--labels-for", "slicer")
    assert code == 0
    # What was in the way is kept aside as it was.
    assert not [path for path in out.iterdir() if path.is_symlink()]
    shutil.rmtree(out / "run")
    (out / "run").symlink_to(victim)
    code, _, error = medmamba("predict", "-i", images, "-o", out, "-m", model, "--in-process")
    assert code == 2, error
    assert [path.name for path in victim.iterdir()] == ["mask"]
    assert (victim / "mask").read_bytes() == b"precious"


def zipped(path: Path, *names: str, mode: int = 0o100644) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            entry = zipfile.ZipInfo(name)
            entry.external_attr = mode << 16
            archive.writestr(entry, b"x")


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", bytes(80 * 2**20))


def many(path: Path) -> None:
    zipped(path, *map(str, range(10_001)))


def tarred(path: Path, name: str, kind: bytes = tarfile.REGTYPE) -> None:
    with tarfile.open(path, "w:gz") as archive:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = kind, "/etc/passwd"
        archive.addfile(entry, io.BytesIO())


ARCHIVES = {
    "up": (lambda path: zipped(path, "manifest.json", "../escaped"), 7),
    "absolute": (lambda path: zipped(path, "/escaped"), 7),
    "backslash": (lambda path: zipped(path, "..\\escaped"), 7),
    "link": (lambda path: zipped(path, "weights", mode=0o120777), 7),
    "many": (many, 7),
    "bomb": (bomb, 7),
    "tar up": (lambda path: tarred(path, "../escaped"), 7),
    "tar link": (lambda path: tarred(path, "weights", tarfile.SYMTYPE), 7),
    "harmless": (lambda path: zipped(path, "manifest.json"), 3),
    "no archive": (lambda path: path.write_bytes(b"PK\x03\x04 and no more"), 3),
}


@pytest.mark.parametrize("which", ARCHIVES)
def test_an_archive_offered_as_a_model_is_never_unpacked(which, images, medmamba, tmp_path) -> None:
    """F6."""
    make, expected = ARCHIVES[which]
    place = tmp_path / "inner"
    place.mkdir()
    make(place / "model.mmb")
    code, _, error = medmamba(
        "predict", "-i", images, "-o", tmp_path / "out", "-m", place / "model.mmb", "--in-process"
    )
    assert code == expected, error
    assert not list(tmp_path.rglob("escaped"))
    assert [path.name for path in place.iterdir()] == ["model.mmb"]


def test_a_patch_that_no_memory_holds_ends_the_run_with_numbers(images, medmamba, tmp_path) -> None:
    """F8, before anything is predicted."""
    plan = tiny_plan()
    branch = plan.configurations[CONFIGURATION]
    huge = replace(branch.grid, patch_size=(2**13,) * 3)
    plan = replace(
        plan, configurations={**plan.configurations, CONFIGURATION: replace(branch, grid=huge)}
    )
    save_bundle(
        tmp_path / "huge", plan=plan, configuration=CONFIGURATION, weights=[weights(0)],
        precision="fp32", reference_case=False,
    )  # fmt: skip
    code, _, error = medmamba(
        "predict", "-i", images, "-o", tmp_path / "out", "-m", tmp_path / "huge", "--in-process"
    )
    assert code == 6, error
    assert "8192x8192x8192" in error
    assert "GiB" in error
    assert "E_MEM_HOST" in error


@pytest.mark.parametrize(("failures", "status"), [(1, "ok_with_warnings"), (2, "ok_with_warnings"),
                                                  (99, "failed")])  # fmt: skip
def test_memory_of_a_device_that_runs_out_is_borne(
    failures, status, model, images, medmamba, tmp_path, monkeypatch
) -> None:
    """F8, G1 and G2, the GPU being a fake: the first passes of the first case run out."""
    assert predict(medmamba, images, tmp_path / "reference", model)[0] == 0
    passes = []
    whole = sliding_window.PlaneStream._logits

    def hungry(self, origins):
        passes.append(1)
        if len(passes) <= failures:
            raise torch.OutOfMemoryError("a fake")
        return whole(self, origins)

    monkeypatch.setattr(sliding_window.PlaneStream, "_logits", hungry)
    _, records = predict(medmamba, images, tmp_path / "out", model)
    assert records["case0"]["status"] == status
    if status == "failed":
        assert records["case0"]["error"]["code"] == "E_MEM_GPU"
        assert "patch" in records["case0"]["error"]["message"]
        assert not (tmp_path / "out" / "case0.nii.gz").exists()
        return
    for name in ("case0.nii.gz", "case1.nii.gz"):
        mask = (tmp_path / "out" / name).read_bytes()
        assert mask == (tmp_path / "reference" / name).read_bytes()
    assert records["case0"]["fallbacks"]
    assert records["case1"]["status"] == "ok"


SANDBOX = ["bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp",
           "--unshare-all", "--uid", "12345", "--gid", "12345", "--clearenv",
           "--setenv", "HOME", "/", "--setenv", "PATH", "/nowhere", "--chdir", "/"]  # fmt: skip


def sandboxed(*arguments: object, shows: tuple[Path, ...], writes: Path) -> list[str]:
    """The program on a read-only root, as nobody in particular, with no network and no compiler."""
    seen = [part for path in shows for part in ("--ro-bind", str(path), str(path))]
    command = [sys.executable, "-m", "medmamba", *map(str, arguments)]
    return [*SANDBOX, *seen, "--bind", str(writes), str(writes), *command]


@pytest.fixture
def bubblewrap(tmp_path) -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("needs bubblewrap")
    trial = subprocess.run([*SANDBOX, sys.executable, "-c", ""], capture_output=True, check=False)
    if trial.returncode:
        pytest.skip("bubblewrap may not make namespaces here")


@pytest.mark.slow
@pytest.mark.usefixtures("bubblewrap")
def test_a_hardened_machine_is_enough(model, images, tmp_path) -> None:
    """G15 on a CPU."""
    out = tmp_path / "out"
    out.mkdir()
    arguments = ("predict", "-i", images, "-o", out, "-m", model, "--json")
    done = subprocess.run(
        sandboxed(*arguments, shows=(images, model), writes=out),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [case["status"] for case in json.loads(done.stdout)["cases"]] == ["ok", "ok"]


@pytest.mark.slow
@pytest.mark.usefixtures("bubblewrap")
def test_an_output_that_cannot_be_written_ends_the_run_at_once(model, images, tmp_path) -> None:
    """G9, where not even root may write."""
    out, other = tmp_path / "out", tmp_path / "other"
    for folder in (out, other):
        folder.mkdir()
    done = subprocess.run(
        sandboxed("predict", "-i", images, "-o", out, "-m", model, shows=(images, model, out),
                  writes=other),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 6, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(out.iterdir())
