"""Walkthroughs run as they are written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from dicom_phantom import make_series, save
from nnunet_results import write_results

pytestmark = pytest.mark.slow  # .ci/run names this file

WALKTHROUGHS = Path(__file__).resolve().parents[2] / "cli" / "walkthroughs"


def walk(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", WALKTHROUGHS / f"{name}.sh", *map(str, arguments)],
        capture_output=True, text=True, timeout=600, env={**os.environ, "PATH": path}, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result


def masks(folder: Path) -> dict[str, int]:
    """When each mask was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.nii.gz")}


@pytest.fixture(scope="module")
def raw(tmp_path_factory, write_raw_ellipsoids):
    return write_raw_ellipsoids(tmp_path_factory.mktemp("raw") / "Dataset901_Ellipsoids")


@pytest.fixture(scope="module")
def imported(tmp_path_factory, raw):
    """What the walkthrough of nnU-Net's models leaves and says, for a tiny one of two folds."""
    folder = tmp_path_factory.mktemp("imported")
    results = write_results(folder / "nnUNet_results", (0, 1))
    return folder, walk("import_nnunet", results, raw / "imagesTs", folder)


def test_quickstart(raw, tmp_path):
    result = walk("quickstart", raw, tmp_path, "5s")
    assert "mean foreground Dice" in result.stdout
    assert len(masks(tmp_path / "masks")) == 2


def test_import_nnunet(imported):
    folder, result = imported
    assert "within 0 standard deviations" in result.stdout
    assert len(masks(folder / "masks")) == 2


def test_overnight(imported, raw, tmp_path):
    model, images = imported[0] / "model", tmp_path / "images"
    images.mkdir()
    good, bad = sorted((raw / "imagesTs").iterdir())
    (images / good.name).write_bytes(good.read_bytes())
    (images / bad.name).write_bytes(bad.read_bytes()[:2000])
    first = walk("overnight", images, tmp_path, model)
    assert "some cases have none" in first.stdout
    made = masks(tmp_path / "masks")
    assert list(made) == [good.name.replace("_0000", "")]

    (images / bad.name).write_bytes(bad.read_bytes())
    second = walk("overnight", images, tmp_path, model)
    assert "every case has a mask" in second.stdout
    now = masks(tmp_path / "masks")
    assert len(now) == 2
    assert made.items() <= now.items()


def test_clinic(imported, tmp_path):
    studies = tmp_path / "studies"
    for name in ("a", "b"):
        save(make_series(), studies / name)
    save(make_series()[::2], studies / "every_other")
    next((studies / "b").iterdir()).unlink()
    result = walk("clinic", studies, tmp_path / "out", imported[0] / "model")
    assert set(masks(tmp_path / "out" / "masks")) == {"a.nii.gz", "every_other.nii.gz"}
    assert result.stdout.count("to the archive: ") == 2
    assert (tmp_path / "out" / "masks" / "report.html").is_file()
    assert "medmamba_cases" in (tmp_path / "out" / "medmamba.prom").read_text()


def test_compare(raw, tmp_path):
    result = walk("compare", raw, tmp_path, "2s", "0")
    assert "lightm_unet_s:identity against lightm_unet_s: " in result.stdout
    assert "lightm_unet_s:dwconv against lightm_unet_s: " in result.stdout
    assert "supports no claim; use at least 3" in result.stdout
    assert (tmp_path / "comparison" / "report.html").is_file()


def test_every_walkthrough_is_run():
    names = {path.stem for path in WALKTHROUGHS.glob("*.sh")}
    assert names
    assert not {name for name in names if f"test_{name}" not in globals()}
