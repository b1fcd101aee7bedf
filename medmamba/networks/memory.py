"""What a network costs before it is trained: bytes its forward keeps, operations it takes.

Both are counted on fake tensors, which have shapes, types and a real device type (autocast
rejects the meta device) but no memory; so a cost is exact in what it counts and takes no
seconds of compute. Kernels of other devices may keep somewhat other tensors.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from medmamba.kernels.mamba_block import whole_blocks
from medmamba.kernels.placement import as_on_gpu
from medmamba.networks.gpu_autocast import autocast_as_on_gpu
from medmamba.networks.registry import build_network
from medmamba.networks.spec import NetworkSpec

SCAN_OPERATIONS = 9
"""Per token, inner channel and state of a scan: 9 L d N (Gu and Dao 2023, appendix D)."""


def saved_bytes(
    spec: NetworkSpec, batch_size: int, *, on_gpu: bool = True, bf16: bool = True
) -> int:
    """Return the bytes that the forward pass of a training step keeps for its backward pass.

    Saved tensors are summed over their storages, so that views and shared tensors count once;
    weights and the image do not count.

    Args:
        spec: the network and its patch.
        batch_size: patches per step.
        on_gpu: count what a GPU would keep, else a CPU.
        bf16: under bfloat16 autocast.

    Raises:
        PlanError: the network cannot be built from the spec.
    """
    with ExitStack() as stack:
        if on_gpu:
            stack.enter_context(as_on_gpu())
        network, image = stack.enter_context(fake_network(spec, batch_size))
        network.deep_supervision = True  # type: ignore[assignment]
        kept = _SavedBytes([*network.parameters(), *network.buffers(), image])
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(kept.add, _unpack))
        if bf16:
            of_gpu = autocast_as_on_gpu(torch.bfloat16)
            stack.enter_context(of_gpu if on_gpu else torch.autocast("cpu", torch.bfloat16))
        network(image)
    return kept.total


def activation_bytes_per_voxel(spec: NetworkSpec) -> float:
    """Return bytes that a GPU keeps for backward, under bfloat16 autocast, per voxel of a patch."""
    return saved_bytes(spec, 1) / prod(spec.patch_size)


def operations(spec: NetworkSpec) -> int:
    """Count operations of one forward pass over one patch.

    Two per multiply-add of a convolution or matrix product, plus 9 L d N per scan direction
    (L tokens, d inner channels, N states). Norms, activations, additions and the causal
    convolution of a Mamba block (8 L d for four taps) are not counted.

    Raises:
        PlanError: the network cannot be built from the spec.
    """
    scan = torch.ops.medmamba.selective_scan
    counter = FlopCounterMode(display=False, custom_mapping={scan: _scan_operations})
    # Of a streamed block one chunk alone would be seen.
    with fake_network(spec, 1) as (network, image), torch.no_grad(), counter, whole_blocks():
        network(image)
    return int(counter.get_total_flops())


def count_parameters(spec: NetworkSpec) -> int:
    """Return the number of values a network trains or keeps."""
    with torch.device("meta"):
        network = build_network(spec)
    return sum(parameter.numel() for parameter in network.parameters())


class _SavedBytes:
    """Sums the storages that autograd keeps, each once."""

    def __init__(self, known: list[Tensor]) -> None:
        # Storages are held, so that none is freed and its identity given to another.
        self.seen = {_identity(tensor): tensor for tensor in known}
        self.total = 0

    def add(self, tensor: Tensor) -> Tensor:
        identity = _identity(tensor)
        if identity not in self.seen:
            self.seen[identity] = tensor
            self.total += tensor.untyped_storage().nbytes()
        return tensor


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _unpack(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def fake_network(spec: NetworkSpec, batch_size: int) -> Iterator[tuple[nn.Module, Tensor]]:
    """Build a network whose tensors have sizes and no values, and a batch of images for it.

    Raises:
        PlanError: the network cannot be built from the spec.
    """
    # Initialisation looks at values, so the network is built without any and then made fake.
    with torch.device("meta"):
        network = build_network(spec)
    # Tables of scan orders are real tensors that outlive the estimate.
    with FakeTensorMode(allow_non_fake_inputs=True):
        network.to_empty(device="cpu")
        image = torch.empty(batch_size, spec.in_channels, *spec.patch_size)
        yield network, image


def _scan_operations(u: Any, delta: Any, A: Any, *_: Any, **__: Any) -> int:
    batch, length, channels = u
    return int(SCAN_OPERATIONS * batch * length * channels * A[1])
