"""Random cases preprocessed and restored beside nnU-Net's own code, where it is installed."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from medmamba.preprocessing.recipe import ResamplingRecipe
from medmamba.preprocessing.resample import resample_labels

DRAWS = 40
BENCH = Path(__file__).resolve().parents[2] / "plans" / "bench" / "preprocessing_parity.py"


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    pytest.importorskip("nnunetv2", reason="the extra 'nnunet' is not installed")
    spec = importlib.util.spec_from_file_location("preprocessing_parity", BENCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(DRAWS))
def test_random_cases_come_out_as_nnunets(parity: ModuleType, seed: int) -> None:
    assert parity.compare(parity.draw(seed)) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order_z", [1, 3])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_splines_along_a_separate_axis_give_nnunets_labels(order_z: int, axis: int) -> None:
    """Indicators meet one half exactly in many voxels, where rounding decides."""
    nnunet = pytest.importorskip(
        "nnunetv2.preprocessing.resampling.default_resampling",
        reason="the extra 'nnunet' is not installed",
    )
    random = np.random.default_rng(axis)
    spacing = [5.0 if at == axis else 1.0 for at in range(3)]
    for _ in range(12):
        old = tuple(random.integers(4, 14, 3).tolist())
        new = tuple(max(1, round(size * random.uniform(0.5, 2))) for size in old)
        labels = random.integers(0, 3, old).astype(np.int16)
        expected = nnunet.resample_data_or_seg_to_shape(
            labels[None], new, spacing, [1.0] * 3,
            is_seg=True, order=1, order_z=order_z, force_separate_z=None,
        )  # fmt: skip
        found = resample_labels(labels, new, ResamplingRecipe(order=1, order_z=order_z), axis)
        assert np.array_equal(found, expected[0])
