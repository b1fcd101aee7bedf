"""Convolution blocks of the nnU-Net family, under the parameter names its checkpoints use.

Shapes: x is (batch, channels, *spatial), spatial in (D, H, W) order. Kernels and strides are
one number per spatial axis.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional

from medmamba.kernels.instance_norm import normalize
from medmamba.kernels.placement import on_cpu

LayerTable = Mapping[int, Callable[..., nn.Module]]
"""A layer by its number of spatial axes."""

CONVOLUTIONS: LayerTable = MappingProxyType({1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d})
TRANSPOSED: LayerTable = MappingProxyType({2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d})
AVERAGE_POOLS: LayerTable = MappingProxyType({2: nn.AvgPool2d, 3: nn.AvgPool3d})

SLOPE = 0.01
"""Negative slope of the leaky ReLU, in the activation and in He initialisation."""

EPS = 1e-5
"""Added to the variance by every instance and layer norm of this family."""


def convolution(
    in_channels: int,
    out_channels: int,
    kernel: Sequence[int],
    *,
    stride: Sequence[int] | None = None,
    groups: int = 1,
    bias: bool = True,
) -> nn.Module:
    """A convolution of ``len(kernel)`` axes with padding (kernel - 1) // 2."""
    return CONVOLUTIONS[len(kernel)](
        in_channels,
        out_channels,
        tuple(kernel),
        stride=tuple(stride) if stride is not None else 1,
        padding=tuple((size - 1) // 2 for size in kernel),
        groups=groups,
        bias=bias,
    )


def pointwise(
    in_channels: int, out_channels: int, dimension: int, *, bias: bool = True
) -> nn.Module:
    """A convolution with kernel 1 on every axis."""
    return convolution(in_channels, out_channels, (1,) * dimension, bias=bias)


class InstanceNorm(nn.Module):
    """Normalise every channel of every sample over space, then scale and shift it.

    torch has three kernels for the same sums, and on a CPU the obvious one is the slowest by up
    to five times. So here contiguous maps go through group norm with one channel a group, and
    channels-last maps through batch norm, sample by sample. All keep statistics in float32 at
    least. Measured forward and backward, 2x32x40x56x40, 2 threads: contiguous float32 17 ms as
    instance norm, 8 ms as group norm; channels-last bfloat16 22, 107 (group) and 7 ms (batch).
    Without gradients channels-last maps go through a kernel of our own where it is there.
    """

    def __init__(self, channels: int, *, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor, *, slope: float = 1.0, in_place: bool = False) -> Tensor:
        """Return the normalised map, in the shape, type and memory format of ``x``.

        Args:
            x: (batch, channels, *spatial).
            slope: of a leaky ReLU behind it; 1 for none.
            in_place: let the result have the memory of ``x``, if that is faster.
        """
        fast = normalize(x, self.weight, self.bias, eps=EPS, slope=slope, in_place=in_place)
        if fast is not None:
            return fast
        y = self._in_torch(x)
        return y if slope == 1 else functional.leaky_relu(y, slope, inplace=True)

    def _in_torch(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if not on_cpu(x):
            return functional.instance_norm(x, weight=weight, bias=bias, eps=EPS)
        if x.is_contiguous() or x[0, 0].numel() == 1:
            return functional.group_norm(x, x.shape[1], weight, bias, EPS)
        samples = [
            functional.batch_norm(sample, None, None, weight, bias, training=True, eps=EPS)
            for sample in x.chunk(x.shape[0])
        ]
        return samples[0] if len(samples) == 1 else torch.cat(samples)


class ConvBlock(nn.Module):
    """Convolution, instance norm and, unless switched off, leaky ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int],
        stride: Sequence[int] | None = None,
        *,
        activate: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.conv = convolution(in_channels, out_channels, kernel, stride=stride, bias=bias)
        self.norm = InstanceNorm(out_channels)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of ``out_channels``, smaller by the stride."""
        y: Tensor = self.norm(self.conv(x), slope=SLOPE if self.activate else 1.0, in_place=True)
        return y


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut of average pool and 1x1 convolution (ResNet-D).

    The shortcut's convolution stands at ``skip.1`` behind a pool and at ``skip.0`` otherwise; it
    is there only where the number of channels changes. Source: He et al. 2019, "Bag of tricks".
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int],
        stride: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = ConvBlock(in_channels, out_channels, kernel, stride)
        self.conv2 = ConvBlock(out_channels, out_channels, kernel, activate=False)
        shortcut: list[nn.Module] = []
        if stride is not None and max(stride) > 1:
            shortcut.append(AVERAGE_POOLS[len(kernel)](tuple(stride), tuple(stride)))
        if in_channels != out_channels:
            ones = (1,) * len(kernel)
            shortcut.append(ConvBlock(in_channels, out_channels, ones, activate=False, bias=False))
        self.skip = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of ``out_channels``, smaller by the stride."""
        y: Tensor = self.conv2(self.conv1(x)) + self.skip(x)
        return functional.leaky_relu(y, SLOPE, inplace=True)


class StackedConvs(nn.Module):
    """Convolution blocks in a row; the first one carries the stride."""

    def __init__(
        self,
        blocks: int,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int],
        stride: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        first = ConvBlock(in_channels, out_channels, kernel, stride)
        rest = [ConvBlock(out_channels, out_channels, kernel) for _ in range(blocks - 1)]
        self.convs = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of ``out_channels``, smaller by the stride."""
        y: Tensor = self.convs(x)
        return y


class StackedResiduals(nn.Module):
    """Residual blocks in a row; the first one carries the stride."""

    def __init__(
        self,
        blocks: int,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int],
        stride: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        first = ResidualBlock(in_channels, out_channels, kernel, stride)
        rest = [ResidualBlock(out_channels, out_channels, kernel) for _ in range(blocks - 1)]
        self.blocks = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of ``out_channels``, smaller by the stride."""
        y: Tensor = self.blocks(x)
        return y


def initialize_he(network: nn.Module) -> None:
    """He normal weights and zero biases for every 2D and 3D (transposed) convolution.

    Conv1d layers, those inside Mamba blocks, keep their own initialisation, as in nnU-Net.
    """
    kinds = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    for module in network.modules():
        if isinstance(module, kinds):
            nn.init.kaiming_normal_(module.weight, a=SLOPE)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def zero_last_norms(network: nn.Module) -> None:
    """Let every residual block start as its shortcut: its last norm scales and shifts by zero."""
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            norm = module.conv2.norm
            if norm.weight is not None and norm.bias is not None:
                nn.init.zeros_(norm.weight)
                nn.init.zeros_(norm.bias)
