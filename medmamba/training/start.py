"""What a run begins with instead of fresh weights, and what it keeps fixed at first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medmamba.files import hash_values

if TYPE_CHECKING:
    from torch import nn

FROZEN_EPOCHS, FROZEN_OF = 10, 1000
"""Swin-UMamba's trainers keep the pretrained encoder fixed for 10 of 1000 epochs."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Weights for the first step of a run. A resumed run has its own and only keeps the freezing.

    Args:
        source: file the weights come from, for records.
        identity: JSON values that tell this start from others; a run is only resumed with its own.
        fill: puts the weights into a fresh network and returns a record of what it did.
        frozen: names the parameters of a network that are fixed at first.
        frozen_epochs: how long; None is a hundredth of the run, at most ``FROZEN_EPOCHS``.
    """

    source: str
    identity: tuple[Any, ...]
    fill: "Callable[[nn.Module], dict[str, Any]]"
    frozen: "Callable[[nn.Module], Sequence[str]]"
    frozen_epochs: int | None = None

    @property
    def key(self) -> str:
        """Hash of what makes this start another than others."""
        return hash_values([*self.identity, self.frozen_epochs])

    def epochs_frozen(self, epochs: int) -> int:
        """Return for how many epochs of a run of ``epochs`` parameters stay fixed."""
        if self.frozen_epochs is not None:
            return self.frozen_epochs
        return min(FROZEN_EPOCHS, epochs * FROZEN_EPOCHS // FROZEN_OF)


class Freezing:
    """Parameters that get no gradient, and so no update and no decay, in the first epochs."""

    def __init__(self, network: "nn.Module", start: Start | None, epochs: int) -> None:
        names = set(start.frozen(network)) if start is not None else set()
        self._until = start.epochs_frozen(epochs) if start is not None else 0
        self._parameters = [p for name, p in network.named_parameters() if name in names]

    def apply(self, epoch: int) -> None:
        """Fix or release the parameters for an epoch."""
        for parameter in self._parameters:
            parameter.requires_grad_(epoch >= self._until)
