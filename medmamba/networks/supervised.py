"""The switch of deep supervision, where nnU-Net has it: on the decoder."""

from torch import Tensor, nn


class SupervisedDecoder(nn.Module):
    """A decoder that returns logits, highest resolution first; only those when not supervised.

    Heads of all resolutions exist either way, so that weights fit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.deep_supervision = False


class SupervisedNetwork(nn.Module):
    """A network whose last part is ``decoder``; the switch may be set here or there."""

    decoder: SupervisedDecoder

    @property
    def deep_supervision(self) -> bool:
        """Whether logits of all resolutions are returned, as a list."""
        return self.decoder.deep_supervision

    @deep_supervision.setter
    def deep_supervision(self, wanted: bool) -> None:
        self.decoder.deep_supervision = wanted

    def decode(self, maps: list[Tensor]) -> Tensor | list[Tensor]:
        """Return logits of the encoder's maps, or a list of them under deep supervision."""
        logits: list[Tensor] = self.decoder(maps)
        return logits if self.deep_supervision else logits[0]
