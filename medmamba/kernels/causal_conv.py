"""Causal depthwise convolution with SiLU over channels-last tokens: the step before a Mamba scan.

The compiled kernel (kernels/cpu/conv.cpp) does float32, bfloat16 and float16 on CPUs, Triton
(triton_conv.py) on GPUs; elsewhere, and for float64, it is a sum of shifted products in PyTorch,
which is also the definition. A chunk of a longer sequence brings the inputs of the tokens before it
and leaves the gradients that those tokens need.

Shapes: B batch, L tokens, E channels, T taps (4 in Mamba).
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from medmamba.kernels.backend import forced_backend
from medmamba.kernels.placement import is_fake, on_cpu

COMPILED_TAPS = 8
MODULES = {"native": "medmamba.kernels.native_conv", "triton": "medmamba.kernels.triton_conv"}
COMPILED_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class ConvGradients(NamedTuple):
    """Gradients of one chunk.

    Args:
        x: (B, L, E).
        weight: (E, T).
        bias: (E,).
        first: (B, T - 1, E) of the window sums of the first tokens; the chunk before needs them.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    first: Tensor


def causal_conv_silu(
    x: Tensor, weight: Tensor, bias: Tensor, history: Tensor | None = None
) -> Tensor:
    """Convolve each channel with its taps over past tokens, then apply SiLU; differentiable.

    Args:
        x: (B, L, E), any strides.
        weight: (E, 1, T) as in ``nn.Conv1d``; the last tap meets the token itself.
        bias: (E,).
        history: (B, T - 1, E), inputs of the tokens before the first; zeros when None.

    Returns:
        (B, L, E) in the type of ``x``, computed in float32 at least.
    """
    if torch.compiler.is_compiling():
        return functional.silu(_window_sums(x, weight[:, 0], bias, history)).to(x.dtype)
    return _CausalConv.apply(x, weight, bias, history)  # type: ignore[no-any-return,no-untyped-call]


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, history: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, history)
        return conv_silu(x, weight[:, 0], bias, history)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, history = ctx.saved_tensors
        taps = weight[:, 0]
        found = conv_silu_backward(grad, x, taps, bias, history)
        before = None
        if history is not None and ctx.needs_input_grad[3]:
            before = _history_gradient(found.first, taps).to(history.dtype)
        return found.x, found.weight[:, None].to(weight.dtype), found.bias.to(bias.dtype), before


def _history_gradient(first: Tensor, taps: Tensor) -> Tensor:
    """Row i is token i - (T - 1): tap i - s brings it into the sum of token s."""
    grad = torch.zeros_like(first)
    for row in range(first.shape[1]):
        for token in range(row + 1):
            grad[:, row] += first[:, token] * taps[:, row - token].to(first.dtype)
    return grad


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor, history: Tensor | None = None) -> Tensor:
    """Convolve each channel with its taps over past tokens, then apply SiLU; no gradient.

    Args:
        x: (B, L, E), any strides.
        weight: (E, T), the last tap meets the token itself.
        bias: (E,).
        history: (B, T - 1, E), inputs of the tokens before the first; zeros when None.

    Returns:
        (B, L, E) in the type of ``x``, computed in float32 at least.
    """
    if _only_sized(x):
        return x.new_empty(x.shape)
    compiled = _compiled_for(x, weight)
    if compiled is None:
        return functional.silu(_window_sums(x, weight, bias, history)).to(x.dtype)
    out: Tensor = compiled.forward(x, weight, bias, history)
    return out


def conv_silu_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    history: Tensor | None = None,
    following: Tensor | None = None,
) -> ConvGradients:
    """Gradients of :func:`conv_silu` for one chunk.

    Args:
        grad: (B, L, E), of the output.
        x: as in the forward.
        weight: as in the forward.
        bias: as in the forward.
        history: as in the forward.
        following: ``first`` of the chunk behind; zeros when None.
    """
    if _only_sized(x):
        first = (x.shape[0], weight.shape[1] - 1, x.shape[2])
        wide = torch.promote_types(x.dtype, torch.float32)
        shapes = (weight.shape, bias.shape, first)
        return ConvGradients(x.new_empty(x.shape), *(x.new_empty(s, dtype=wide) for s in shapes))
    compiled = _compiled_for(x, weight)
    if compiled is not None:
        return ConvGradients(*compiled.backward(grad, x, weight, bias, history, following))
    return _backward_in_torch(grad, x, weight, bias, history, following)


def _only_sized(x: Tensor) -> bool:
    """Whether memory on a GPU is being estimated, where one kernel keeps nothing in between."""
    return is_fake(x) and not on_cpu(x)


def _compiled_for(x: Tensor, weight: Tensor) -> ModuleType | None:
    name = "native" if on_cpu(x) else "triton" if x.is_cuda else ""
    compiled = (
        name
        and not is_fake(x)
        and x.numel()
        and x.dtype in COMPILED_TYPES
        and weight.shape[1] <= COMPILED_TAPS
        and forced_backend() in ("", name)
    )
    module = _load(MODULES[name]) if compiled else None
    return None if name == "triton" and module is not None and module.refusal(x) else module


@functools.cache
def _load(name: str) -> ModuleType | None:
    # Extension and triton are the scan's too: when one is missing, the scan's backend says so.
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _with_history(x: Tensor, count: int, history: Tensor | None, dtype: torch.dtype) -> Tensor:
    if history is None:
        return functional.pad(x.to(dtype), (0, 0, count - 1, 0))
    return torch.cat([history.to(dtype), x.to(dtype)], dim=1)


def _window_sums(x: Tensor, weight: Tensor, bias: Tensor, history: Tensor | None) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    count, length = weight.shape[1], x.shape[1]
    padded = _with_history(x, count, history, dtype)
    total = bias.to(dtype).expand(x.shape)
    for tap in range(count):
        total = torch.addcmul(total, padded[:, tap : tap + length], weight[:, tap].to(dtype))
    return total


def _backward_in_torch(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    history: Tensor | None,
    following: Tensor | None,
) -> ConvGradients:
    dtype = torch.promote_types(x.dtype, torch.float32)
    count, length = weight.shape[1], x.shape[1]
    sums = _window_sums(x, weight, bias, history)
    inner = torch.ops.aten.silu_backward(grad.to(dtype), sums)
    padded = _with_history(x, count, history, dtype)
    taps = [(inner * padded[:, tap : tap + length]).sum((0, 1)) for tap in range(count)]
    if following is None:
        ahead = functional.pad(inner, (0, 0, 0, count - 1))
    else:
        ahead = torch.cat([inner, following.to(dtype)], dim=1)
    grad_x = torch.zeros_like(inner)
    for tap in range(count):
        mirrored = weight[:, count - 1 - tap].to(dtype)
        grad_x = torch.addcmul(grad_x, ahead[:, tap : tap + length], mirrored)
    return ConvGradients(
        grad_x.to(x.dtype), torch.stack(taps, dim=1), inner.sum((0, 1)), ahead[:, : count - 1]
    )
