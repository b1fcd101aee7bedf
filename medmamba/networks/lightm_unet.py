"""LightM-UNet: a small U-Net of Mamba layers, in the official form and in ours.

Liao et al. 2024, "LightM-UNet: Mamba assists in lightweight UNet for medical image
segmentation", section 3. ``lightm_unet`` computes what the official code computes, which differs
from the paper (plain Mamba without an inner norm; group norms around each layer). ``_s`` and
``_m`` have 8 and 16 filters; ``_plan`` takes strides, kernels and the number of stages from
the plan. Maps are channels-last inside, (B, *spatial, C), so that tokens are a view.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from medmamba.kernels.linear import linear
from medmamba.networks.channels_last import (
    TokenNorm,
    depthwise_conv,
    max_pool,
    upsample_linear,
)
from medmamba.networks.definition import NetworkDefinition, check_spec, read_options, require
from medmamba.networks.group_norm import GroupNormReLU
from medmamba.networks.mixer import make_mixer
from medmamba.networks.spec import NetworkSpec, OptionValue
from medmamba.networks.ssm import Mamba

OFFICIAL_FILTERS, SMALL_FILTERS, MEDIUM_FILTERS = 32, 8, 16
OFFICIAL_BLOCKS = (1, 2, 2, 4)
"""Residual Mamba blocks per stage (trainer of the official code); deeper stages repeat the last."""

WIDEST = 256
"""Widest stage of the planned form: the official network's deepest."""

GROUPS = 8

OPTIONS: Mapping[str, OptionValue] = {
    "d_state": 16,
    "d_conv": 4,
    "expand": 2,
    "order": "raster",
    "merge": "sum",
    "stem_stride": 1,
}


ConvMaker = Callable[..., nn.Conv2d | nn.Conv3d]


class Conv(nn.Module):
    """A pointwise convolution, or a depthwise one where there is a kernel, named ``conv``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int],
        *,
        groups: int = 1,
        bias: bool = False,
        stride: int = 1,
    ) -> None:
        super().__init__()
        make: ConvMaker = nn.Conv2d if len(kernel) == 2 else nn.Conv3d
        self.is_pointwise = groups == 1 and max(kernel) == 1
        self.stride = stride
        self.conv = make(in_channels, out_channels, tuple(kernel), groups=groups, bias=bias)

    @property
    def matrix(self) -> Tensor:
        """The weight of a kernel-1 convolution as a matrix (out, in / groups)."""
        return self.conv.weight.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, *spatial / stride, out_channels) for a map (B, *spatial, in_channels)."""
        if self.is_pointwise:
            return linear(x, self.matrix, self.conv.bias)
        return depthwise_conv(x, self.conv.weight, stride=self.stride)


class MambaLayer(nn.Module):
    """Norm, Mamba, scaled shortcut, the same norm again, linear (the paper's RVM layer)."""

    def __init__(self, in_channels: int, out_channels: int, mixer: nn.Module) -> None:
        super().__init__()
        self.skip_scale = nn.Parameter(torch.ones(1))
        self.norm = TokenNorm(in_channels)
        self.mamba = mixer
        self.proj = nn.Linear(in_channels, out_channels)

    def forward(self, x: Tensor, entry: GroupNormReLU | None = None) -> Tensor:
        """Return (B, *spatial, out_channels), of ``entry(x)`` where there is one."""
        tokens, shape = x.flatten(1, -2), x.shape[1:-1]
        if isinstance(self.mamba, Mamba) and self.mamba.layer_chunk(tokens):
            enter = entry.by_token(x) if entry is not None else nn.Identity()
            y = self.mamba.around(
                tokens,
                lambda part: self.norm(enter(part)),
                lambda mixed, part: self._finish(mixed, enter(part)),
            )
        else:
            tokens = tokens if entry is None else entry(x).flatten(1, -2)
            y = self._finish(self.mamba(self.norm(tokens), shape), tokens)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _finish(self, mixed: Tensor, tokens: Tensor) -> Tensor:
        mixed = self.norm(torch.addcmul(mixed, tokens, self.skip_scale))
        return linear(mixed, self.proj.weight, self.proj.bias)


class ResidualMambaBlock(nn.Module):
    """Twice group norm, ReLU and Mamba layer, beside the identity."""

    def __init__(self, channels: int, mixers: tuple[nn.Module, nn.Module]) -> None:
        super().__init__()
        self.norm1 = GroupNormReLU(GROUPS, channels)
        self.norm2 = GroupNormReLU(GROUPS, channels)
        # Mamba layers despite their name; the official state dict calls them so.
        self.conv1 = MambaLayer(channels, channels, mixers[0])
        self.conv2 = MambaLayer(channels, channels, mixers[1])

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        y: Tensor = self.conv2(self.conv1(x, self.norm1), self.norm2)
        # In place where nothing is recorded: a new map costs its pages.
        return y + x if torch.is_grad_enabled() else y.add_(x)


class UpBlock(nn.Module):
    """Group norm, ReLU, depthwise-separable convolution, scaled shortcut, group norm, ReLU."""

    def __init__(self, channels: int, kernel: Sequence[int]) -> None:
        super().__init__()
        self.skip_scale = nn.Parameter(torch.ones(1))
        self.norm1 = GroupNormReLU(GROUPS, channels)
        self.norm2 = GroupNormReLU(GROUPS, channels)
        ones = (1,) * len(kernel)
        self.conv = nn.Sequential(
            Conv(channels, channels, kernel, groups=channels), Conv(channels, channels, ones)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        y: Tensor = self.norm2(torch.addcmul(self.conv(self.norm1(x)), x, self.skip_scale))
        return y


class MaxPool(nn.Module):
    """Maximum over windows of one stride."""

    def __init__(self, stride: Sequence[int]) -> None:
        super().__init__()
        self.stride = tuple(stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, *spatial / stride, C)."""
        return max_pool(x, self.stride)


class LightMUNet(nn.Module):
    """The network, for any strides; x and logits are (B, C, *spatial)."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        options = read_options(spec, OPTIONS)
        self.stem_stride = stem_stride(spec)
        self.deep_supervision = False
        self.strides = spec.strides
        options.pop("stem_stride")

        def mixer(channels: int, *, reverse: bool = False) -> nn.Module:
            return make_mixer(spec.mixer, channels, spec.dimension, reverse=reverse, **options)

        def block(channels: int) -> nn.Module:
            return ResidualMambaBlock(channels, (mixer(channels), mixer(channels, reverse=True)))

        ones = (1,) * spec.dimension
        entry, features = spec.in_channels, spec.features
        self.convInit = nn.Sequential(
            Conv(entry, entry, spec.kernel_sizes[0], groups=entry, stride=self.stem_stride),
            Conv(entry, features[0], ones),
        )
        changes: list[nn.Module] = [nn.Identity()]
        changes += [
            nn.Sequential(MambaLayer(above, below, mixer(above)), MaxPool(stride))
            for (above, below), stride in zip(pairwise(features), spec.strides[1:], strict=True)
        ]
        self.down_layers = nn.ModuleList(
            nn.Sequential(change, *(block(width) for _ in range(blocks)))
            for change, width, blocks in zip(changes, features, spec.encoder_blocks, strict=True)
        )
        steps = list(zip(reversed(list(pairwise(features))), spec.decoder_blocks, strict=True))
        kernels = spec.kernel_sizes[-2::-1]
        self.up_layers = nn.ModuleList(
            nn.Sequential(*(UpBlock(width, kernel) for _ in range(blocks)))
            for ((width, _), blocks), kernel in zip(steps, kernels, strict=True)
        )
        self.up_samples = nn.ModuleList(
            nn.Sequential(Conv(below, width, ones)) for (width, below), _ in steps
        )
        scale = Conv(features[0], features[0], ones, groups=features[0], bias=True)
        head = Conv(features[0], spec.out_channels, ones, bias=True)
        self.conv_final = nn.Sequential(
            GroupNormReLU(GROUPS, features[0]), nn.Identity(), nn.Sequential(scale, head)
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits (B, K, *spatial), in a list under deep supervision."""
        y: Tensor = self.convInit(x.movedim(1, -1).contiguous())
        skips: list[Tensor] = []
        for layer in self.down_layers:
            y = layer(y)
            skips.append(y)
        skips.pop()
        for step, (shrink, layer) in enumerate(zip(self.up_samples, self.up_layers, strict=True)):
            stride = self.strides[len(self.strides) - 1 - step]
            y = layer(upsample_linear(shrink(y), stride) + skips.pop())
        logits = self._head(self.conv_final[0](y))
        if self.stem_stride > 1:
            logits = upsample_linear(logits, (self.stem_stride,) * len(self.strides[0]))
        out = logits.movedim(-1, 1)
        return [out] if self.deep_supervision else out

    def _head(self, x: Tensor) -> Tensor:
        # Scale and shift per channel, then mix: one matrix product, without the map between.
        scale, head = cast(Iterable[Conv], self.conv_final[2])
        assert scale.conv.bias is not None and head.conv.bias is not None
        matrix = head.matrix * scale.conv.weight.flatten()
        return linear(x, matrix, head.matrix @ scale.conv.bias + head.conv.bias)


def build(spec: NetworkSpec) -> nn.Module:
    """Build a LightM-UNet with PyTorch's default initialisation, as the official code does.

    Raises:
        PlanError: widths that are no multiple of 8, or an option that does not exist.
    """
    check_spec(spec)
    wrong = [width for width in spec.features if width % GROUPS]
    require(not wrong, spec, f"features {wrong} must be multiples of {GROUPS} (group norm).")
    return LightMUNet(spec)


def divisor(spec: NetworkSpec) -> tuple[int, ...]:
    """Product of strides per axis, times the stride of the stem."""
    return tuple(stem_stride(spec) * total for total in spec.total_stride)


def stem_stride(spec: NetworkSpec) -> int:
    """Return the option of that name: how much coarser than the patch the first stage is.

    Raises:
        PlanError: it is no positive whole number.
    """
    value = read_options(spec, OPTIONS)["stem_stride"]
    fits = isinstance(value, int) and value >= 1
    require(fits, spec, f"option stem_stride is {value!r}; give a whole number from 1.")
    assert isinstance(value, int)
    return value


def arrange_fixed(spec: NetworkSpec, filters: int) -> NetworkSpec:
    """Four stages, strides of 2 on every axis, kernels of 3, widths doubling from ``filters``."""
    stages, dimension = len(OFFICIAL_BLOCKS), spec.dimension
    return replace(
        spec,
        features=tuple(filters * 2**stage for stage in range(stages)),
        strides=((1,) * dimension,) + ((2,) * dimension,) * (stages - 1),
        kernel_sizes=((3,) * dimension,) * stages,
        encoder_blocks=OFFICIAL_BLOCKS,
        decoder_blocks=(1,) * (stages - 1),
    )


def arrange_plan(spec: NetworkSpec) -> NetworkSpec:
    """Strides, kernels and stages of the plan; widths doubling from 16 up to 256."""
    deeper = max(0, spec.stages - len(OFFICIAL_BLOCKS))
    blocks = OFFICIAL_BLOCKS + OFFICIAL_BLOCKS[-1:] * deeper
    return replace(
        spec,
        features=tuple(min(MEDIUM_FILTERS * 2**stage, WIDEST) for stage in range(spec.stages)),
        encoder_blocks=blocks[: spec.stages],
        decoder_blocks=(1,) * (spec.stages - 1),
    )


def _definition(filters: int, summary: str) -> NetworkDefinition:
    return NetworkDefinition(
        build=build,
        dimensions=frozenset({2, 3}),
        arrange=lambda spec: arrange_fixed(spec, filters),
        divisor=divisor,
        source="Liao et al. 2024, LightM-UNet (arXiv 2403.05246)",
        summary=summary,
    )


LIGHTM_UNET = _definition(OFFICIAL_FILTERS, "official form: 32 filters, every stage halves")
LIGHTM_UNET_S = _definition(SMALL_FILTERS, "8 filters, 0.4 M parameters: the default on CPU")
LIGHTM_UNET_M = _definition(MEDIUM_FILTERS, "16 filters, 1.3 M parameters")
LIGHTM_UNET_PLAN = replace(
    LIGHTM_UNET_M,
    arrange=arrange_plan,
    summary="16 filters, strides, kernels and number of stages from the plan",
)
