"""Measures the compiled scan: correctness first, then interleaved medians of thread CPU time.

    python kernels/bench/cpu.py [--lengths 4096] [--channels 16 32 64 128] [--json results.json]

Every row gives ns per element (batch x length x channels x state) of the operator, all extras
fused, and how many times longer each PyTorch form takes. A sample is one form called in a row
until SAMPLE_S have gone by, without the collector of garbage, as in timeit; the forms take turns.
At one shape the operator is also timed with AVX2, and by the wall on one and on two threads.
"""

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import baselines
import torch
from figures import figures

from medmamba.files import to_json, write_atomic
from medmamba.kernels import native, selective_scan
from medmamba.kernels.native_call import INSTRUCTION_SET_VARIABLE, instruction_set
from medmamba.machine import processor_name
from medmamba.training.precision import keep_freed_memory

STATE = 16
SAMPLE_S = 0.02
TOLERANCE = {"out": 1e-6, "gradient": 3e-6}  # max-norm relative to float64
FORMS = {
    "step_by_step": baselines.step_by_step,
    "linear_loop": baselines.linear_loop,
    "tight_loop": baselines.tight_loop,
    "parallel_scan": baselines.parallel_scan,
}
if importlib.util.find_spec("mambapy"):
    FORMS["mambapy"] = baselines.mambapy_scan
REFERENCE_CHANNELS = 64  # threads and AVX2 are measured here


def make_inputs(length: int, channels: int, dtype: torch.dtype = torch.float32) -> list:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    u, gate = normal(1, length, channels), normal(1, length, channels)
    delta = normal(1, length, channels) * 0.5
    B, C = normal(1, length, STATE), normal(1, length, STATE)
    A = -torch.arange(1.0, STATE + 1).repeat(channels, 1)
    skip, bias = torch.ones(channels), torch.full((channels,), -4.0)
    return [value.to(dtype) for value in (u, delta, A, B, C, skip, gate, bias)]


def operator(u, delta, A, B, C, skip, gate, bias) -> torch.Tensor:
    return selective_scan(
        u, delta, A, B, C, skip=skip, gate=gate, delta_bias=bias, delta_softplus=True
    )


def forward(form: Callable, inputs: list) -> None:
    with torch.no_grad():
        form(*inputs)


def forward_backward(form: Callable, inputs: list) -> None:
    leaves = [value.detach().requires_grad_() for value in inputs]
    form(*leaves).sum().backward()


DIRECTIONS = {"forward": forward, "forward_backward": forward_backward}


def check(channels: int) -> None:
    """Stop unless outputs and gradients agree with float64."""
    inputs = make_inputs(257, channels)
    leaves = [value.requires_grad_() for value in inputs]
    exact = [value.detach().double().requires_grad_() for value in inputs]
    found, expected = operator(*leaves), baselines.tight_loop(*exact)
    found.sum().backward()
    expected.sum().backward()
    pairs = [(found, expected, "out")]
    pairs += [(a.grad, b.grad, "gradient") for a, b in zip(leaves, exact, strict=True)]
    for a, b, kind in pairs:
        error = ((a.double() - b).abs().max() / b.abs().max()).item()
        if error > TOLERANCE[kind]:
            raise SystemExit(f"wrong {kind} at {channels} channels: relative error {error:.1e}")


def sample(task: Callable[[], None], clock: Callable[[], int]) -> float:
    """Nanoseconds of one call: the mean of as many in a row as fill SAMPLE_S."""
    gc.collect()
    gc.disable()
    try:
        calls, start = 0, clock()
        while calls == 0 or clock() - start < SAMPLE_S * 1e9:
            task()
            calls += 1
        return (clock() - start) / calls
    finally:
        gc.enable()


def interleaved(
    tasks: dict[str, Callable[[], None]], repeats: int, budget_s: float, clock: Callable[[], int]
) -> dict[str, list[float]]:
    """Samples of every task, one of each in turn; the slow ones stop when their time is up."""
    samples: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        task()  # warm up
    for _ in range(repeats):
        for name, task in tasks.items():
            if sum(samples[name]) > budget_s * 1e9 and len(samples[name]) >= 3:
                continue
            samples[name].append(sample(task, clock))
    return samples


def measure(length: int, channels: int, repeats: int, budget_s: float) -> dict:
    """One shape on one thread: the operator and every PyTorch form."""
    torch.set_num_threads(1)
    inputs = make_inputs(length, channels)
    row: dict = {"length": length, "channels": channels}
    elements = length * channels * STATE
    for kind, run in DIRECTIONS.items():
        tasks = {"operator": lambda run=run: run(operator, inputs)}
        tasks |= {
            name: lambda run=run, form=form: run(form, inputs)
            for name, form in FORMS.items()
            # autograd of the step-by-step form is quadratic in the length
            if not (kind == "forward_backward" and name == "step_by_step")
        }
        samples = interleaved(tasks, repeats, budget_s, time.thread_time_ns)
        ours = statistics.median(samples["operator"])
        quartiles = statistics.quantiles(samples["operator"], n=4)
        row[kind] = {
            "ns_per_element": ours / elements,
            "spread": (quartiles[2] - quartiles[0]) / ours,
            "times_longer": {
                name: statistics.median(values) / ours
                for name, values in samples.items()
                if name != "operator"
            },
        }
    return row


def measure_threads(length: int, channels: int, repeats: int) -> dict:
    """Wall time on one thread over that on two."""
    inputs = make_inputs(length, channels)

    def task(threads: int, run: Callable) -> Callable[[], None]:
        def timed() -> None:
            torch.set_num_threads(threads)
            run(operator, inputs)

        return timed

    row: dict = {"length": length, "channels": channels}
    for kind, run in DIRECTIONS.items():
        tasks = {"1": task(1, run), "2": task(2, run)}
        samples = interleaved(tasks, repeats, 60.0, time.perf_counter_ns)
        row[kind] = statistics.median(samples["1"]) / statistics.median(samples["2"])
    return row


def measure_sets(length: int, channels: int, repeats: int) -> dict[str, dict[str, float]]:
    """ns per element with every instruction set of this processor."""
    torch.set_num_threads(1)
    inputs = make_inputs(length, channels)
    found: dict[str, dict[str, float]] = {}
    for name in native._native.instruction_sets():
        with forced(name):
            check(channels)
            tasks = {
                kind: lambda run=run: run(operator, inputs) for kind, run in DIRECTIONS.items()
            }
            samples = interleaved(tasks, repeats, 60.0, time.thread_time_ns)
        elements = length * channels * STATE
        found[name] = {k: statistics.median(v) / elements for k, v in samples.items()}
    return found


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """Let the kernel use this instruction set for a while."""
    before = os.environ.get(INSTRUCTION_SET_VARIABLE)
    os.environ[INSTRUCTION_SET_VARIABLE] = name
    try:
        yield
    finally:
        del os.environ[INSTRUCTION_SET_VARIABLE]
        if before is not None:
            os.environ[INSTRUCTION_SET_VARIABLE] = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096])
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--budget-s", type=float, default=2.0, help="per PyTorch form and shape")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    keep_freed_memory()  # for every form alike, as training and prediction do
    idle = os.getloadavg()[0]
    rows = []
    for channels in arguments.channels:
        check(channels)
        for length in arguments.lengths:
            rows.append(measure(length, channels, arguments.repeats, arguments.budget_s))
            print(json.dumps(rows[-1]), flush=True)
    shape = (arguments.lengths[0], REFERENCE_CHANNELS, arguments.repeats)
    results = {
        "machine": processor_name(),
        "instruction_set": instruction_set() or native._native.instruction_sets()[0],
        "torch": torch.__version__,
        "state": STATE,
        "load_before": idle,
        "processors": os.cpu_count(),
        "dtype": "float32",
        "rows": rows,
        "instruction_sets": measure_sets(*shape),
        "two_threads_over_one": measure_threads(*shape),
    }
    for figure in figures(results):
        print(figure.line())
    if arguments.json is not None:
        write_atomic(arguments.json, to_json(results))


if __name__ == "__main__":
    main()
