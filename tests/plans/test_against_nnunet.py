"""Plans of random fingerprints against nnU-Net's own planner, where nnU-Net is installed."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from medmamba.plans.sizing import NNUNET_PLANNERS

DRAWS = 20
BENCH = Path(__file__).resolve().parents[2] / "plans" / "bench" / "planner_parity.py"


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    pytest.importorskip("nnunetv2", reason="the extra 'nnunet' is not installed")
    spec = importlib.util.spec_from_file_location("planner_parity", BENCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nnunet")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(DRAWS))
def test_random_plans_equal_nnunets(parity: ModuleType, folder: Path, seed: int) -> None:
    planner = list(NNUNET_PLANNERS)[seed % len(NNUNET_PLANNERS)]
    assert parity.compare(parity.draw(seed), planner, folder) == []
