"""U-Mamba's layer of norm and Mamba on a feature map, and the encoder that holds such layers."""

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor, nn

from medmamba.networks.mixer import make_mixer
from medmamba.networks.spec import NetworkSpec, OptionValue

OPTIONS: Mapping[str, OptionValue] = MappingProxyType(
    {"d_state": 16, "d_conv": 4, "expand": 2, "order": "raster", "merge": "sum"}
)
"""Options of every U-Mamba: the sizes of its Mamba blocks, and the order of their scan."""


class TokenLayer(nn.Module):
    """Layer norm and Mamba over the voxels of a map, without a residual.

    Args:
        spec: gives the mixer and the dimension.
        channels: of the map.
        options: keywords of ``Mamba``; ``reverse`` only matters to a local bidirectional scan,
            which goes backwards in every second layer.
        voxels: of the map, when its channels are the tokens; None makes voxels the tokens.
    """

    def __init__(
        self,
        spec: NetworkSpec,
        channels: int,
        options: Mapping[str, OptionValue],
        *,
        voxels: int | None = None,
    ) -> None:
        super().__init__()
        self.voxels = voxels
        width, dimension = (channels, spec.dimension) if voxels is None else (voxels, 1)
        self.norm = nn.LayerNorm(width)
        self.mamba = make_mixer(spec.mixer, width, dimension, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        if self.voxels is None:
            return mix_voxels(x, self.norm, self.mamba)
        y: Tensor = self.mamba(self.norm(x.flatten(2)), (x.shape[1],))
        return y.reshape(x.shape)


def mix_voxels(x: Tensor, norm: nn.Module, mixer: nn.Module) -> Tensor:
    """Apply a norm and a mixer to the voxels of (batch, channels, *spatial) as tokens."""
    tokens = norm(x.flatten(2).transpose(1, 2))
    y: Tensor = mixer(tokens, tuple(x.shape[2:]))
    mixed = y.transpose(1, 2).view(x.shape)
    # Convolutions that follow keep the memory format they had.
    return mixed.contiguous() if x.is_contiguous() else mixed


class MambaEncoder(nn.Module):
    """Stem, then per stage convolutions and a token layer, whose output is also the skip."""

    def __init__(self, stem: nn.Module, stages: list[nn.Module], layers: list[nn.Module]) -> None:
        super().__init__()
        self.stem = stem
        self.mamba_layers = nn.ModuleList(layers)
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return one map per stage, highest resolution first."""
        x = self.stem(x)
        maps: list[Tensor] = []
        for stage, layer in zip(self.stages, self.mamba_layers, strict=True):
            x = layer(stage(x))
            maps.append(x)
        return maps
