"""The compiled causal convolution: hands pointers and strides of torch tensors to `_native`."""

from __future__ import annotations

import torch
from torch import Tensor

from medmamba.kernels import _native
from medmamba.kernels.native_call import NO_ROWS, call, pointer_of, readable, rows_of


def forward(x: Tensor, weight: Tensor, bias: Tensor, history: Tensor | None) -> Tensor:
    """See ``causal_conv.conv_silu``."""
    values, keep = _inputs(x, weight, bias, history)
    out = torch.empty(x.shape, dtype=x.dtype)
    call(_native.conv_forward, [*values, *rows_of(out)])
    del keep
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    history: Tensor | None,
    following: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``causal_conv.conv_silu_backward``: gradients of x, weight, bias and the first sums."""
    values, keep = _inputs(x, weight, bias, history)
    channels, taps = weight.shape
    grad = readable(grad)
    behind = None if following is None else following.float().contiguous()
    grad_x = torch.empty(x.shape, dtype=x.dtype)
    first = torch.empty((x.shape[0], taps - 1, channels))
    grad_weight, grad_bias = torch.empty((channels, taps)), torch.empty(channels)
    values += [*rows_of(grad), *rows_of(grad_x), pointer_of(behind)]
    values += [pointer_of(first), pointer_of(grad_weight), pointer_of(grad_bias)]
    call(_native.conv_backward, values)
    del keep
    return grad_x, grad_weight, grad_bias, first


def _inputs(
    x: Tensor, weight: Tensor, bias: Tensor, history: Tensor | None
) -> tuple[list[int], list[Tensor]]:
    """The list both directions begin with, and the tensors that must outlive the call."""
    x = readable(x)
    taps = weight.float().contiguous()
    offset = bias.float().contiguous()
    edge = None if history is None else history.float().contiguous()
    values = [*x.shape, taps.shape[1], *(rows_of(x) if x.numel() else NO_ROWS)]
    values += [pointer_of(taps), pointer_of(offset), pointer_of(edge)]
    keep = [tensor for tensor in (x, taps, offset, edge) if tensor is not None]
    return values, keep
