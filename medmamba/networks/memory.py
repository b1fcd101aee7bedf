"""What a network costs before it is trained: bytes of a training step, operations of a forward.

Both are counted on fake tensors, which have shapes, types and a real device type (autocast
rejects the meta device) but no memory; so a cost is exact in what it counts and takes no
seconds of compute. Kernels of other devices may keep somewhat other tensors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from medmamba.files import to_json
from medmamba.kernels.mamba_block import whole_blocks
from medmamba.networks.registry import build_network
from medmamba.networks.spec import NetworkSpec

WEIGHT_BYTES = 4
"""Parameters, gradients and optimiser state are float32, under autocast too."""

LOGIT_COPIES = 3
"""Float32 maps of all classes alive in the loss: probabilities, target, gradient."""

WORKSPACE_MAPS = 2
"""Copies of the largest kept tensor alive in backward: incoming and outgoing gradient."""

SCAN_OPERATIONS = 9
"""Per token, inner channel and state of a scan: 9 L d N (Gu and Dao 2023, appendix D)."""


@dataclass(frozen=True, kw_only=True)
class TrainingCost:
    """Bytes of one training step, by what needs them.

    Args:
        parameters: number of values, not bytes.
        activations: kept by the forward pass for the backward pass.
        workspace: largest gradients of maps, and the loss.
    """

    parameters: int
    activations: int
    workspace: int

    def total(self, optimizer_states: int) -> int:
        """Add weights, gradients and the optimiser's values per parameter."""
        weights = self.parameters * WEIGHT_BYTES * (2 + optimizer_states)
        return weights + self.activations + self.workspace


def training_memory_bytes(
    spec: NetworkSpec, batch_size: int, *, bf16: bool, optimizer_states: int = 1
) -> int:
    """Estimate the memory of one training step at the spec's patch size.

    Saved tensors are summed over their storages, so that views and shared tensors count once.

    Args:
        spec: the network and its patch.
        batch_size: patches per step.
        bf16: under bfloat16 autocast.
        optimizer_states: values kept per parameter; 1 for SGD with momentum, 2 for Adam.

    Raises:
        PlanError: the network cannot be built from the spec.
    """
    return training_cost(spec, batch_size, bf16=bf16).total(optimizer_states)


def training_cost(spec: NetworkSpec, batch_size: int, *, bf16: bool) -> TrainingCost:
    """Count the tensors that one training step keeps.

    Raises:
        PlanError: the network cannot be built from the spec.
    """
    return _training_cost(_Key(spec), batch_size, bf16)


def activation_bytes_per_voxel(spec: NetworkSpec, *, bf16: bool = True) -> float:
    """Return bytes kept by the forward pass per voxel of a patch."""
    return training_cost(spec, 1, bf16=bf16).activations / prod(spec.patch_size)


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
    with _fake_network(spec, 1) as (network, image), torch.no_grad(), counter, whole_blocks():
        network(image)
    return int(counter.get_total_flops())


def count_parameters(spec: NetworkSpec) -> int:
    """Return the number of values a network trains or keeps."""
    with torch.device("meta"):
        network = build_network(spec)
    return sum(parameter.numel() for parameter in network.parameters())


class _Key:
    """A spec as a cache key; its options are a mapping and so have no hash."""

    def __init__(self, spec: NetworkSpec) -> None:
        self.spec = spec
        self.text = to_json(spec)

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.text == other.text


@lru_cache(maxsize=256)
def _training_cost(key: _Key, batch_size: int, bf16: bool) -> TrainingCost:
    spec = key.spec
    with _fake_network(spec, batch_size) as (network, image):
        network.deep_supervision = True  # type: ignore[assignment]
        own = [*network.parameters(), *network.buffers(), image]
        kept = _SavedBytes(own)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
        with torch.autograd.graph.saved_tensors_hooks(kept.add, _unpack), autocast:
            outputs = network(image)
        logits = sum(output.numel() for output in outputs) * WEIGHT_BYTES
        parameters = sum(parameter.numel() for parameter in network.parameters())
    return TrainingCost(
        parameters=parameters,
        activations=kept.total,
        workspace=WORKSPACE_MAPS * kept.largest + LOGIT_COPIES * logits,
    )


class _SavedBytes:
    """Sums the storages that autograd keeps, each once."""

    def __init__(self, known: list[Tensor]) -> None:
        # Storages are held, so that none is freed and its identity given to another.
        self.seen = {_identity(tensor): tensor for tensor in known}
        self.total = 0
        self.largest = 0

    def add(self, tensor: Tensor) -> Tensor:
        identity = _identity(tensor)
        if identity not in self.seen:
            self.seen[identity] = tensor
            size = tensor.untyped_storage().nbytes()
            self.total += size
            self.largest = max(self.largest, size)
        return tensor


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _unpack(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def _fake_network(spec: NetworkSpec, batch_size: int) -> Iterator[tuple[nn.Module, Tensor]]:
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
