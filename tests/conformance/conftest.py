"""A tiny model and two images, for every test of the conformance suite."""

import json
import shutil
from pathlib import Path

import pytest

from medmamba.bundle import save_bundle

from ..test_bundle import CONFIGURATION, tiny_plan, weights
from .phantom import nifti, packed, voxels


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "model"
    save_bundle(
        folder, plan=tiny_plan(), configuration=CONFIGURATION, weights=[weights(0)],
        precision="fp32",
    )  # fmt: skip
    return folder


@pytest.fixture
def model(made, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(made, tmp_path / "model"))


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(2):
        (folder / f"case{seed}_0000.nii.gz").write_bytes(packed(nifti(voxels(seed))))
    return folder


def predict(medmamba, images: Path, output: Path, model: Path, *options: str) -> tuple[int, dict]:
    """Predict in this process, which is quicker; ``test_process`` has what concerns the worker."""
    code, out, _ = medmamba("predict", "-i", images, "-o", output, "-m", model, "--json",
                            *(options or ["--in-process"]))  # fmt: skip
    return code, {item["case_id"]: item for item in json.loads(out)["cases"]}
