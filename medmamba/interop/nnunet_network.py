"""The class that nnU-Net imports by the name our plans carry, so that it can train our networks.

nnU-Net calls it with channels, classes and the plan's ``arch_kwargs``, and switches deep
supervision through ``decoder.deep_supervision``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from medmamba.errors import PlanError
from medmamba.networks import build_network
from medmamba.networks.spec import Mixer, NetworkSpec, OptionValue


class _Switch:
    """Stands where nnU-Net looks for the decoder's switch; holds no parameters."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    @property
    def deep_supervision(self) -> bool:
        """Whether the network returns its lower resolutions too."""
        return bool(self._network.deep_supervision)

    @deep_supervision.setter
    def deep_supervision(self, wanted: bool) -> None:
        self._network.deep_supervision = wanted  # type: ignore[assignment]


class PlannedNetwork(nn.Module):
    """One of our networks, built from what nnU-Net hands over.

    Args:
        input_channels: image channels.
        num_classes: outputs.
        network: key of the registry.
        patch_size: voxels per axis.
        mixer: what stands where the Mamba layers are.
        options: the network's own.
        deep_supervision: initial state of the switch.
        features_per_stage: channels per stage.
        strides: per stage and axis.
        kernel_sizes: per stage and axis.
        n_conv_per_stage: encoder blocks.
        n_conv_per_stage_decoder: decoder blocks.
        ignored: keys that only convolutional networks of nnU-Net read.

    Raises:
        PlanError: there is no network of that name, or it cannot take the patch.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        network: str,
        patch_size: Sequence[int],
        features_per_stage: Sequence[int],
        strides: Sequence[Sequence[int]],
        kernel_sizes: Sequence[Sequence[int]],
        n_conv_per_stage: Sequence[int],
        n_conv_per_stage_decoder: Sequence[int],
        mixer: Mixer = "mamba",
        options: Mapping[str, OptionValue] | None = None,
        deep_supervision: bool = False,
        **ignored: Any,
    ) -> None:
        super().__init__()
        if len(patch_size) not in (2, 3):
            raise PlanError(f"patch {list(patch_size)}: two or three axes are needed.")
        self.network = build_network(
            NetworkSpec(
                name=network,
                in_channels=input_channels,
                out_channels=num_classes,
                patch_size=tuple(patch_size),
                features=tuple(features_per_stage),
                strides=tuple(tuple(stride) for stride in strides),
                kernel_sizes=tuple(tuple(kernel) for kernel in kernel_sizes),
                encoder_blocks=tuple(n_conv_per_stage),
                decoder_blocks=tuple(n_conv_per_stage_decoder),
                mixer=mixer,
                options=dict(options or {}),
            )
        )
        self.decoder = _Switch(self.network)
        self.decoder.deep_supervision = deep_supervision

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits (B, K, *spatial), or a list of them, highest resolution first."""
        logits: Tensor | list[Tensor] = self.network(x)
        return logits
