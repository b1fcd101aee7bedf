"""Measures the compiled scan: correctness first, then interleaved medians of thread CPU time.

    python kernels/bench/cpu.py [--lengths 4096] [--channels 16 32 64] [--json results.json]

Every row gives ns per element (batch x length x channels x state) of the operator, all extras
fused, and how many times longer each PyTorch form takes. `--threads` adds the wall time of one
thread over that of two.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import baselines
import torch

from medmamba.files import to_json, write_atomic
from medmamba.kernels import native, selective_scan

STATE = 16
TOLERANCE = {"out": 1e-6, "gradient": 3e-6}  # max-norm relative to float64
FORMS = {
    "step_by_step": baselines.step_by_step,
    "linear_loop": baselines.linear_loop,
    "parallel_scan": baselines.parallel_scan,
}
if importlib.util.find_spec("mambapy"):
    FORMS["mambapy"] = baselines.mambapy_scan


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


def check(channels: int) -> None:
    """Stop unless outputs and gradients agree with float64."""
    inputs = make_inputs(257, channels)
    leaves = [value.requires_grad_() for value in inputs]
    exact = [value.detach().double().requires_grad_() for value in inputs]
    found, expected = operator(*leaves), baselines.linear_loop(*exact)
    found.sum().backward()
    expected.sum().backward()
    pairs = [(found, expected, "out")]
    pairs += [(a.grad, b.grad, "gradient") for a, b in zip(leaves, exact, strict=True)]
    for a, b, kind in pairs:
        error = ((a.double() - b).abs().max() / b.abs().max()).item()
        if error > TOLERANCE[kind]:
            raise SystemExit(f"wrong {kind} at {channels} channels: relative error {error:.1e}")


def interleaved(
    tasks: dict[str, Callable[[], None]], repeats: int, budget_s: float, clock: Callable[[], int]
) -> dict[str, list[float]]:
    """Nanoseconds of every task, one of each in turn; the slow ones stop when their time is up."""
    spent = {name: [] for name in tasks}
    for task in tasks.values():
        task()  # warm up
    for _ in range(repeats):
        for name, task in tasks.items():
            if sum(spent[name]) > budget_s * 1e9 and len(spent[name]) >= 3:
                continue
            start = clock()
            task()
            spent[name].append(clock() - start)
    return spent


def measure(length: int, channels: int, repeats: int, budget_s: float) -> dict:
    torch.set_num_threads(1)
    inputs = make_inputs(length, channels)
    row: dict = {"length": length, "channels": channels}
    elements = length * channels * STATE
    for kind, run in (("forward", forward), ("forward_backward", forward_backward)):
        tasks = {"operator": lambda run=run: run(operator, inputs)}
        tasks |= {
            name: lambda run=run, form=form: run(form, inputs)
            for name, form in FORMS.items()
            # autograd of the step-by-step form is quadratic in the length
            if not (kind == "forward_backward" and name == "step_by_step")
        }
        spent = interleaved(tasks, repeats, budget_s, time.thread_time_ns)
        ours = statistics.median(spent["operator"])
        quartiles = statistics.quantiles(spent["operator"], n=4)
        row[kind] = {
            "ns_per_element": ours / elements,
            "spread": (quartiles[2] - quartiles[0]) / ours,
            "times_longer": {
                name: statistics.median(values) / ours
                for name, values in spent.items()
                if name != "operator"
            },
        }
    return row


def measure_threads(length: int, channels: int, repeats: int) -> dict:
    """Wall time on one and on two threads."""
    inputs = make_inputs(length, channels)

    def task(threads: int, run: Callable) -> Callable[[], None]:
        def timed() -> None:
            torch.set_num_threads(threads)
            run(operator, inputs)

        return timed

    row: dict = {"length": length, "channels": channels}
    for kind, run in (("forward", forward), ("forward_backward", forward_backward)):
        tasks = {"1": task(1, run), "2": task(2, run)}
        spent = interleaved(tasks, repeats, 60.0, time.perf_counter_ns)
        row[kind] = statistics.median(spent["1"]) / statistics.median(spent["2"])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096])
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--budget-s", type=float, default=5.0, help="per PyTorch form and shape")
    parser.add_argument("--threads", action="store_true", help="also measure two threads")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    rows, thread_rows = [], []
    for channels in arguments.channels:
        check(channels)
        for length in arguments.lengths:
            rows.append(measure(length, channels, arguments.repeats, arguments.budget_s))
            print(json.dumps(rows[-1]))
            if arguments.threads:
                thread_rows.append(measure_threads(length, channels, arguments.repeats))
                print(json.dumps(thread_rows[-1]))
    results = {
        "machine": processor(),
        "instruction_set": native.description(),
        "torch": torch.__version__,
        "state": STATE,
        "load_average": os.getloadavg()[0],
        "processors": os.cpu_count(),
        "dtype": "float32",
        "rows": rows,
        "two_threads_over_one": thread_rows,
    }
    if arguments.json is not None:
        write_atomic(arguments.json, to_json(results))


def processor() -> str:
    """Name of the processor, as the system gives it."""
    table = Path("/proc/cpuinfo")
    if table.exists():
        for line in table.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
