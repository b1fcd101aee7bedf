"""What a network is built from: sizes and options as plain values, no classes and no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Literal

from medmamba.files import RECORD_CONFIG

Mixer = Literal["mamba", "identity", "dwconv"]
OptionValue = bool | int | float | str | None | list[int]


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """A network, ready to be built.

    Args:
        name: key of ``medmamba.networks.NETWORKS``.
        in_channels: image channels (plus one-hot labels of a previous stage in a cascade).
        out_channels: classes including background, or number of regions.
        patch_size: voxels per axis the network is planned for; its length is the dimension.
        features: channels per stage, highest resolution first.
        strides: per stage, per axis; the first stage is all ones.
        kernel_sizes: per stage, per axis.
        encoder_blocks: blocks (or convolutions) per encoder stage.
        decoder_blocks: the same per decoder step, deepest first; one fewer than stages.
        mixer: what stands where the Mamba layers are (``identity`` and ``dwconv`` are the twins).
        options: the network's own options, checked by the network.
    """

    __pydantic_config__ = RECORD_CONFIG

    name: str
    in_channels: int
    out_channels: int
    patch_size: tuple[int, ...]
    features: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    encoder_blocks: tuple[int, ...]
    decoder_blocks: tuple[int, ...]
    mixer: Mixer = "mamba"
    options: Mapping[str, OptionValue] = field(default_factory=dict)

    @property
    def dimension(self) -> int:
        """2 or 3."""
        return len(self.patch_size)

    @property
    def stages(self) -> int:
        """Number of resolutions."""
        return len(self.features)

    @property
    def total_stride(self) -> tuple[int, ...]:
        """Product of strides per axis: the multiple a patch must have."""
        return tuple(prod(stage[axis] for stage in self.strides) for axis in range(self.dimension))
