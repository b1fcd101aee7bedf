"""A linear layer over many tokens of few channels, with the fast form of its weight gradient."""

import torch
from torch import Tensor
from torch.nn import functional

from medmamba.kernels.placement import on_cpu


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``functional.linear``, whose weight gradient is also fast for few channels on CPU.

    That gradient is a product of two tall matrices. Written as gᵀx it takes MKL 47 ms for
    179 200 tokens of 8 to 32 channels, as xᵀg 5 ms; torch chooses by the layout of the weight.
    """
    if weight.shape[0] <= weight.shape[1] or not on_cpu(x):
        return functional.linear(x, weight, bias)
    y = x @ weight.t().contiguous()
    return y if bias is None else y + bias.to(y.dtype)


def compute_dtype(tokens: Tensor) -> torch.dtype:
    """The type in which autocast would multiply these tokens; float64 stays."""
    kind = tokens.device.type
    if torch.is_autocast_enabled(kind) and tokens.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return tokens.dtype
