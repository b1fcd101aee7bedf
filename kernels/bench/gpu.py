"""Verify, tune and time the Triton scan on a GPU; one call, under ten minutes.

    PYTHONPATH=. python3 kernels/bench/gpu.py [--json OUT.json] [--only checks times tuning]

Correctness comes first, and nothing is timed when it fails: fresh random inputs against the
float64 definition, uninitialised memory filled with NaN, bitwise repeatability, tensors of more
than 2^31 elements, a sequence of 2^21 tokens. Times are medians of CUDA events. Floors: bytes at
the copy rate measured here, instructions at the rate of the chip. Needs torch, triton and numpy.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton  # noqa: TID251
from gpu_checks import CHECKS, run_check
from torch import Tensor

from medmamba.kernels import triton as backend
from medmamba.kernels.arguments import Needs, ScanArguments
from medmamba.kernels.triton_cut import Tuning

WORKERS = 8  # processes that check and compile side by side
REPEATS = 15
FLUSH_BYTES = 256 * 2**20  # larger than the second-level cache
# Counted by aot.py for sm_90: chunk_state + chunk_scan; adjoint, forward pass, reverse pass.
FORWARD_INSTRUCTIONS = {torch.float32: 15.7, torch.bfloat16: 17.7}
BACKWARD_INSTRUCTIONS = {torch.float32: 42.6, torch.bfloat16: 46.6}
LANES_PER_CLOCK = 128  # float32 lanes of one multiprocessor


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A problem to time."""

    name: str
    batch: int
    channels: int
    length: int
    dtype: torch.dtype
    state: int = 16
    gate: bool = True
    segment: int = 0
    order: bool = False


SHAPES = (
    Shape(name="volume fp32", batch=1, channels=64, length=128**3, dtype=torch.float32),
    Shape(name="volume bf16", batch=1, channels=64, length=128**3, dtype=torch.bfloat16),
    Shape(name="volume x2 fp32", batch=2, channels=64, length=128**3, dtype=torch.float32),
    Shape(name="saturated bf16", batch=8, channels=1536, length=4096, dtype=torch.bfloat16),
    Shape(name="saturated fp32", batch=8, channels=1536, length=4096, dtype=torch.float32),
    Shape(name="stage 2 bf16", batch=2, channels=128, length=64**3, dtype=torch.bfloat16),
    Shape(name="deep bf16", batch=2, channels=512, length=512, dtype=torch.bfloat16),
    Shape(name="narrow bf16", batch=2, channels=32, length=64**3, dtype=torch.bfloat16),
    Shape(name="local bf16", batch=1, channels=256, length=32768, dtype=torch.bfloat16, segment=16),
    Shape(
        name="ordered bf16", batch=1, channels=256, length=32768, dtype=torch.bfloat16, order=True
    ),
    Shape(name="raster bf16", batch=1, channels=256, length=32768, dtype=torch.bfloat16),
)


def make(shape: Shape) -> ScanArguments:
    """Random inputs with the step sizes a trained network has."""
    device = "cuda"

    def rows() -> Tensor:
        size = (shape.batch, shape.length, shape.channels)
        return torch.randn(size, device=device, dtype=shape.dtype)

    def projection() -> Tensor:
        size = (shape.batch, shape.length, 1, shape.state)
        return torch.randn(size, device=device, dtype=shape.dtype)

    order = None
    if shape.order:
        order = torch.randperm(shape.length, device=device).to(torch.int32)
    rates = torch.arange(1.0, shape.state + 1, device=device).expand(shape.channels, -1)
    return ScanArguments(
        u=rows(),
        delta=rows(),
        A=-rates.contiguous(),
        B=projection(),
        C=projection(),
        skip=torch.randn(shape.channels, device=device),
        gate=rows() if shape.gate else None,
        delta_bias=torch.full((shape.channels,), -4.0, device=device),
        order=order,
        delta_softplus=True,
        segment=shape.segment,
        out_dtype=shape.dtype,
    )


def median_ms(call: Callable[[], object], repeats: int = REPEATS) -> tuple[float, float]:
    """Median and half the interquartile range of one call's device time, with a cold cache."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    quarters = statistics.quantiles(times, n=4)
    return statistics.median(times), (quarters[2] - quarters[0]) / 2


def copy_rate() -> float:
    """Bytes a second of a large device copy, read and written."""
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    milliseconds, _ = median_ms(lambda: target.copy_(source))
    return 2 * source.numel() / milliseconds * 1e3


def floors_ms(shape: Shape, rate: float) -> dict[str, float]:
    """The least time that bytes and that instructions allow."""
    pairs = shape.batch * shape.length * shape.channels
    size = torch.finfo(shape.dtype).bits // 8
    projections = size * shape.state / shape.channels
    forward_bytes = (4 if shape.gate else 3) * size + 2 * projections
    backward_bytes = (7 if shape.gate else 5) * size + 4 * projections
    properties = torch.cuda.get_device_properties(0)
    clock = getattr(properties, "clock_rate", 1_755_000) * 1e3
    issue = properties.multi_processor_count * clock * LANES_PER_CLOCK
    elements = pairs * shape.state
    return {
        "forward_bytes": forward_bytes * pairs / rate * 1e3,
        "backward_bytes": backward_bytes * pairs / rate * 1e3,
        "forward_issue": elements * FORWARD_INSTRUCTIONS[shape.dtype] / issue * 1e3,
        "backward_issue": elements * BACKWARD_INSTRUCTIONS[shape.dtype] / issue * 1e3,
    }


def time_shape(shape: Shape, rate: float, tuning: Tuning) -> dict[str, Any]:
    """Forward, training forward and backward of one shape, each phase, and the public kernel."""
    arguments = make(shape)
    grad_out = torch.randn_like(arguments.u)
    _, _, states = backend.forward(arguments, save_states=True, tuning=tuning)
    needs = Needs(gate=shape.gate, h0=False)

    def inference() -> object:
        return backend.forward(arguments, save_states=False, tuning=tuning)

    def training() -> object:
        return backend.forward(arguments, save_states=True, tuning=tuning)

    def backward() -> object:
        return backend.backward(arguments, states, grad_out, None, needs, tuning=tuning)

    row: dict[str, Any] = {"shape": asdict(shape) | {"dtype": str(shape.dtype)}}
    for name, call in (("forward", inference), ("training", training), ("backward", backward)):
        row[name], row[f"{name}_spread"] = median_ms(call)
    row["floors"] = floors_ms(shape, rate)
    row["phases"] = phases(training) | phases(backward)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    backward()
    row["backward_extra_bytes"] = torch.cuda.max_memory_allocated() - before
    row["public"] = time_public(arguments, grad_out)
    return row


def phases(call: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of each kernel in one call."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    totals: dict[str, float] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = event.name.split("<")[0][-40:]
            totals[name] = totals.get(name, 0.0) + event.device_time / 1e3
    return totals


def time_public(arguments: ScanArguments, grad_out: Tensor) -> dict[str, float] | None:
    """The public CUDA kernel on the same problem, where it is installed."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    if arguments.segment or arguments.order is not None:
        return None

    def first(rows: Tensor) -> Tensor:
        return rows.mT.contiguous().requires_grad_()

    u, delta, z = first(arguments.u), first(arguments.delta), first(arguments.gate)
    B, C = (
        value.squeeze(2).mT.contiguous().requires_grad_() for value in (arguments.B, arguments.C)
    )
    A, D = arguments.A.clone().requires_grad_(), arguments.skip.clone().requires_grad_()
    bias = arguments.delta_bias.clone().requires_grad_()

    def forward() -> Tensor:
        return selective_scan_fn(u, delta, A, B, C, D, z, bias, True)

    out = forward()
    weights = grad_out.mT.contiguous()
    leaves = (u, delta, A, B, C, D, z, bias)
    return {
        "forward": median_ms(forward)[0],
        "backward": median_ms(lambda: torch.autograd.grad(out, leaves, weights, retain_graph=True))[
            0
        ],
    }


def tune(shape: Shape) -> list[dict[str, Any]]:
    """Chunk lengths, tiles and register caps for one shape."""
    arguments = make(shape)
    grad_out = torch.randn_like(arguments.u)
    needs = Needs(gate=shape.gate, h0=False)
    rows = []
    for tile, chunk in ((t, c) for t in (32, 64) for c in (64, 128, 256, 512, 1024)):
        tuning = Tuning(tile=tile, chunk=chunk)
        call = lambda t=tuning: backend.forward(arguments, save_states=False, tuning=t)  # noqa: E731
        rows.append({"what": "forward", "tile": tile, "chunk": chunk, "ms": median_ms(call, 7)[0]})
    for tile, registers, chunk in (
        (t, r, c) for t in (32, 64) for r in (128, 168, 192, 208, 255) for c in (128, 256, 512)
    ):
        tuning = Tuning(backward_tile=tile, registers=registers, chunk=chunk)
        _, _, states = backend.forward(arguments, save_states=True, tuning=tuning)
        call = lambda t=tuning, s=states: backend.backward(  # noqa: E731
            arguments, s, grad_out, None, needs, tuning=t
        )
        rows.append(
            {
                "what": "backward",
                "tile": tile,
                "registers": registers,
                "chunk": chunk,
                "ms": median_ms(call, 7)[0],
            }
        )
    return sorted(rows, key=lambda row: (row["what"], row["ms"]))


def compile_ahead(job: tuple[Shape, Tuning]) -> None:
    """Fill the compiler's cache for one shape, over a short sequence."""
    shape, tuning = job
    short = replace(shape, length=min(shape.length, 8192))
    arguments = make(short)
    tuning = replace(tuning, chunk=min(tuning.chunk or 64, 64))
    _, _, states = backend.forward(arguments, save_states=True, tuning=tuning)
    needs = Needs(gate=shape.gate, h0=False)
    backend.backward(arguments, states, torch.randn_like(arguments.u), None, needs, tuning=tuning)
    torch.cuda.synchronize()


def check_all(pool: ProcessPoolExecutor) -> list[dict[str, Any]]:
    """Every check, in several processes; each makes its own random inputs."""
    seed = int.from_bytes(os.urandom(4), "little")
    jobs = [(name, seed + index) for index, name in enumerate(CHECKS)]
    return list(pool.map(run_check, jobs))


def device_facts(rate: float) -> dict[str, Any]:
    """What was measured on."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "copy_bytes_per_second": rate,
    }


def print_times(rows: list[dict[str, Any]]) -> None:
    """One line a shape."""
    print(
        f"{'shape':16} {'fwd':>8} {'train':>8} {'bwd':>8}  floors f-bytes f-issue b-bytes b-issue"
    )
    for row in rows:
        floors = " ".join(f"{value:7.3f}" for value in row["floors"].values())
        times = " ".join(f"{row[name]:8.3f}" for name in ("forward", "training", "backward"))
        print(f"{row['shape']['name']:16} {times}  {floors}  public {row['public']}")


def main() -> int:
    """Run the parts asked for; exit code 1 when a check fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts = ("checks", "times", "tuning")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--shapes", nargs="+", help="names of the shapes to time")
    options = parser.parse_args()
    start = time.monotonic()
    report: dict[str, Any] = {}
    shapes = [s for s in SHAPES if options.shapes is None or s.name in options.shapes]

    def save() -> None:
        if options.json is not None:
            options.json.write_text(json.dumps(report, indent=1, default=str))

    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
        ahead = [pool.submit(compile_ahead, (shape, Tuning())) for shape in shapes]
        if "checks" in options.only:
            report["checks"] = check_all(pool)
            save()
            for row in report["checks"]:
                print(f"{'ok  ' if row['passed'] else 'FAIL'} {row['name']:28} {row['detail']}")
            print(f"checks took {time.monotonic() - start:.0f} s", flush=True)
            if not all(row["passed"] for row in report["checks"]):
                return 1
        for job in ahead:
            job.result()
        if "tuning" in options.only:
            sizes = [Tuning(tile=tile) for tile in (32,)]
            sizes += [
                Tuning(backward_tile=t, registers=r)
                for t in (32, 64)
                for r in (128, 168, 192, 208, 255)
            ]
            list(pool.map(compile_ahead, [(SHAPES[0], tuning) for tuning in sizes]))
    rate = copy_rate()
    report["device"] = device_facts(rate)
    print(json.dumps(report["device"]))
    if "times" in options.only:
        report["times"] = [time_shape(shape, rate, Tuning()) for shape in shapes]
        print_times(report["times"])
        for row in report["times"][:2]:
            print(row["shape"]["name"], {k: round(v, 3) for k, v in row["phases"].items()})
        save()
    if "tuning" in options.only:
        report["tuning"] = tune(SHAPES[0])
        for row in report["tuning"]:
            print(row)
    save()
    print(f"done in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
