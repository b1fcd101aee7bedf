"""U-Mamba: nnU-Net's U-Net with Mamba after every encoder stage (Enc) or at the bottom (Bot).

Ma, Li and Wang 2024, "U-Mamba: enhancing long-range dependency for biomedical image
segmentation", in the form its code has had since March 2024, which is smaller than the first
release (``umamba_v1.py``) that the published figures belong to. Computed as that code computes:
no residual around a Mamba layer, and in Enc a scan over channels where a map has few voxels.

Shapes: x (batch, in_channels, *spatial); logits (batch, out_channels, *spatial).
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod

from torch import Tensor, nn
from torch.nn import functional

from medmamba.networks.blocks import (
    SLOPE,
    InstanceNorm,
    ResidualBlock,
    convolution,
    initialize_he,
    pointwise,
)
from medmamba.networks.definition import NetworkDefinition, read_options
from medmamba.networks.spec import NetworkSpec
from medmamba.networks.supervised import SupervisedDecoder, SupervisedNetwork
from medmamba.networks.token_layer import OPTIONS, MambaEncoder, TokenLayer
from medmamba.networks.unet import UNet, arrange_plain, decode, decoder_steps, require_unet

CHANNEL_TOKENS = "channel_tokens"
"""Option of Enc: scan over channels where a map has no more voxels than channels.

True is the official rule, which ties the weights to one patch size. False scans over voxels.
"""

ENC_OPTIONS = {**OPTIONS, CHANNEL_TOKENS: True}


class ShortcutBlock(nn.Module):
    """Two convolutions with norms beside a 1x1 convolution that has the stride and no norm."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int],
        stride: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        ones = (1,) * len(kernel)
        self.conv1 = convolution(in_channels, out_channels, kernel, stride=stride)
        self.norm1 = InstanceNorm(out_channels)
        self.conv2 = convolution(out_channels, out_channels, kernel)
        self.norm2 = InstanceNorm(out_channels)
        self.conv3 = convolution(in_channels, out_channels, ones, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of ``out_channels``, smaller by the stride."""
        y = self.norm1(self.conv1(x), slope=SLOPE, in_place=True)
        y = self.norm2(self.conv2(y)) + self.conv3(x)
        return functional.leaky_relu(y, SLOPE, inplace=True)


class NearestUpsample(nn.Module):
    """A 1x1 convolution, then nearest enlargement by whole factors.

    The official code enlarges first. The two commute, and this order costs 1 / prod(stride).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: Sequence[int]) -> None:
        super().__init__()
        self.conv = pointwise(in_channels, out_channels, len(stride))
        self.stride = tuple(float(factor) for factor in stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of ``out_channels``, larger by the stride."""
        return functional.interpolate(self.conv(x), scale_factor=self.stride, mode="nearest")


class NearestDecoder(SupervisedDecoder):
    """Nearest upsampling, concatenation with the skip, blocks, head; deepest step first.

    In 2D the last step has no skip: the official 2D file leaves it out.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        steps = list(decoder_steps(spec))
        self.uses_last_skip = spec.dimension != 2
        self.upsample_layers = nn.ModuleList(
            NearestUpsample(below, width, spec.strides[level + 1]) for level, below, width in steps
        )
        self.stages = nn.ModuleList(
            stack(
                blocks,
                (2 if level > 0 or self.uses_last_skip else 1) * width,
                width,
                spec.kernel_sizes[level],
            )
            for (level, _, width), blocks in zip(steps, spec.decoder_blocks, strict=True)
        )
        self.seg_layers = nn.ModuleList(
            pointwise(width, spec.out_channels, spec.dimension) for _, _, width in steps
        )

    def forward(self, skips: list[Tensor]) -> list[Tensor]:
        """Return logits, highest resolution first; only those without deep supervision."""
        steps = zip(self.upsample_layers, self.stages, self.seg_layers, strict=True)
        return decode(steps, skips, self.deep_supervision, last_skip=self.uses_last_skip)


class BottleneckUNet(SupervisedNetwork):
    """A U-Net with one token layer on its deepest map (U-Mamba Bot, present form)."""

    def __init__(
        self, encoder: nn.Module, mamba_layer: nn.Module, decoder: SupervisedDecoder
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.mamba_layer = mamba_layer
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits, or a list of them (highest resolution first) under deep supervision."""
        skips = self.encoder(x)
        skips[-1] = self.mamba_layer(skips[-1])
        return self.decode(skips)


def stack(
    blocks: int,
    in_channels: int,
    out_channels: int,
    kernel: Sequence[int],
    stride: Sequence[int] | None = None,
) -> nn.Sequential:
    """A shortcut block, then residual blocks; the first one carries the stride."""
    rest = [ResidualBlock(out_channels, out_channels, kernel) for _ in range(blocks - 1)]
    return nn.Sequential(ShortcutBlock(in_channels, out_channels, kernel, stride), *rest)


def reduce_blocks(spec: NetworkSpec) -> NetworkSpec:
    """One block instead of the plan's number in the deeper half, as the official code does.

    Encoder: stages from ceil(n / 2). Decoder: steps from ceil((n - 1) / 2 + 0.5), counted from
    the deepest. Applying it again changes nothing.
    """
    stages = spec.stages
    encoder_from = (stages + 1) // 2
    decoder_from = (stages + 1) // 2
    return replace(
        spec,
        encoder_blocks=tuple(
            1 if stage >= encoder_from else blocks
            for stage, blocks in enumerate(spec.encoder_blocks)
        ),
        decoder_blocks=tuple(
            1 if step >= decoder_from else blocks for step, blocks in enumerate(spec.decoder_blocks)
        ),
    )


def map_voxels(spec: NetworkSpec, stage: int) -> int:
    """Voxels of the map after a stage, for the planned patch."""
    shape = list(spec.patch_size)
    for strides in spec.strides[: stage + 1]:
        shape = [size // stride for size, stride in zip(shape, strides, strict=True)]
    return prod(shape)


def has_layer(spec: NetworkSpec, stage: int) -> bool:
    """Whether Enc has a Mamba layer after a stage: in 2D only every second, counted from the last.

    The official 2D file asks for stage odd XOR number of stages odd.
    """
    return spec.dimension == 3 or (stage % 2 == 1) != (spec.stages % 2 == 1)


def encoder_layer(spec: NetworkSpec, stage: int) -> nn.Module:
    """Return Enc's token layer after a stage, or an identity where it has none."""
    if not has_layer(spec, stage):
        return nn.Identity()
    channels, voxels = spec.features[stage], map_voxels(spec, stage)
    options = read_options(spec, ENC_OPTIONS)
    over_channels = options.pop(CHANNEL_TOKENS) and voxels <= channels
    options["reverse"] = stage % 2 == 1
    if over_channels:
        # A sequence of channels has no spatial order to walk in.
        options.update(order="raster", merge="sum")
    return TokenLayer(spec, channels, options, voxels=voxels if over_channels else None)


def build_encoder(spec: NetworkSpec, layers: list[nn.Module]) -> MambaEncoder:
    """Build the encoder of the present form; ``spec`` has its blocks reduced."""
    stem = stack(spec.encoder_blocks[0], spec.in_channels, spec.features[0], spec.kernel_sizes[0])
    widths = pairwise((spec.features[0], *spec.features))
    rows = zip(spec.encoder_blocks, widths, spec.kernel_sizes, spec.strides, strict=True)
    stages: list[nn.Module] = [
        stack(blocks, below, width, kernel, stride)
        for blocks, (below, width), kernel, stride in rows
    ]
    return MambaEncoder(stem, stages, layers)


def build_enc(spec: NetworkSpec) -> nn.Module:
    """Build U-Mamba Enc, present form."""
    require_unet(spec)
    spec = reduce_blocks(spec)
    layers = [encoder_layer(spec, stage) for stage in range(spec.stages)]
    network = UNet(build_encoder(spec, layers), NearestDecoder(spec))
    initialize_he(network)
    return network


def build_bot(spec: NetworkSpec) -> nn.Module:
    """Build U-Mamba Bot, present form."""
    require_unet(spec)
    spec = reduce_blocks(spec)
    encoder = build_encoder(spec, [nn.Identity() for _ in range(spec.stages)])
    layer = TokenLayer(spec, spec.features[-1], read_options(spec, OPTIONS))
    network = BottleneckUNet(encoder, layer, NearestDecoder(spec))
    initialize_he(network)
    return network


def arrange(spec: NetworkSpec) -> NetworkSpec:
    """Two blocks per stage in the upper half, one in the deeper half."""
    return reduce_blocks(arrange_plain(spec))


UMAMBA_ENC = NetworkDefinition(
    build=build_enc,
    dimensions=frozenset({2, 3}),
    arrange=arrange,
    source="Ma et al. 2024, U-Mamba (arXiv 2401.04722), code since 2024-03-27",
    summary="U-Net with a Mamba layer after its encoder stages; tied to its patch size",
)

UMAMBA_BOT = NetworkDefinition(
    build=build_bot,
    dimensions=frozenset({2, 3}),
    arrange=arrange,
    source="Ma et al. 2024, U-Mamba (arXiv 2401.04722), code since 2024-03-27",
    summary="U-Net with one Mamba layer at its bottom",
)
