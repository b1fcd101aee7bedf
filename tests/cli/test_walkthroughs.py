"""Walkthroughs run as they are written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WALKTHROUGHS = Path(__file__).resolve().parents[2] / "cli" / "walkthroughs"


@pytest.mark.slow
def test_quickstart(ellipsoids, tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", WALKTHROUGHS / "quickstart.sh", ellipsoids, tmp_path, "30s"],
        capture_output=True, text=True, timeout=600, env={**os.environ, "PATH": path}, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "mean foreground Dice" in result.stdout
    assert len(list((tmp_path / "masks").glob("*.nii.gz"))) == 2
