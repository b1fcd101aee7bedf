"""The compiled instance norm: hands pointers of dense channels-last maps to `_native`."""

from __future__ import annotations

import torch
from torch import Tensor

from medmamba.kernels import _native
from medmamba.kernels.native_call import TYPES, call, pointer_of


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, slope: float, out: Tensor
) -> None:
    """See ``instance_norm.normalize``; ``out`` may be ``x``."""
    batch, channels = x.shape[:2]
    scale = None if weight is None else weight.to(torch.float32).contiguous()
    offset = None if bias is None else bias.to(torch.float32).contiguous()
    values = [batch, x[0, 0].numel(), channels, TYPES[x.dtype], pointer_of(x), pointer_of(out)]
    values += [pointer_of(scale), pointer_of(offset)]
    call(_native.norm, values, eps, slope)
