"""How much memory a case takes may follow from its voxels only as far as it must."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medmamba.bundle import save_bundle
from medmamba.networks import build_network
from medmamba.preprocessing.recipe import ChannelRecipe, Normalization
from medmamba.volume import Grid

from ..test_bundle import STATISTICS, tiny_plan

LENGTHS = (200, 1400)
SLICE = (160, 160)
MOST_BYTES_A_VOXEL = 8.0


def write_model(folder: Path, spacing_mm: float) -> None:
    plan, patch = tiny_plan(), (32, 80, 80)
    branch = plan.configurations["3d_fullres"]
    channel = ChannelRecipe(
        normalization=Normalization.CT,
        statistics=dataclasses.replace(STATISTICS, std=50.0, percentile_99_5=300.0),
    )
    branch = dataclasses.replace(
        branch,
        grid=Grid(spacing_mm=(spacing_mm,) * 3, patch_size=patch),
        network=dataclasses.replace(branch.network, patch_size=patch),
        preprocessing=dataclasses.replace(branch.preprocessing, channels=(channel,)),
    )
    torch.manual_seed(0)
    save_bundle(
        folder,
        plan=dataclasses.replace(plan, configurations={"3d_fullres": branch}),
        configuration="3d_fullres",
        weights=[build_network(branch.network).state_dict()],
        reference_case=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("spacing_mm", [1.0, 2.0])
def test_a_further_voxel_takes_eight_bytes_at_most(tmp_path: Path, spacing_mm: float) -> None:
    write_model(tmp_path / "model", spacing_mm)
    peaks = []
    for length in LENGTHS:
        images = tmp_path / f"in_{length}"
        images.mkdir()
        voxels = np.random.default_rng(0).normal(100, 40, (*SLICE, length)).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), images / "a_0000.nii.gz")
        out = tmp_path / f"out_{length}"
        command = [sys.executable, "-m", "medmamba", "predict", "-i", str(images), "-o", str(out)]
        command += ["-m", str(tmp_path / "model"), "--device", "cpu", "--no-report"]
        command += ["--step", "1"]  # as much is kept as with tiles that overlap
        subprocess.run(command, check=True, capture_output=True)
        record = json.loads((out / "a.json").read_text())
        peaks.append(record["peak_memory_bytes"])
    voxels_more = (LENGTHS[1] - LENGTHS[0]) * SLICE[0] * SLICE[1]
    assert (peaks[1] - peaks[0]) / voxels_more <= MOST_BYTES_A_VOXEL
