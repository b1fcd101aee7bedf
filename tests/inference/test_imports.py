"""What the prediction path may import; every package costs a cold start."""

import subprocess
import sys

import pytest

HEAVY = ("monai", "SimpleITK", "skimage", "matplotlib", "pandas", "sklearn", "nnunetv2")


def imported(statement: str, names: tuple[str, ...]) -> str:
    program = f"{statement}\nimport sys\nprint([n for n in {names!r} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "module",
    ["inference.records", "inference.journal", "inference.engine", "evaluation.report", "bundle"],
)
def test_torch_is_not_needed_to_look_at_things(module: str) -> None:
    assert imported(f"import medmamba.{module}", (*HEAVY, "torch")) == "[]"


def test_predicting_a_nifti_file_imports_no_heavy_package(tmp_path: object) -> None:
    program = f"""
import numpy as np, torch, nibabel as nib
from pathlib import Path
from medmamba.dataset import find_cases
from medmamba.inference.assignment import Assignment
from medmamba.inference.engine import predict_cases
from medmamba.inference.predictor import PredictionSettings, Predictor
from medmamba.inference.records import ModelIdentity
from medmamba.labels import LabelMap
from medmamba.networks import build_network
from medmamba.networks.spec import NetworkSpec
from medmamba.preprocessing.recipe import ChannelRecipe, Normalization, PreprocessingRecipe
from medmamba.volume import Grid

folder = Path({str(tmp_path)!r})
(folder / "in").mkdir()
voxels = np.random.default_rng(0).normal(size=(12, 14, 16)).astype(np.float32)
nib.save(nib.Nifti1Image(voxels, np.diag([0.8, 1.1, 1.0, 1])), folder / "in" / "a_0000.nii.gz")
recipe = PreprocessingRecipe(
    channels=(ChannelRecipe(normalization=Normalization.ZSCORE),), transpose_forward=(0, 1, 2)
)
spec = NetworkSpec(
    name="plain_unet", in_channels=1, out_channels=2, patch_size=(16, 16, 16), features=(4, 8),
    strides=((1, 1, 1), (2, 2, 2)), kernel_sizes=((3, 3, 3), (3, 3, 3)), encoder_blocks=(1, 1),
    decoder_blocks=(1,),
)
predictor = Predictor(
    [build_network(spec)],
    grid=Grid(spacing_mm=(1.0, 1.0, 1.0), patch_size=(16, 16, 16)),
    preprocessing=recipe,
    label_map=LabelMap(values={{"background": (0,), "a": (1,)}}),
    settings=PredictionSettings(mirror_axes=(0, 1, 2)),
)
listing = find_cases(folder / "in", channels=1)
run = predict_cases(
    Assignment(cases=listing.cases), folder / "out", predictor,
    model=ModelIdentity(name="m", sha256="0" * 64),
)
assert run.exit_code == 0, run
assert nib.load(folder / "out" / "a.nii.gz").shape == voxels.shape
"""
    assert imported(program, HEAVY) == "[]"
