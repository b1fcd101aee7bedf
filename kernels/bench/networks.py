"""Times each 3D network with the compiled scan and with the step-by-step reference on this CPU.

    python kernels/bench/networks.py [--networks lightm_unet_s ...] [--edge 64] [--json OUT.json]

One patch, batch 1, float32: a forward pass, and a training step (forward, loss, backward). Logits
of both runs are compared first, and nothing is timed when they differ by more than rounding.
Times are thread CPU seconds, so that other work on the machine does not count; the reference runs
once, the compiled scan three times (the median is given). Freed memory is kept, as training and
prediction keep it.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from medmamba.files import to_json, write_atomic
from medmamba.kernels.backend import VARIABLE
from medmamba.networks import NETWORKS, build_network
from medmamba.networks.spec import NetworkSpec
from medmamba.training.precision import keep_freed_memory

REPEATS = 3
STAGES = 4
WITHOUT_MAMBA = ("plain_unet", "resenc_unet")
TOLERANCE = 2e-2  # of the largest logit; LightM-UNet's norms amplify float32 rounding


@dataclass(frozen=True, kw_only=True)
class Row:
    """Seconds of one network; `times` is the reference's over the compiled scan's."""

    network: str
    parameters: int
    forward_s: float
    step_s: float
    reference_forward_s: float
    reference_step_s: float

    @property
    def times(self) -> tuple[float, float]:
        return self.reference_forward_s / self.forward_s, self.reference_step_s / self.step_s


def spec_of(name: str, edge: int) -> NetworkSpec:
    """The network as it is planned for a cubic patch of isotropic voxels."""
    planned = NetworkSpec(
        name=name,
        in_channels=1,
        out_channels=3,
        patch_size=(edge,) * 3,
        features=tuple(32 * 2**stage for stage in range(STAGES)),
        strides=((1, 1, 1),) + ((2, 2, 2),) * (STAGES - 1),
        kernel_sizes=((3, 3, 3),) * STAGES,
        encoder_blocks=(2,) * STAGES,
        decoder_blocks=(2,) * (STAGES - 1),
    )
    return NETWORKS[name].arrange(planned)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one form of the scan."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def forward(network: nn.Module, image: Tensor) -> Tensor:
    with torch.no_grad():
        return network(image)


def step(network: nn.Module, image: Tensor) -> Tensor:
    network.zero_grad()
    loss = network(image).square().mean()
    loss.backward()
    return loss


def seconds(work: Callable[[], object], repeats: int) -> float:
    measured = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        measured.append(time.process_time() - start)
    return statistics.median(measured)


def measure(name: str, edge: int) -> Row:
    """Compare, then time."""
    torch.manual_seed(0)
    network = build_network(spec_of(name, edge)).eval()
    image = torch.randn(1, 1, edge, edge, edge)
    logits, forwards, steps = {}, {}, {}
    with backend("native"):
        logits["native"] = forward(network, image)
    with backend("reference"):
        # The one forward pass of the reference that is compared is also the one that is timed.
        start = time.process_time()
        logits["reference"] = forward(network, image)
        forwards["reference"] = time.process_time() - start
    error = (logits["native"] - logits["reference"]).abs().max() / logits["reference"].abs().max()
    if error > TOLERANCE:
        raise SystemExit(f"{name}: logits differ by {error:.1e}; nothing is timed")
    with backend("native"):
        forwards["native"] = seconds(lambda: forward(network, image), REPEATS)
        steps["native"] = seconds(lambda: step(network, image), REPEATS)
    with backend("reference"):
        steps["reference"] = seconds(lambda: step(network, image), 1)
    return Row(
        network=name,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        forward_s=forwards["native"],
        step_s=steps["native"],
        reference_forward_s=forwards["reference"],
        reference_step_s=steps["reference"],
    )


def main() -> None:
    in_3d = [n for n, row in NETWORKS.items() if 3 in row.dimensions and n not in WITHOUT_MAMBA]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=in_3d, choices=in_3d)
    parser.add_argument("--edge", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}")
    print("| network | parameters | forward s | step s | reference forward s | step s | times |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for name in arguments.networks:
        row = measure(name, arguments.edge)
        rows.append(row)
        print(
            f"| {row.network} | {row.parameters:,} | {row.forward_s:.2f} | {row.step_s:.2f} | "
            f"{row.reference_forward_s:.1f} | {row.reference_step_s:.1f} | "
            f"{row.times[0]:.0f}x, {row.times[1]:.0f}x |",
            flush=True,
        )
    if arguments.json:
        results = {
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "edge": arguments.edge,
            "threads": arguments.threads,
            "rows": [asdict(row) for row in rows],
        }
        write_atomic(arguments.json, to_json(results))


if __name__ == "__main__":
    main()
