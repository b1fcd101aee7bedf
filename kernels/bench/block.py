"""Memory and time of one Mamba block, plain and streamed: stage 0 of LightM-UNet, width 32.

    python kernels/bench/block.py [--tokens 262144 1048576] [--json results.json]

Every figure comes from a process of its own: peak memory is what the process holds at most beyond
what it held with inputs and weights in place. Bytes saved are those of the storages that autograd
keeps, the block's weights left out. Both forms are compared before anything is measured.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from medmamba.files import to_json, write_atomic
from medmamba.kernels.mamba_block import MambaWeights, chunk_length, mamba_block
from medmamba.networks.ssm import Mamba

WIDTH = 32
FORMS = ("plain", "streamed")
MODES = ("forward", "forward_backward")
TOLERANCE = 1e-5  # largest difference of both forms over the largest value, float32


def make(count: int) -> tuple[torch.Tensor, MambaWeights, int]:
    """Tokens (1, count, C), weights, and the chunk of the streamed form."""
    torch.manual_seed(0)
    block = Mamba(WIDTH)
    weights = block.weights(block)
    tokens = torch.randn(1, count, WIDTH)
    chunk = chunk_length(tokens, weights.A_log.shape[0])
    return tokens, weights, chunk or 4096


def run(tokens: torch.Tensor, weights: MambaWeights, chunk: int, mode: str) -> None:
    if mode == "forward":
        with torch.no_grad():
            mamba_block(tokens, weights, chunk=chunk)
        return
    leaf = tokens.detach().requires_grad_()
    mamba_block(leaf, weights, chunk=chunk).sum().backward()


def check() -> None:
    """Stop unless both forms give the same."""
    tokens, weights, _ = make(9000)
    with torch.no_grad():
        plain = mamba_block(tokens, weights, chunk=0)
        streamed = mamba_block(tokens, weights, chunk=4096)
    error = ((plain - streamed).abs().max() / plain.abs().max()).item()
    if error > TOLERANCE:
        raise SystemExit(f"the streamed block differs from the plain one by {error:.1e}")


def saved_bytes(tokens: torch.Tensor, weights: MambaWeights, chunk: int) -> int:
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = mamba_block(tokens.requires_grad_(), weights, chunk=chunk)
    del out
    return sum(size for address, size in kept.items() if address not in own)


def resident() -> int:
    """Bytes this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(count: int, form: str, mode: str, repeats: int) -> dict[str, float]:
    """One figure, in a process of its own."""
    torch.set_num_threads(1)
    tokens, weights, chunk = make(count)
    chunk = chunk if form == "streamed" else 0
    small = tokens[:, :2048]
    run(small, weights, min(chunk, 1024), mode)  # what libraries allocate once
    before = resident()
    run(tokens, weights, chunk, mode)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    spent = []
    for _ in range(repeats):
        start = time.thread_time()
        run(tokens, weights, chunk, mode)
        spent.append(time.thread_time() - start)
    result = {"peak_bytes": float(max(peak, 0)), "thread_s": statistics.median(spent)}
    if mode == "forward_backward":
        result["saved_bytes_per_token"] = saved_bytes(tokens, weights, chunk) / count
    return result


def measure_apart(count: int, form: str, mode: str, repeats: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", str(count), form, mode, str(repeats)]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    values: dict[str, float] = json.loads(found.stdout)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64**3, 128 * 128 * 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--one", nargs=4, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        count, form, mode, repeats = arguments.one
        print(json.dumps(measure(int(count), form, mode, int(repeats))))
        return
    check()
    rows = []
    for count in arguments.tokens:
        for mode in MODES:
            row: dict = {"tokens": count, "mode": mode}
            row |= {form: measure_apart(count, form, mode, arguments.repeats) for form in FORMS}
            rows.append(row)
            print(json.dumps(row))
    if arguments.json is not None:
        results = {
            "width": WIDTH,
            "torch": torch.__version__,
            "load_average": os.getloadavg()[0],
            "processors": os.cpu_count(),
            "rows": rows,
        }
        write_atomic(arguments.json, to_json(results))


if __name__ == "__main__":
    main()
