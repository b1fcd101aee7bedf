"""The visual state-space encoder: VMamba's blocks in stages, for maps of two or three axes.

Liu et al. 2024, "VMamba: visual state space model", in the first public version ("v0"), whose
ImageNet weights fit it in 2D under the same names. Strides are per axis, so that it follows a
plan. Maps are channels-last, (B, *spatial, C).
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any

from torch import Tensor, nn

from medmamba.networks.drop_path import DropPath, drop_rates
from medmamba.networks.mixer import make_twin
from medmamba.networks.spec import Mixer
from medmamba.networks.ssm import DirectionalScan

INITIAL_STD = 0.02
"""Of the truncated normal that fills the encoder's linear layers; its bounds are absolute."""

INITIAL_BOUND = 2.0


class VSSBlock(nn.Module):
    """Norm and directional scan in a residual branch; no feed-forward layer."""

    def __init__(self, channels: int, mixer: nn.Module, drop_rate: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(channels)
        self.self_attention = mixer
        self.drop_path = DropPath(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        mixed = self.self_attention(self.ln_1(x).flatten(1, -2), x.shape[1:-1])
        y: Tensor = x + self.drop_path(mixed.reshape(x.shape))
        return y


class VSSStage(nn.Module):
    """Blocks at one resolution."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        for block in self.blocks:
            x = block(x)
        return x


class PatchEmbed(nn.Module):
    """One token per patch: a convolution whose kernel is its stride, then a norm."""

    def __init__(self, in_channels: int, channels: int, stride: Sequence[int]) -> None:
        super().__init__()
        make = {2: nn.Conv2d, 3: nn.Conv3d}[len(stride)]
        self.proj = make(in_channels, channels, tuple(stride), stride=tuple(stride))  # type: ignore[arg-type]
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, *spatial / stride, channels) for (B, in_channels, *spatial)."""
        y: Tensor = self.norm(self.proj(x).movedim(1, -1))
        return y


class PatchMerging(nn.Module):
    """Gather the neighbours of each stride into one token, then norm and linear.

    Neighbours are ordered with the first axis fastest, as the official 2D code orders them.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: Sequence[int]) -> None:
        super().__init__()
        self.stride = tuple(stride)
        gathered = in_channels * prod(stride)
        self.norm = nn.LayerNorm(gathered)
        self.reduction = nn.Linear(gathered, out_channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, *spatial / stride, out_channels)."""
        y: Tensor = self.reduction(self.norm(gather_neighbours(x, self.stride)))
        return y


class VSSEncoder(nn.Module):
    """Patch embedding, then stages of VSS blocks with patch merging between them.

    Args:
        in_channels: of the map that is embedded.
        widths: channels per stage.
        blocks: VSS blocks per stage.
        strides: per stage and axis; the first one is the patch embedding's.
        drop_path: stochastic depth of the last block; it grows linearly from 0.
        mixer: the scan, or the twin that stands in its place.
        options: keywords of ``DirectionalScan``.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        widths: Sequence[int],
        blocks: Sequence[int],
        strides: Sequence[Sequence[int]],
        drop_path: float,
        mixer: Mixer,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(in_channels, widths[0], strides[0])
        rates = iter(drop_rates(sum(blocks), 0.0, drop_path))
        self.dimension = dimension = len(strides[0])
        self.layers = nn.ModuleList(
            vss_stage(width, dimension, [next(rates) for _ in range(count)], mixer, options)
            for width, count in zip(widths, blocks, strict=True)
        )
        self.downsamples = nn.ModuleList(
            PatchMerging(above, below, stride)
            for (above, below), stride in zip(pairwise(widths), strides[1:], strict=True)
        )
        initialize_vss(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return one map (B, C, *spatial) per stage, for x (B, in_channels, *spatial)."""
        y = self.patch_embed(x)
        maps: list[Tensor] = []
        for index, stage in enumerate(self.layers):
            y = stage(self.downsamples[index - 1](y) if index else y)
            maps.append(y.movedim(-1, 1))
        return maps


def vss_stage(
    channels: int,
    dimension: int,
    drop_rates: Sequence[float],
    mixer: Mixer,
    options: Mapping[str, Any],
) -> VSSStage:
    """Build one VSS block per drop rate; every second local scan runs backwards."""

    def scan(index: int) -> nn.Module:
        return make_twin(
            mixer,
            channels,
            dimension,
            lambda: DirectionalScan(channels, dimension, reverse=index % 2 == 1, **options),
        )

    return VSSStage(
        [VSSBlock(channels, scan(index), rate) for index, rate in enumerate(drop_rates)]
    )


def gather_neighbours(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Turn (B, *spatial, C) into (B, *spatial / stride, prod(stride) · C)."""
    axes = range(len(stride))
    sizes = [
        part
        for size, step in zip(x.shape[1:-1], stride, strict=True)
        for part in (size // step, step)
    ]
    split = x.reshape(x.shape[0], *sizes, x.shape[-1])
    kept = [1 + 2 * axis for axis in axes]
    inside = [2 + 2 * axis for axis in reversed(axes)]
    return split.permute(0, *kept, *inside, split.dim() - 1).flatten(1 + len(stride))


def initialize_vss(module: nn.Module) -> None:
    """Fill linear layers as VMamba does; scan tensors, norms and convolutions keep their own."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=INITIAL_STD, a=-INITIAL_BOUND, b=INITIAL_BOUND)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
