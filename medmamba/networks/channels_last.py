"""Layers over channels-last maps (B, *spatial, C), 2D and 3D, fast on CPU.

A token-wise network needs no other layout; torch's own kernels for depthwise convolution and
group norm are many times slower on few channels than the forms here.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from medmamba.kernels.placement import on_cpu

REDUCED = (torch.bfloat16, torch.float16)

CONVOLVE: Mapping[int, Callable[..., Tensor]] = MappingProxyType(
    {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}
)
"""By axes of a map, channels and batch among them; one over space is a sequence of channels."""

NARROW = 8
"""Up to this many channels torch's layer norm is several times slower in bf16 than in float32."""


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1
) -> Tensor:
    """Convolve each channel with its own kernel, zero padding (kernel - 1) // 2.

    Args:
        x: (B, *spatial, C).
        weight: (C, 1, *kernel).
        bias: (C,).
        stride: the same on every axis.
    """
    maps = x.movedim(-1, 1)
    if not on_cpu(x):
        return _convolve(maps, weight, bias, stride).movedim(1, -1)
    dtype = _reduced_type(x) if _is_reduced(x) else x.dtype
    with torch.autocast("cpu", enabled=False):
        if stride == 1 and all(size % 2 for size in weight.shape[2:]):
            y: Tensor = _DepthwiseConv.apply(maps, weight, bias)  # type: ignore[no-untyped-call]
        else:
            # oneDNN's backward in bfloat16 is seven times slower than in float32.
            wide = torch.promote_types(x.dtype, torch.float32)
            shift = None if bias is None else bias.to(wide)
            y = _convolve(maps.to(wide), weight.to(wide), shift, stride)
    return y.movedim(1, -1).to(dtype)


class _DepthwiseConv(torch.autograd.Function):
    """The same convolution with faster gradients than oneDNN's for few channels on a CPU.

    The gradient of the input is the convolution by the mirrored kernel; that of the weight is
    summed in float32. Measured on 64x64x64 of 32 channels, one thread: input 98 to 23 ms in
    float32 and 139 to 6 ms in bfloat16, weight 858 to 240 ms in bfloat16.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(maps, weight)
        shift = None if bias is None else bias.to(maps.dtype)
        return _convolve(maps, weight.to(maps.dtype), shift)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight = ctx.saved_tensors
        spatial = tuple(range(2, grad.dim()))
        needs_maps, needs_weight, needs_bias = ctx.needs_input_grad
        mirrored = weight.to(grad.dtype).flip(spatial)
        grad_maps = _convolve(grad, mirrored) if needs_maps else None
        grad_weight = _weight_gradient(grad, maps, weight) if needs_weight else None
        grad_bias = None
        if needs_bias:
            wide = torch.promote_types(grad.dtype, torch.float32)
            grad_bias = grad.sum((0, *spatial), dtype=wide).to(weight.dtype)
        return grad_maps, grad_weight, grad_bias


def _convolve(maps: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    convolve = CONVOLVE[maps.dim()]
    padding = tuple((size - 1) // 2 for size in weight.shape[2:])
    y: Tensor = convolve(maps, weight, bias, stride=stride, padding=padding, groups=weight.shape[0])
    return y


def _weight_gradient(grad: Tensor, maps: Tensor, weight: Tensor) -> Tensor:
    wide = torch.promote_types(grad.dtype, torch.float32)
    axes = grad.dim() - 2
    found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        grad.to(wide),
        maps.to(wide),
        weight.to(wide),
        None,
        [1] * axes,
        [(size - 1) // 2 for size in weight.shape[2:]],
        [1] * axes,
        False,
        [0] * axes,
        weight.shape[0],
        [False, True, False],
    )
    return found[1].to(weight.dtype)


class TokenNorm(nn.LayerNorm):
    """Layer norm over the channels of tokens, in float32 where there are few of them."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., C) in the type of ``x``."""
        if x.shape[-1] > NARROW or x.dtype not in REDUCED or not on_cpu(x):
            return super().forward(x)
        wide = functional.layer_norm(
            x.float(), self.normalized_shape, self.weight, self.bias, self.eps
        )
        return wide.to(x.dtype)


def _is_reduced(x: Tensor) -> bool:
    return x.dtype in REDUCED or (x.dtype == torch.float32 and torch.is_autocast_enabled("cpu"))


def _reduced_type(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype != torch.float32 else torch.get_autocast_dtype("cpu")


def max_pool(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Maximum over windows of one stride per axis."""
    pool = functional.max_pool2d if x.dim() == 4 else functional.max_pool3d
    return pool(x.movedim(-1, 1), tuple(stride)).movedim(1, -1)


def upsample_linear(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Enlarge by whole factors with linear interpolation, corners not aligned."""
    mode = "bilinear" if x.dim() == 4 else "trilinear"
    size = [length * factor for length, factor in zip(x.shape[1:-1], stride, strict=True)]
    return functional.interpolate(
        x.movedim(-1, 1), size=size, mode=mode, align_corners=False
    ).movedim(1, -1)
