"""What stands where a network mixes tokens: Mamba, or a twin without it.

A twin differs from its network in this one place, so that a comparison measures the Mamba
layers and nothing else: ``identity`` removes them, ``dwconv`` puts a convolution of the same
number of parameters there.

Shapes: tokens (batch, length, channels), in raster order of a map of spatial ``shape``.
"""

from collections.abc import Callable, Sequence
from itertools import product
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from medmamba.networks.blocks import convolution
from medmamba.networks.channels_last import depthwise_conv
from medmamba.networks.spec import Mixer
from medmamba.networks.ssm import Mamba

TWIN_KERNEL = 3
"""Edge of the depthwise kernel, the one of the networks' other convolutions."""


class IdentityMixer(nn.Module):
    """Leaves tokens as they are."""

    def forward(self, tokens: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Return ``tokens``."""
        return tokens


class DepthwiseMixer(nn.Module):
    """Linear to an inner width, depthwise convolution, SiLU, linear back.

    The inner width, and which of the three layers has a bias, are chosen so that the parameter
    count comes as near to ``parameters`` as it can.

    Args:
        channels: of a token.
        dimension: of the map whose tokens are mixed.
        parameters: count to reach, that of the layer this one replaces.
    """

    def __init__(self, channels: int, dimension: int, *, parameters: int) -> None:
        super().__init__()
        kernel = (TWIN_KERNEL,) * dimension
        width, biases = fit_width(channels, prod(kernel), parameters)
        self.in_proj = nn.Linear(channels, width, bias=biases[0])
        self.conv = convolution(width, width, kernel, groups=width, bias=biases[1])
        self.out_proj = nn.Linear(width, channels, bias=biases[2])

    def forward(self, tokens: Tensor, shape: Sequence[int]) -> Tensor:
        """Return (batch, length, channels)."""
        inner = self.in_proj(tokens).unflatten(1, tuple(shape))
        conv = cast(nn.Conv3d, self.conv)
        mixed = functional.silu(depthwise_conv(inner, conv.weight, conv.bias))
        y: Tensor = self.out_proj(mixed.flatten(1, -2))
        return y


def fit_width(
    channels: int, kernel_voxels: int, parameters: int
) -> tuple[int, tuple[bool, bool, bool]]:
    """Return the inner width and biases of a ``DepthwiseMixer`` of about ``parameters`` values."""

    def count(width: int, biases: tuple[bool, bool, bool]) -> int:
        vectors = width * (biases[0] + biases[1]) + channels * biases[2]
        return width * (2 * channels + kernel_voxels) + vectors

    middle = parameters // (2 * channels + kernel_voxels)
    candidates = product(range(max(1, middle - 1), middle + 2), product((False, True), repeat=3))
    return min(
        ((width, (first, second, third)) for width, (first, second, third) in candidates),
        key=lambda choice: abs(count(*choice) - parameters),
    )


def make_mixer(kind: Mixer, channels: int, dimension: int, **options: Any) -> nn.Module:
    """Build the layer that mixes tokens of ``channels``; called as ``mixer(tokens, shape)``.

    Args:
        kind: ``mamba``, or the twin that stands in its place.
        channels: of a token.
        dimension: of the map whose tokens are mixed.
        options: keywords of ``Mamba``; a ``dwconv`` twin has the parameters they would give.
    """
    return make_twin(kind, channels, dimension, lambda: Mamba(channels, dimension, **options))


def make_twin(
    kind: Mixer, channels: int, dimension: int, build: Callable[[], nn.Module]
) -> nn.Module:
    """Build what ``build`` gives, or the twin that stands in its place."""
    if kind == "identity":
        return IdentityMixer()
    if kind == "mamba":
        return build()
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build().parameters())
    return DepthwiseMixer(channels, dimension, parameters=parameters)
