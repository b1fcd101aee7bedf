"""Makes the inputs of scan_cases.py importable, whichever way pytest is started."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Any]:
    """Triton's kernels in a process of their own, in chunks of four tokens."""
    pytest.importorskip("triton", reason="triton is not installed")
    from interpreted import Interpreted

    from medmamba.kernels.triton_cut import Tuning

    backend = Interpreted(Tuning(chunk=4))
    yield backend
    backend.pool.shutdown()
