"""An nnU-Net model, trained by nnU-Net and imported, predicts nnU-Net's labels."""

import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

import medmamba
from medmamba.interop.nnunet_results import find_results, import_results

SESSION = Path(__file__).resolve().parents[2] / "plans" / "bench" / "nnunet_session.py"
CASES = 5
ITERATIONS = 12
"""So few that logits are still close to each other, which makes equal labels hard."""

DEFAULT_DIFFERENCE = 5e-4
"""Part of the voxels that may differ where sums are float32 and nnU-Net's are float16."""


def session(step: str, work: Path, dataset: Path, *arguments: object) -> None:
    command = [sys.executable, SESSION, step, work, dataset, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_imported_model_predicts_nnunets_labels(tmp_path: Path, data_dir: Path) -> None:
    pytest.importorskip("nnunetv2", reason="the extra 'nnunet' is not installed")
    dataset = data_dir / "Dataset004_Hippocampus"
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted((dataset / "imagesTs").glob("*.nii.gz"))[:CASES]:
        shutil.copy(path, images)
    work = tmp_path / "nnunet"
    session("plan", work, dataset)
    session("train", work, dataset, "--iterations", ITERATIONS)
    results = find_results(work / "results")
    session("predict", work, dataset, "--model", results.folder, "--images", images,
            "--output", tmp_path / "theirs")  # fmt: skip
    bundle = import_results(results, tmp_path / "model")
    for compat, allowed in ((True, 0.0), (False, DEFAULT_DIFFERENCE)):
        output = tmp_path / f"ours_{compat}"
        medmamba.predict(images, output, bundle.folder, compat=compat)
        wrong = total = found = 0
        for path in sorted((tmp_path / "theirs").glob("*.nii.gz")):
            theirs = np.asarray(nibabel.load(path).dataobj)
            ours = np.asarray(nibabel.load(output / path.name).dataobj)
            wrong += np.count_nonzero(theirs != ours)
            found += np.count_nonzero(theirs)
            total += theirs.size
        assert found > 0
        assert wrong <= allowed * total
