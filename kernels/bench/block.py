"""Memory and time of one block of width 32, plain and streamed.

    python kernels/bench/block.py [--block mamba ss3d] [--shape 64x64x64 ...] [--json results.json]

"mamba" is the block of LightM-UNet's stage 0, "ss3d" the scan in six directions.

Every figure comes from a process of its own: peak memory is what the process holds at most beyond
what it held with inputs and weights in place. Bytes saved are those of the storages that autograd
keeps, the block's weights left out. Both forms are compared before anything is measured.
"""

import argparse
import contextlib
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from medmamba.files import to_json, write_atomic
from medmamba.kernels import mamba_block
from medmamba.networks.ssm import DirectionalScan, Mamba

WIDTH = 32
BLOCKS = {"mamba": lambda: Mamba(WIDTH), "ss3d": lambda: DirectionalScan(WIDTH, 3)}
SHAPES = ("64x64x64", "128x128x64")
FORMS = ("plain", "streamed")
MODES = ("forward", "forward_backward")
TOLERANCE = 1e-5  # largest difference of both forms over the largest value, float32


Shape = tuple[int, ...]


def make(block: str, shape: Shape) -> tuple[torch.nn.Module, torch.Tensor]:
    """The block, and tokens (1, L, C) of a map of this shape."""
    torch.manual_seed(0)
    return BLOCKS[block](), torch.randn(1, math.prod(shape), WIDTH)


def form_of(name: str) -> contextlib.AbstractContextManager[None]:
    """Blocks of this size are streamed unless somebody asks for whole ones."""
    return mamba_block.whole_blocks() if name == "plain" else contextlib.nullcontext()


def run(module: torch.nn.Module, tokens: torch.Tensor, shape: Shape, mode: str) -> None:
    if mode == "forward":
        with torch.no_grad():
            module(tokens, shape)
        return
    module.zero_grad()
    module(tokens.detach().requires_grad_(), shape).sum().backward()


def check(block: str) -> None:
    """Stop unless both forms give the same."""
    shape = (32, 32, 32)
    module, tokens = make(block, shape)
    before = mamba_block.STREAM_FROM_VALUES
    mamba_block.STREAM_FROM_VALUES = 0
    with torch.no_grad():
        streamed = module(tokens, shape)
        with form_of("plain"):
            plain = module(tokens, shape)
    mamba_block.STREAM_FROM_VALUES = before
    error = ((plain - streamed).abs().max() / plain.abs().max()).item()
    if error > TOLERANCE:
        raise SystemExit(f"the streamed block differs from the plain one by {error:.1e}")


def saved_bytes(module: torch.nn.Module, tokens: torch.Tensor, shape: Shape) -> int:
    own = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = module(tokens.requires_grad_(), shape)
    del out
    return sum(size for address, size in kept.items() if address not in own)


def resident() -> int:
    """Bytes this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(block: str, shape: Shape, form: str, mode: str, repeats: int) -> dict[str, float]:
    """One figure, in a process of its own."""
    torch.set_num_threads(1)
    module, tokens = make(block, shape)
    with form_of(form):
        run(module, tokens[:, :4096], (16, 16, 16), mode)  # what libraries allocate once
        before = resident()
        run(module, tokens, shape, mode)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        spent = []
        for _ in range(repeats):
            start = time.thread_time()
            run(module, tokens, shape, mode)
            spent.append(time.thread_time() - start)
        result = {"peak_bytes": float(max(peak, 0)), "thread_s": statistics.median(spent)}
        if mode == "forward_backward":
            result["saved_bytes_per_token"] = saved_bytes(module, tokens, shape) / tokens.shape[1]
    return result


def measure_apart(*settings: object) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", *map(str, settings)]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    values: dict[str, float] = json.loads(found.stdout)
    return values


def sizes(shape: str) -> Shape:
    return tuple(int(size) for size in shape.split("x"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--block", nargs="+", default=list(BLOCKS), choices=list(BLOCKS))
    parser.add_argument("--shape", nargs="+", default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--one", nargs=5, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        block, shape, form, mode, repeats = arguments.one
        print(json.dumps(measure(block, sizes(shape), form, mode, int(repeats))))
        return
    rows = []
    for block in arguments.block:
        check(block)
        for shape in arguments.shape:
            for mode in MODES:
                row: dict = {"block": block, "shape": shape, "mode": mode}
                for form in FORMS:
                    row[form] = measure_apart(block, shape, form, mode, arguments.repeats)
                rows.append(row)
                print(json.dumps(row), flush=True)
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
