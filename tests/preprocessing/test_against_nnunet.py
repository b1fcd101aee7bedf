"""Random cases preprocessed and restored beside nnU-Net's own code, where it is installed."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

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
