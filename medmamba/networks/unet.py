"""The convolutional baselines: nnU-Net's planned U-Net and its residual-encoder form.

Weights carry the names of nnU-Net's PlainConvUNet and ResidualEncoderUNet, without their
duplicates. The encoders and decoders here are also those of the first U-Mamba.

Shapes: x (batch, in_channels, *spatial); logits (batch, out_channels, *spatial).
Sources: Isensee et al. 2021 (nnU-Net); Isensee et al. 2024 (residual encoder).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from medmamba.networks.blocks import (
    TRANSPOSED,
    StackedConvs,
    StackedResiduals,
    initialize_he,
    pointwise,
    zero_last_norms,
)
from medmamba.networks.definition import (
    NetworkDefinition,
    check_spec,
    read_options,
    require,
)
from medmamba.networks.spec import NetworkSpec
from medmamba.networks.supervised import SupervisedDecoder, SupervisedNetwork

PLAIN_BLOCKS = 2
"""Convolutions per stage of nnU-Net's default planner, encoder and decoder."""

RESIDUAL_BLOCKS = (1, 3, 4, 6)
"""Residual blocks per encoder stage of nnU-Net's ResEnc planners; 6 for all further stages."""


class PlainEncoder(nn.Module):
    """Stages of convolution blocks; returns every stage's output."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        widths = pairwise((spec.in_channels, *spec.features))
        rows = zip(spec.encoder_blocks, widths, spec.kernel_sizes, spec.strides, strict=True)
        # The inner Sequential is the place of a pooling layer that nnU-Net no longer plans.
        self.stages = nn.Sequential(
            *(
                nn.Sequential(StackedConvs(blocks, below, width, kernel, stride))
                for blocks, (below, width), kernel, stride in rows
            )
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return one map per stage, highest resolution first."""
        return list(run_stages(self.stages, x))


class ResidualEncoder(nn.Module):
    """A convolution block as stem, then stages of residual blocks; returns every stage's output."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.stem = StackedConvs(1, spec.in_channels, spec.features[0], spec.kernel_sizes[0])
        widths = pairwise((spec.features[0], *spec.features))
        rows = zip(spec.encoder_blocks, widths, spec.kernel_sizes, spec.strides, strict=True)
        self.stages = nn.Sequential(
            *(
                StackedResiduals(blocks, below, width, kernel, stride)
                for blocks, (below, width), kernel, stride in rows
            )
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return one map per stage, highest resolution first."""
        return list(run_stages(self.stages, self.stem(x)))


class TransposedDecoder(SupervisedDecoder):
    """Transposed convolution, concatenation with the skip, blocks, head; deepest step first.

    Args:
        residual: residual blocks instead of plain convolution blocks.
    """

    def __init__(self, spec: NetworkSpec, *, residual: bool = False) -> None:
        super().__init__()
        block = StackedResiduals if residual else StackedConvs
        steps = list(decoder_steps(spec))
        self.stages = nn.ModuleList(
            block(blocks, 2 * width, width, spec.kernel_sizes[level])
            for (level, _, width), blocks in zip(steps, spec.decoder_blocks, strict=True)
        )
        self.transpconvs = nn.ModuleList(
            TRANSPOSED[spec.dimension](below, width, stride, stride)
            for (level, below, width) in steps
            for stride in (spec.strides[level + 1],)
        )
        self.seg_layers = nn.ModuleList(
            pointwise(width, spec.out_channels, spec.dimension) for _, _, width in steps
        )

    def forward(self, skips: list[Tensor]) -> list[Tensor]:
        """Return logits, highest resolution first; only those without deep supervision."""
        steps = zip(self.transpconvs, self.stages, self.seg_layers, strict=True)
        return decode(steps, skips, self.deep_supervision)


class UNet(SupervisedNetwork):
    """An encoder that returns its stages and a decoder that turns them into logits."""

    def __init__(self, encoder: nn.Module, decoder: SupervisedDecoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits, or a list of them (highest resolution first) under deep supervision."""
        return self.decode(self.encoder(x))


def decode(
    steps: Iterable[tuple[nn.Module, nn.Module, nn.Module]],
    skips: Sequence[Tensor],
    deep_supervision: bool,
    *,
    last_skip: bool = True,
) -> list[Tensor]:
    """Go up from the deepest map: enlarge, concatenate with the skip, convolve, segment.

    Args:
        steps: (enlargement, stage, head) of every step, deepest first.
        skips: one map per stage of the encoder, highest resolution first.
        deep_supervision: segment at every step, else at the last one.
        last_skip: whether the last step has a skip.

    Returns:
        Logits, highest resolution first.
    """
    x = skips[-1]
    logits: list[Tensor] = []
    for (enlarge, stage, head), skip in zip(steps, skips[-2::-1], strict=True):
        x = enlarge(x)
        is_last = skip is skips[0]
        if last_skip or not is_last:
            x = torch.cat((x, skip), dim=1)
        x = stage(x)
        if deep_supervision or is_last:
            logits.append(head(x))
    return logits[::-1]


def run_stages(stages: nn.Sequential, x: Tensor) -> Iterator[Tensor]:
    """Yield the output of every stage of a chain."""
    for stage in stages:
        x = stage(x)
        yield x


def decoder_steps(spec: NetworkSpec) -> Iterator[tuple[int, int, int]]:
    """Yield (stage reached, channels coming from below, channels there), deepest step first."""
    for level in range(spec.stages - 2, -1, -1):
        yield level, spec.features[level + 1], spec.features[level]


def require_unet(spec: NetworkSpec) -> None:
    """Refuse a topology that an encoder and decoder cannot be built from.

    Raises:
        PlanError: lists that do not belong together, or fewer than two stages.
    """
    check_spec(spec)
    require(
        spec.stages >= 2,
        spec,
        f"{spec.stages} stage planned, at least 2 needed. Use a larger patch.",
    )


def build_plain(spec: NetworkSpec) -> nn.Module:
    """Build nnU-Net's PlainConvUNet with He initialisation."""
    require_unet(spec)
    read_options(spec, {})
    network = UNet(PlainEncoder(spec), TransposedDecoder(spec))
    initialize_he(network)
    return network


def build_residual(spec: NetworkSpec) -> nn.Module:
    """Build nnU-Net's ResidualEncoderUNet; every residual block starts as its shortcut."""
    require_unet(spec)
    read_options(spec, {})
    network = UNet(ResidualEncoder(spec), TransposedDecoder(spec))
    initialize_he(network)
    zero_last_norms(network)
    return network


def arrange_plain(spec: NetworkSpec) -> NetworkSpec:
    """Two convolutions per stage."""
    return replace(
        spec,
        encoder_blocks=(PLAIN_BLOCKS,) * spec.stages,
        decoder_blocks=(PLAIN_BLOCKS,) * (spec.stages - 1),
    )


def arrange_residual(spec: NetworkSpec) -> NetworkSpec:
    """Blocks (1, 3, 4, 6, 6, ...) in the encoder, one convolution per decoder step."""
    deeper = max(0, spec.stages - len(RESIDUAL_BLOCKS))
    blocks = RESIDUAL_BLOCKS + RESIDUAL_BLOCKS[-1:] * deeper
    return replace(
        spec, encoder_blocks=blocks[: spec.stages], decoder_blocks=(1,) * (spec.stages - 1)
    )


PLAIN_UNET = NetworkDefinition(
    build=build_plain,
    dimensions=frozenset({2, 3}),
    arrange=arrange_plain,
    source="Isensee et al. 2021, nnU-Net (PlainConvUNet)",
    summary="nnU-Net's planned U-Net, the baseline of the field",
    has_twins=False,
)

RESENC_UNET = NetworkDefinition(
    build=build_residual,
    dimensions=frozenset({2, 3}),
    arrange=arrange_residual,
    source="Isensee et al. 2024, nnU-Net Revisited (ResidualEncoderUNet)",
    summary="nnU-Net's U-Net with a residual encoder",
    has_twins=False,
)
