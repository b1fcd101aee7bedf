"""The Triton kernels compiled ahead of time for GPUs this machine does not have.

Registers, spills and instructions per element are read from the machine code; the tables below were
frozen from the first measurement and may be undercut, or exceeded by a tenth.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "kernels" / "bench" / "aot.py"
MOST_REGISTERS = 192
SLACK = 1.10
LIMIT_S = 600
KERNELS = ("chunk_state", "chunk_scan", "adjoint_state", "forward_pass", "reverse_pass")
CONVOLUTION = ("conv_forward", "conv_backward")
# Instructions per element and thread, in the order of KERNELS; softplus, bias, skip and gate fused.
TABLE = {
    ("sm_80", "fp32"): (6.44, 10.03, 7.25, 16.75, 17.94),
    ("sm_80", "bf16"): (7.12, 11.31, 8.06, 17.75, 19.38),
    ("sm_80", "fp16"): (7.06, 11.22, 7.94, 17.97, 19.25),
    ("sm_90", "fp32"): (6.44, 9.28, 7.25, 17.41, 17.97),
    ("sm_90", "bf16"): (7.12, 10.59, 8.03, 19.06, 19.53),
    ("sm_90", "fp16"): (7.06, 10.5, 7.94, 18.94, 19.41),
    ("sm_100", "fp32"): (6.22, 9.41, 7.25, 17.59, 17.19),
    ("sm_100", "bf16"): (6.91, 10.53, 7.88, 18.91, 18.75),
    ("sm_100", "fp16"): (6.84, 10.47, 7.81, 18.78, 18.62),
    ("gfx942", "fp32"): (5.0, 9.69, 7.25, 20.31, 23.69),
    ("gfx942", "bf16"): (6.25, 12.0, 7.62, 22.81, 24.5),
    ("gfx942", "fp16"): (6.12, 11.25, 7.5, 22.12, 24.88),
}


def compiled(folder: Path, *options: str) -> list[dict[str, object]]:
    target = folder / "aot.json"
    command = [sys.executable, str(SCRIPT), "--json", str(target), *options]
    subprocess.run(
        command, check=True, cwd=ROOT, env=_environment(), capture_output=True, timeout=LIMIT_S
    )
    return json.loads(target.read_text())["kernels"]


def _environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return kept | {"PYTHONPATH": str(ROOT)}


def assert_within_table(rows: list[dict[str, object]]) -> None:
    for row in rows:
        what = f"{row['kernel']} {row['arch']} {row['dtype']}"
        assert row["spills"] == 0, what
        assert row["registers"] <= MOST_REGISTERS, what
        if row["kernel"] in KERNELS:
            limits = TABLE[row["arch"], row["dtype"]]
            limit = SLACK * limits[KERNELS.index(row["kernel"])]
            assert row["instructions"] <= limit, f"{what}: {row['instructions']} > {limit:.1f}"


@pytest.mark.slow
def test_fits_an_h100(tmp_path: Path) -> None:
    rows = compiled(tmp_path, "--arch", "sm_90", "--dtype", "fp32")
    assert {row["kernel"] for row in rows} == {*KERNELS, "state_pass", *CONVOLUTION}
    assert_within_table(rows)
    assert all(row["shared"] == 0 for row in rows if row["kernel"] not in CONVOLUTION)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_fits_every_architecture(tmp_path: Path, arch: str) -> None:
    rows = compiled(tmp_path, "--arch", arch)
    assert {row["dtype"] for row in rows} == {"fp32", "bf16", "fp16"}
    assert_within_table(rows)
