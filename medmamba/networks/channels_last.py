"""Layers over channels-last maps (B, *spatial, C), 2D and 3D, fast on CPU.

A token-wise network needs no other layout; torch's own kernels for depthwise convolution and
group norm are many times slower on few channels than the forms here.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional


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
    y: Tensor = convolve(maps, weight, bias, stride=stride, padding=padding, groups=groups)
    return y.movedim(1, -1)


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
