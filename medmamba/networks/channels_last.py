"""Layers over channels-last maps (B, *spatial, C), 2D and 3D, fast on CPU.

A token-wise network needs no other layout; torch's own kernels for depthwise convolution and
group norm are many times slower on few channels than the forms here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

REDUCED = (torch.bfloat16, torch.float16)

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
    convolve = functional.conv2d if x.dim() == 4 else functional.conv3d
    padding = tuple((size - 1) // 2 for size in weight.shape[2:])
    maps, groups = x.movedim(-1, 1), weight.shape[0]
    if x.device.type != "cpu" or not _is_reduced(x):
        y: Tensor = convolve(maps, weight, bias, stride=stride, padding=padding, groups=groups)
        return y.movedim(1, -1)
    # On a CPU the backward of depthwise convolutions is seven times slower in bf16 than in float32.
    with torch.autocast("cpu", enabled=False):
        y = convolve(
            maps.float(),
            weight.float(),
            None if bias is None else bias.float(),
            stride=stride,
            padding=padding,
            groups=groups,
        )
    return y.movedim(1, -1).to(_reduced_type(x))


class TokenNorm(nn.LayerNorm):
    """Layer norm over the channels of tokens, in float32 where there are few of them."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., C) in the type of ``x``."""
        if x.device.type != "cpu" or x.shape[-1] > NARROW or x.dtype not in REDUCED:
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
