"""Rows that need more than a file in a folder (A13, A18, C14, D7)."""

import gzip
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medmamba.bundle import save_bundle
from medmamba.inference import casework
from medmamba.networks import build_network
from medmamba.preprocessing.recipe import ChannelRecipe, Normalization

from ..test_bundle import CONFIGURATION, tiny_plan
from .conftest import predict
from .phantom import AFFINE, nifti, packed, voxels

GIB = 2**30


def write(folder: Path, name: str, channel: int, affine: np.ndarray = AFFINE) -> None:
    data = packed(nifti(voxels(channel), affine))
    (folder / f"{name}_{channel:04d}.nii.gz").write_bytes(data)


@pytest.fixture(scope="module")
def two_channel_model(tmp_path_factory) -> Path:
    plan = tiny_plan()
    branch = plan.configurations[CONFIGURATION]
    recipe = ChannelRecipe(normalization=Normalization.ZSCORE)
    branch = replace(
        branch,
        network=replace(branch.network, in_channels=2),
        preprocessing=replace(branch.preprocessing, channels=(recipe, recipe)),
    )
    plan = replace(plan, configurations={CONFIGURATION: branch}, channel_names=("T1", "T2"))
    folder = tmp_path_factory.mktemp("two") / "model"
    torch.manual_seed(0)
    state = build_network(branch.network).state_dict()
    save_bundle(folder, plan=plan, configuration=CONFIGURATION, weights=[state], precision="fp32")
    return folder


def test_channels_on_different_grids_are_rejected(two_channel_model, medmamba, tmp_path) -> None:
    """C14: moved, of another spacing, of another shape; a rounding error of the header is none."""
    images = tmp_path / "images"
    images.mkdir()
    others = {name: AFFINE.copy() for name in ("00good", "moved", "scaled", "near", "zzgood")}
    others["moved"][:3, 3] += 1.0
    others["scaled"][2, 2] *= 1.01
    others["near"][:3, 3] += 1e-5
    for name, affine in others.items():
        write(images, name, 0)
        write(images, name, 1, affine)
    write(images, "shape", 0)
    (images / "shape_0001.nii.gz").write_bytes(packed(nifti(voxels()[:, :, :15])))
    code, records = predict(medmamba, images, tmp_path / "out", two_channel_model)
    assert code == 4
    found = {name: (record["error"] or {}).get("code") for name, record in records.items()}
    refused = ("moved", "scaled", "shape")
    assert found == {name: "E_CHAN_GRID" if name in refused else None for name in found}
    masks = {path.name.split(".")[0] for path in (tmp_path / "out").glob("*.nii.gz")}
    assert masks == {"00good", "zzgood", "near"}


@pytest.mark.parametrize("how", ["replaced", "deleted"])
def test_a_file_that_changes_between_hash_and_reading_is_rejected(
    how, model, images, medmamba, tmp_path, monkeypatch
) -> None:
    """A18: or the record would speak of another file than the mask was made from."""
    identify = casework.identify

    def then_change(paths):
        found = identify(paths)
        if paths[0].name.startswith("case0"):
            paths[0].unlink()
            if how == "replaced":
                paths[0].write_bytes(packed(nifti(voxels(9))))
        return found

    monkeypatch.setattr(casework, "identify", then_change)
    code, records = predict(medmamba, images, tmp_path / "out", model)
    assert code == 4
    expected = {"replaced": "E_IO_CHANGED", "deleted": "E_IO_MISSING"}[how]
    assert records["case0"]["error"]["code"] == expected
    assert not (tmp_path / "out" / "case0.nii.gz").exists()
    assert records["case1"]["status"] == "ok"


@pytest.mark.slow
def test_a_gigabyte_in_a_megabyte_is_judged_by_its_header(model, images, tmp_path) -> None:
    """A13: refused before it is unpacked, or constant as it is once that much is allowed."""
    shape = (1024, 1024, 1024)
    header = nifti(np.zeros((2, 2, 2), np.uint8), dim1=shape[0])[:352]
    array = bytearray(header)
    array[42:48] = np.array(shape, "<i2").tobytes()
    bomb = images / "bomb_0000.nii.gz"
    with gzip.open(bomb, "wb", 9) as packing:
        packing.write(bytes(array))
        for _ in range(64):
            packing.write(bytes(GIB // 64))
    assert bomb.stat().st_size < 2 * 2**20
    for limits, code in (
        (["--max-voxels", str(GIB - 1)], "E_LIMIT_VOXELS"),
        (["--max-ram", "4G"], "E_LIMIT_RAM"),
    ):
        begun = time.monotonic()
        records, peak = run_apart(images, tmp_path / code, model, *limits)
        assert records["bomb"]["error"]["code"] == code
        assert records["case1"]["status"] == "ok"
        assert not (tmp_path / code / "bomb.nii.gz").exists()
        assert peak < GIB
        assert time.monotonic() - begun < 60


def run_apart(images: Path, output: Path, model: Path, *options: str) -> tuple[dict, int]:
    """Records of a run in a process of its own, and the largest memory of any so far."""
    command = [sys.executable, "-m", "medmamba", "predict", "-i", str(images), "-o", str(output)]
    command += ["-m", str(model), "--json", "--no-report", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {item["case_id"]: item for item in json.loads(done.stdout)["cases"]}, peak


@pytest.mark.slow
def test_a_hundred_thousand_files_are_listed_in_time(model, images, tmp_path) -> None:
    """D7: listed in ten seconds of processor time, with ten kilobytes a file at most."""
    begin = ["-c", f"""
import resource, time
from pathlib import Path
from medmamba.dataset.inputs import find_cases
begun = time.process_time()
listing = find_cases(Path({str(images)!r}), channels=1, file_ending=".nii.gz")
print(len(listing.cases), time.process_time() - begun,
      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""]  # fmt: skip
    for number in range(100_000):
        (images / f"many{number:06d}_0000.nii.gz").touch()
    done = subprocess.run([sys.executable, *begin], capture_output=True, text=True, check=True)
    count, seconds, mib = done.stdout.split()
    assert int(count) == 100_002
    assert float(seconds) < 10
    assert int(mib) < 1000
    command = [sys.executable, "-m", "medmamba", "predict", "-i", str(images), "-m", str(model)]
    command += ["-o", str(tmp_path / "out"), "--max-failures", "1", "--no-report"]
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr[-2000:]
    assert time.monotonic() - begun < 120
    for name in ("case0", "case1"):
        assert (tmp_path / "out" / f"{name}.nii.gz").is_file()
