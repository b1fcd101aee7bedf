"""MambaClinix: high-order recursive convolutions above, Mamba below; official form and gated form.

Bian et al. 2024, "MambaClinix: hierarchical gated convolution and Mamba-based U-Net for enhanced
3D medical image segmentation", sections 3.2 to 3.4. ``mambaclinix`` computes what the official
code computes: its "gated" convolution adds where HorNet (Rao et al. 2022) multiplies.
``mambaclinix_gated`` multiplies. Which stage has which block is decided by its index.

Shapes: x (batch, in_channels, D, H, W); logits (batch, out_channels, D, H, W).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from medmamba.networks.blocks import (
    SLOPE,
    ResidualBlock,
    StackedConvs,
    StackedResiduals,
    convolution,
    initialize_he,
    pointwise,
)
from medmamba.networks.channels_last import depthwise_conv
from medmamba.networks.definition import NetworkDefinition, read_options, require
from medmamba.networks.drop_path import DropPath, drop_rates
from medmamba.networks.mixer import make_mixer
from medmamba.networks.spec import NetworkSpec, OptionValue
from medmamba.networks.supervised import SupervisedDecoder
from medmamba.networks.umamba import NearestUpsample, ShortcutBlock
from medmamba.networks.unet import UNet, decoder_steps, require_unet

CHANNEL_NORM_EPS = 1e-6
BRANCH_SCALE = 1e-6
"""Initial scale of the recursive convolution's branch (layer scale of HorNet)."""

OPTIONS: Mapping[str, OptionValue] = MappingProxyType(
    {
        "d_state": 16,
        "d_conv": 4,
        "expand": 2,
        "order": "raster",
        "merge": "sum",
        "drop_path": 0.5,
    }
)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of every voxel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        y = functional.layer_norm(
            x.movedim(1, -1), self.gamma.shape, self.gamma, self.beta, CHANNEL_NORM_EPS
        )
        return y.movedim(-1, 1)


class RecursiveConv(nn.Module):
    """High-order recursive convolution (HorNet, algorithm 1): widths double from step to step.

    Args:
        channels: T; divisible by 2 ** (order - 1).
        order: number of steps.
        kernel: of the depthwise convolution.
        gated: multiply in every step, as HorNet does, instead of adding.
    """

    def __init__(
        self, channels: int, order: int, kernel: Sequence[int], *, gated: bool = False
    ) -> None:
        super().__init__()
        self.widths = [channels // 2 ** (order - 1 - step) for step in range(order)]
        self.combine = torch.mul if gated else torch.add
        dimension, rest = len(kernel), sum(self.widths)
        self.proj_in = pointwise(channels, 2 * channels, dimension)
        self.dwconv = convolution(rest, rest, kernel, groups=rest)
        self.reconv = nn.ModuleList(
            pointwise(narrow, wide, dimension) for narrow, wide in pairwise(self.widths)
        )
        self.proj_out = pointwise(channels, channels, dimension)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        sizes = [self.widths[0], sum(self.widths)]
        first, rest = torch.split(self.proj_in(x), sizes, dim=1)
        dwconv = cast(nn.Conv3d, self.dwconv)
        seen = depthwise_conv(rest.movedim(1, -1), dwconv.weight, dwconv.bias)
        parts = torch.split(seen.movedim(-1, 1), self.widths, dim=1)
        y = self.combine(first, parts[0])
        for widen, part in zip(self.reconv, parts[1:], strict=True):
            y = self.combine(widen(y), part)
        out: Tensor = self.proj_out(y)
        return out


class RecursiveBlock(nn.Module):
    """Half the width, recursive convolution in a scaled branch, two convolutions, residual."""

    def __init__(
        self,
        channels: int,
        order: int,
        kernel: Sequence[int],
        *,
        drop_rate: float = 0.0,
        gated: bool = False,
    ) -> None:
        super().__init__()
        inner = channels // 2
        self.gamma1 = nn.Parameter(torch.full((inner,), BRANCH_SCALE))
        self.hgConvs = RecursiveConv(inner, order, kernel, gated=gated)
        self.lynorm1 = ChannelNorm(inner)
        self.lynorm2 = ChannelNorm(inner)
        self.transconv = NamedConv(inner, channels, (1,) * len(kernel))
        self.conv1 = NamedConv(channels, inner, kernel)
        self.conv2 = NamedConv(channels, channels, kernel)
        self.drop_path = DropPath(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        t = self.transconv(x)
        scale = self.gamma1.view(-1, *(1,) * (x.dim() - 2))
        t = t + self.drop_path(scale * self.hgConvs(self.lynorm1(t)))
        y = functional.leaky_relu(self.conv1(self.lynorm2(t)), SLOPE, inplace=True)
        out: Tensor = x + self.drop_path(self.conv2(y))
        return out


class NamedConv(nn.Module):
    """A convolution without norm or activation, under the official name ``conv``."""

    def __init__(self, out_channels: int, in_channels: int, kernel: Sequence[int]) -> None:
        super().__init__()
        self.conv = convolution(in_channels, out_channels, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of ``out_channels``."""
        y: Tensor = self.conv(x)
        return y


class MambaLayer(nn.Module):
    """Norm, Mamba, the same norm again, linear, residual."""

    def __init__(self, channels: int, mixer: nn.Module) -> None:
        super().__init__()
        # The official layer has this scalar and never uses it; kept so that weights round trip.
        self.skip_scale = nn.Parameter(torch.ones(1), requires_grad=False)
        self.norm = nn.LayerNorm(channels)
        self.mamba = mixer
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        tokens = x.flatten(2).transpose(1, 2)
        mixed = self.mamba(self.norm(tokens), tuple(x.shape[2:]))
        y: Tensor = self.proj(self.norm(mixed))
        return y.transpose(1, 2).reshape(x.shape) + x


class Encoder(nn.Module):
    """Per stage one residual block, then a recursive block (upper half) or a Mamba layer."""

    def __init__(self, spec: NetworkSpec, *, gated: bool) -> None:
        super().__init__()
        upper = recursive_stages(spec)
        self.stem = StackedConvs(1, spec.in_channels, spec.features[0], spec.kernel_sizes[0])
        self.norm_before = upper - 1
        self.LayerNorm = ChannelNorm(spec.features[upper - 1])
        make = partial(encoder_layer, spec, gated=gated)
        self.encoder_layers = nn.ModuleList(make(stage) for stage in range(spec.stages))
        widths = pairwise((spec.features[0], *spec.features))
        rows = zip(widths, spec.kernel_sizes, spec.strides, strict=True)
        self.stages = nn.ModuleList(
            StackedResiduals(1, below, width, kernel, stride)
            for (below, width), kernel, stride in rows
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return one map per stage, highest resolution first."""
        x = self.stem(x)
        maps: list[Tensor] = []
        for index, (stage, layer) in enumerate(zip(self.stages, self.encoder_layers, strict=True)):
            x = stage(x)
            x = layer(self.LayerNorm(x) if index == self.norm_before else x)
            maps.append(x)
        return maps


class Decoder(SupervisedDecoder):
    """Nearest upsampling, concatenation with the skip behind a residual block, block, head."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        steps = list(decoder_steps(spec))
        kernels = [spec.kernel_sizes[level] for level, _, _ in steps]
        widest = spec.features[-1]
        self.Init_Residual = ResidualBlock(widest, widest, spec.kernel_sizes[-1])
        rows = list(zip(steps, kernels, strict=True))
        self.residual_blocks = nn.ModuleList(
            ResidualBlock(width, width, kernel) for (_, _, width), kernel in rows
        )
        self.stages = nn.ModuleList(
            ShortcutBlock(2 * width, width, kernel) for (_, _, width), kernel in rows
        )
        self.upsample_layers = nn.ModuleList(
            NearestUpsample(below, width, spec.strides[level + 1]) for level, below, width in steps
        )
        self.seg_layers = nn.ModuleList(
            pointwise(width, spec.out_channels, spec.dimension) for _, _, width in steps
        )

    def forward(self, skips: list[Tensor]) -> list[Tensor]:
        """Return logits, highest resolution first; only those without deep supervision."""
        x: Tensor = self.Init_Residual(skips[-1])
        logits: list[Tensor] = []
        last = len(self.stages) - 1
        for step, stage in enumerate(self.stages):
            skip = self.residual_blocks[step](skips[-(step + 2)])
            x = stage(torch.cat((self.upsample_layers[step](x), skip), dim=1))
            if self.deep_supervision or step == last:
                logits.append(self.seg_layers[step](x))
        return logits[::-1]


def recursive_stages(spec: NetworkSpec) -> int:
    """Return how many of the upper stages have recursive blocks: ceil(n / 2)."""
    return (spec.stages + 1) // 2


def encoder_layer(spec: NetworkSpec, stage: int, *, gated: bool) -> nn.Module:
    """Build what follows the residual block of a stage."""
    channels = spec.features[stage]
    options = read_options(spec, OPTIONS)
    rate = options.pop("drop_path")
    fits = isinstance(rate, (int, float)) and 0 <= rate < 1
    require(fits, spec, f"option drop_path is {rate!r}; give a number from 0 to below 1.")
    assert isinstance(rate, (int, float))
    if stage >= recursive_stages(spec):
        return MambaLayer(
            channels,
            make_mixer(spec.mixer, channels, spec.dimension, reverse=stage % 2 == 1, **options),
        )
    order = stage + 2
    multiple = 2**order
    require(
        channels % multiple == 0,
        spec,
        f"stage {stage} has {channels} features, a multiple of {multiple} needed there.",
    )
    drop_rate = drop_rates(spec.stages, 0.0, float(rate))[stage]
    return RecursiveBlock(
        channels, order, spec.kernel_sizes[stage], drop_rate=drop_rate, gated=gated
    )


def build(spec: NetworkSpec, *, gated: bool) -> nn.Module:
    """Build a MambaClinix with He initialisation, as the official trainer does.

    Raises:
        PlanError: a topology or an option it cannot be built from.
    """
    require_unet(spec)
    network = UNet(Encoder(spec, gated=gated), Decoder(spec))
    initialize_he(network)
    return network


def arrange(spec: NetworkSpec) -> NetworkSpec:
    """The plan's widths, strides and kernels; one block per step, whatever the plan counts.

    The encoder's counts are written as the official code reads them: 2 marks a recursive block
    beside the residual block, 1 a Mamba layer.
    """
    upper = recursive_stages(spec)
    return replace(
        spec,
        encoder_blocks=(2,) * upper + (1,) * (spec.stages - upper),
        decoder_blocks=(1,) * (spec.stages - 1),
    )


MAMBACLINIX = NetworkDefinition(
    build=partial(build, gated=False),
    dimensions=frozenset({3}),
    arrange=arrange,
    source="Bian et al. 2024, MambaClinix (arXiv 2409.12533)",
    summary="recursive convolutions above, Mamba below; official form, which adds",
)

MAMBACLINIX_GATED = replace(
    MAMBACLINIX,
    build=partial(build, gated=True),
    summary="recursive convolutions above, Mamba below; gates multiply, as the paper says",
)
