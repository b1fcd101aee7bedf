"""Swin-UMamba: a visual state-space encoder with ImageNet start under two kinds of decoder.

Liu et al. 2024, "Swin-UMamba: Mamba-based UNet with ImageNet-based pretraining", section 2.
``swin_umamba`` has a convolutional decoder, ``swin_umamba_d`` (the paper's dagger) one of VSS
blocks and patch expanding. Both compute what the official 2D code computes. The first is written
for two or three axes and any strides; ``swin_umamba_3d.py`` plans its 3D form.

Shapes: x (batch, in_channels, *spatial); logits (batch, out_channels, *spatial).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medmamba.networks.blocks import (
    SLOPE,
    TRANSPOSED,
    InstanceNorm,
    convolution,
    initialize_he,
    pointwise,
)
from medmamba.networks.definition import NetworkDefinition, check_spec, read_options, require
from medmamba.networks.drop_path import drop_rates
from medmamba.networks.spec import NetworkSpec, OptionValue
from medmamba.networks.supervised import SupervisedDecoder, SupervisedNetwork
from medmamba.networks.vss import VSSEncoder, VSSStage, vss_stage

WIDTHS = (48, 96, 192, 384, 768, 768)
"""Channels per resolution, full size first; the last four encoder stages are VMamba-T's."""

D_WIDTHS = (96, 96, 192, 384, 768)
DEPTHS = (2, 2, 9, 2)
"""VSS blocks per stage of VMamba-T."""

DECODER_DEPTH = 2
"""VSS blocks per decoder step of Swin-UMamba-D."""

STEM_KERNEL = 7

FEWEST_STAGES = 3
"""Image, stem, encoder."""

OPTIONS: Mapping[str, OptionValue] = MappingProxyType(
    {
        "d_state": 16,
        "d_conv": 3,
        "expand": 2,
        "order": "cross",
        "merge": "sum",
        "drop_path": 0.2,
    }
)


class BareConv(nn.Module):
    """A convolution without bias, under the official name ``conv``."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolved map."""
        y: Tensor = self.conv(x)
        return y


class ResidualConvs(nn.Module):
    """Two convolutions with norms, and a projected shortcut where channels change (UNETR).

    The norms have no parameters, as in MONAI's UnetResBlock with its default norm.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int]) -> None:
        super().__init__()

        def conv(entry: int, size: Sequence[int]) -> BareConv:
            return BareConv(convolution(entry, out_channels, size, bias=False))

        self.conv1 = conv(in_channels, kernel)
        self.conv2 = conv(out_channels, kernel)
        self.norm = InstanceNorm(out_channels, affine=False)
        self.projects = in_channels != out_channels
        if self.projects:
            self.conv3 = conv(in_channels, (1,) * len(kernel))

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of ``out_channels``."""
        y = self.norm(self.conv1(x), slope=SLOPE, in_place=True)
        y = self.norm(self.conv2(y)) + (self.norm(self.conv3(x)) if self.projects else x)
        return functional.leaky_relu(y, SLOPE, inplace=True)


class SkipBlock(nn.Module):
    """A residual block under the official name ``layer``."""

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int]) -> None:
        super().__init__()
        self.layer = ResidualConvs(in_channels, out_channels, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of ``out_channels``."""
        y: Tensor = self.layer(x)
        return y


class UpBlock(nn.Module):
    """Transposed convolution, concatenation with the skip, residual block."""

    def __init__(
        self, below: int, channels: int, kernel: Sequence[int], stride: Sequence[int]
    ) -> None:
        super().__init__()
        step = tuple(stride)
        self.transp_conv = BareConv(
            TRANSPOSED[len(step)](below, channels, step, stride=step, bias=False)
        )
        self.conv_block = ResidualConvs(2 * channels, channels, kernel)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Return a map like ``skip``."""
        y: Tensor = self.conv_block(torch.cat((self.transp_conv(x), skip), dim=1))
        return y


class SwinUMamba(nn.Module):
    """Stem, VSS encoder, residual blocks on all skips, convolutional decoder.

    Stage 0 is the image, stage 1 the stem's output, the rest the encoder's; a head stands on
    every stage but the two deepest.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.deep_supervision = False
        self.stages = spec.stages
        widths, kernels, dimension = spec.features, spec.kernel_sizes, spec.dimension
        options, drop_path = scan_options(spec)
        self.stem = nn.Sequential(
            convolution(
                spec.in_channels, widths[0], stem_kernel(spec.strides[1]), stride=spec.strides[1]
            ),
            InstanceNorm(widths[0]),
        )
        self.vssm_encoder = VSSEncoder(
            widths[0],
            widths=widths[1:-1],
            blocks=spec.encoder_blocks[2:],
            strides=spec.strides[2:],
            drop_path=drop_path,
            mixer=spec.mixer,
            options=options,
        )
        entries = (spec.in_channels, *widths)
        for level in range(spec.stages - 1):
            block = SkipBlock(entries[level], widths[level], kernels[level])
            self.add_module(f"encoder{level + 1}", block)
            up = UpBlock(widths[level + 1], widths[level], kernels[level], spec.strides[level + 1])
            self.add_module(f"decoder{level + 2}", up)
        self.decoder1 = SkipBlock(widths[0], widths[0], kernels[0])
        self.out_layers = nn.ModuleList(
            BareConv(BareConv(pointwise(width, spec.out_channels, dimension)))
            for width in widths[:-2]
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits, or a list of them (highest resolution first) under deep supervision."""
        stem = self.stem(x)
        taps = [x, stem, *self.vssm_encoder(stem)]
        y = taps.pop()
        logits: list[Tensor] = []
        for level in reversed(range(self.stages - 1)):
            skip = self.get_submodule(f"encoder{level + 1}")(taps[level])
            y = self.get_submodule(f"decoder{level + 2}")(y, skip)
            if level == 0:
                y = self.decoder1(y)
            if level == 0 or (self.deep_supervision and level < len(self.out_layers)):
                logits.append(self.out_layers[level](y))
        return logits[::-1] if self.deep_supervision else logits[-1]


class PatchExpand(nn.Module):
    """Linear to one token per finer position, rearranged, then a norm.

    The linear's outputs are ordered (first axis, second axis, channel), channels fastest.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: Sequence[int]) -> None:
        super().__init__()
        self.stride = tuple(stride)
        self.expand = nn.Linear(in_channels, prod(stride) * out_channels, bias=False)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, *spatial · stride, out_channels) for (B, *spatial, in_channels)."""
        return self.norm(spread_neighbours(self.expand(x), self.stride))  # type: ignore[no-any-return]


class ExpandingDecoder(SupervisedDecoder):
    """Patch expanding, concatenation with the skip, linear, VSS blocks, head; deepest first.

    The last step goes from the patch embedding's resolution to the image's and has neither skip
    nor blocks.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        options, drop_path = scan_options(spec)
        steps = list(pairwise(reversed(spec.features)))
        strides = list(reversed(spec.strides))[: len(steps)]
        rates = iter(drop_rates(sum(spec.decoder_blocks), drop_path, 0.0))
        self.expand_layers = nn.ModuleList(
            PatchExpand(below, width, stride)
            for (below, width), stride in zip(steps, strides, strict=True)
        )
        self.concat_back_dim = nn.ModuleList(nn.Linear(2 * width, width) for _, width in steps[:-1])
        self.stages = nn.ModuleList(
            vss_stage(
                width, spec.dimension, [next(rates) for _ in range(count)], spec.mixer, options
            )
            for (_, width), count in zip(steps[:-1], spec.decoder_blocks, strict=False)
        )
        self.stages.append(VSSStage(()))
        self.seg_layers = nn.ModuleList(
            pointwise(width, spec.out_channels, spec.dimension) for _, width in steps
        )

    def forward(self, skips: list[Tensor]) -> list[Tensor]:
        """Return logits, highest resolution first; only those without deep supervision."""
        y = skips[-1].movedim(1, -1)
        logits: list[Tensor] = []
        last = len(self.stages) - 1
        for step, stage in enumerate(self.stages):
            y = self.expand_layers[step](y)
            if step < last:
                skip = skips[-(step + 2)].movedim(1, -1)
                y = self.concat_back_dim[step](torch.cat((y, skip), dim=-1))
            y = stage(y)
            if self.deep_supervision or step == last:
                logits.append(self.seg_layers[step](y.movedim(-1, 1)))
        return logits[::-1]


class SwinUMambaD(SupervisedNetwork):
    """VSS encoder on the image, decoder of VSS blocks and patch expanding."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        options, drop_path = scan_options(spec)
        self.vssm_encoder = VSSEncoder(
            spec.in_channels,
            widths=spec.features[1:],
            blocks=spec.encoder_blocks[1:],
            strides=spec.strides[1:],
            drop_path=drop_path,
            mixer=spec.mixer,
            options=options,
        )
        self.decoder = ExpandingDecoder(spec)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits, or a list of them (highest resolution first) under deep supervision."""
        return self.decode(self.vssm_encoder(x))


def spread_neighbours(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Turn (B, *spatial, prod(stride) · C) into (B, *spatial · stride, C)."""
    axes = range(len(stride))
    shape = x.shape[1:-1]
    split = x.reshape(x.shape[0], *shape, *stride, -1)
    pairs = [place for axis in axes for place in (1 + axis, 1 + len(stride) + axis)]
    sizes = [size * step for size, step in zip(shape, stride, strict=True)]
    return split.permute(0, *pairs, split.dim() - 1).reshape(x.shape[0], *sizes, -1)


def stem_kernel(stride: Sequence[int]) -> tuple[int, ...]:
    """7 along axes that the stem halves, 3 along those it keeps."""
    return tuple(STEM_KERNEL if step > 1 else 3 for step in stride)


def scan_options(spec: NetworkSpec) -> tuple[dict[str, Any], float]:
    """Return the keywords of the scan, and the rate of stochastic depth.

    Raises:
        PlanError: an unknown option, or a rate that is none.
    """
    options = read_options(spec, OPTIONS)
    rate = options.pop("drop_path")
    fits = isinstance(rate, (int, float)) and 0 <= rate < 1
    require(fits, spec, f"option drop_path is {rate!r}; give a number from 0 to below 1.")
    assert isinstance(rate, (int, float))
    return dict(options), float(rate)


def build(spec: NetworkSpec) -> nn.Module:
    """Build Swin-UMamba; the encoder starts as VMamba does, the rest as PyTorch does.

    Raises:
        PlanError: a topology or an option it cannot be built from.
    """
    check_spec(spec)
    require(
        spec.stages >= FEWEST_STAGES,
        spec,
        f"{spec.stages} stages planned, {FEWEST_STAGES} needed (image, stem, encoder). "
        "Use a larger patch.",
    )
    require(
        spec.features[-1] == spec.features[-2],
        spec,
        f"features end with {list(spec.features[-2:])}; the two deepest must be equal.",
    )
    return SwinUMamba(spec)


def build_d(spec: NetworkSpec) -> nn.Module:
    """Build Swin-UMamba-D with He initialisation of its convolutions.

    Raises:
        PlanError: a topology or an option it cannot be built from.
    """
    check_spec(spec)
    require(spec.stages >= 2, spec, f"{spec.stages} stage planned, at least 2 needed.")
    network = SwinUMambaD(spec)
    initialize_he(network)
    return network


def arrange(spec: NetworkSpec) -> NetworkSpec:
    """The official topology: six resolutions, each half the one above."""
    steps = len(WIDTHS) - 1
    return replace(
        spec,
        features=WIDTHS,
        strides=((1, 1),) + ((2, 2),) * steps,
        kernel_sizes=((3, 3),) * len(WIDTHS),
        encoder_blocks=(1, 1, *DEPTHS),
        decoder_blocks=(1,) * steps,
    )


def arrange_d(spec: NetworkSpec) -> NetworkSpec:
    """The official topology: the image, then a quarter, an eighth, down to 1 / 32."""
    steps = len(D_WIDTHS) - 1
    return replace(
        spec,
        features=D_WIDTHS,
        strides=((1, 1), (4, 4)) + ((2, 2),) * (steps - 1),
        kernel_sizes=((3, 3),) * len(D_WIDTHS),
        encoder_blocks=(0, *DEPTHS),
        decoder_blocks=(DECODER_DEPTH,) * (steps - 1) + (0,),
    )


SWIN_UMAMBA = NetworkDefinition(
    build=build,
    dimensions=frozenset({2}),
    arrange=arrange,
    source="Liu et al. 2024, Swin-UMamba (arXiv 2402.03302)",
    summary="VMamba-T encoder with ImageNet start, convolutional decoder",
)

SWIN_UMAMBA_D = NetworkDefinition(
    build=build_d,
    dimensions=frozenset({2}),
    arrange=arrange_d,
    source="Liu et al. 2024, Swin-UMamba† (arXiv 2402.03302)",
    summary="VMamba-T encoder with ImageNet start, decoder of VSS blocks",
)
