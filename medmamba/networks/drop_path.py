"""Stochastic depth: leave out a residual branch for some samples of a training batch."""

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Zero a branch for each sample with probability ``rate`` in training, scaled to its mean.

    Huang et al. 2016, "Deep networks with stochastic depth". Evaluation leaves branches alone.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` or, for samples left out, zeros."""
        if not self.training or self.rate == 0.0:
            return x
        kept = 1.0 - self.rate
        draws = torch.rand(x.shape[0], *(1,) * (x.dim() - 1), device=x.device) < kept
        return x * (draws.to(x.dtype) / kept)


def drop_rates(count: int, first: float, last: float) -> list[float]:
    """Return rates that grow linearly over ``count`` blocks."""
    if count == 1:
        return [first]
    return [first + (last - first) * index / (count - 1) for index in range(count)]
