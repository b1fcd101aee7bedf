"""U-Mamba as first released in January 2024: the networks behind its published figures.

Ma, Li and Wang 2024. nnU-Net's residual encoder with a token layer after every stage (Enc) or
on the deepest map (Bot), and a decoder of transposed convolutions and residual blocks. Blocks
per stage are the plan's, sequences are always voxels, nothing is tied to a patch size.
"""

from torch import Tensor, nn

from medmamba.networks.blocks import initialize_he, zero_last_norms
from medmamba.networks.definition import NetworkDefinition, read_options
from medmamba.networks.spec import NetworkSpec
from medmamba.networks.supervised import SupervisedDecoder, SupervisedNetwork
from medmamba.networks.token_layer import OPTIONS, MambaEncoder, TokenLayer, mix_voxels
from medmamba.networks.unet import (
    ResidualEncoder,
    TransposedDecoder,
    UNet,
    arrange_plain,
    require_unet,
)


class BottleneckUNetV1(SupervisedNetwork):
    """A U-Net whose own children ``ln`` and ``mamba`` mix its deepest map."""

    def __init__(self, encoder: nn.Module, layer: TokenLayer, decoder: SupervisedDecoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.ln = layer.norm
        self.mamba = layer.mamba
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits, or a list of them (highest resolution first) under deep supervision."""
        skips = self.encoder(x)
        skips[-1] = mix_voxels(skips[-1], self.ln, self.mamba)
        return self.decode(skips)


def build_enc(spec: NetworkSpec) -> nn.Module:
    """Build U-Mamba Enc; every residual block starts as its shortcut."""
    require_unet(spec)
    options = read_options(spec, OPTIONS)
    residual = ResidualEncoder(spec)
    layers: list[nn.Module] = [
        TokenLayer(spec, width, {**options, "reverse": stage % 2 == 1})
        for stage, width in enumerate(spec.features)
    ]
    encoder = MambaEncoder(residual.stem, list(residual.stages), layers)
    network = UNet(encoder, TransposedDecoder(spec, residual=True))
    initialize_he(network)
    zero_last_norms(network)
    return network


def build_bot(spec: NetworkSpec) -> nn.Module:
    """Build U-Mamba Bot. Unlike in Enc, the official code leaves the last norms at one."""
    require_unet(spec)
    layer = TokenLayer(spec, spec.features[-1], read_options(spec, OPTIONS))
    network = BottleneckUNetV1(ResidualEncoder(spec), layer, TransposedDecoder(spec, residual=True))
    initialize_he(network)
    return network


UMAMBA_ENC_V1 = NetworkDefinition(
    build=build_enc,
    dimensions=frozenset({2, 3}),
    arrange=arrange_plain,
    source="Ma et al. 2024, U-Mamba (arXiv 2401.04722), first code release",
    summary="residual U-Net with a Mamba layer after every encoder stage; published figures",
)

UMAMBA_BOT_V1 = NetworkDefinition(
    build=build_bot,
    dimensions=frozenset({2, 3}),
    arrange=arrange_plain,
    source="Ma et al. 2024, U-Mamba (arXiv 2401.04722), first code release",
    summary="residual U-Net with one Mamba layer at its bottom; published figures",
)
