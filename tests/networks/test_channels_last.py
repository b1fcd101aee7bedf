"""Channels-last layers against torch's own on the usual layout."""

import pytest
import torch
from torch.nn import functional

from medmamba.networks.channels_last import depthwise_conv, max_pool, upsample_linear


@pytest.mark.parametrize("shape", [(5, 6), (4, 5, 6)])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_convolution(shape: tuple[int, ...], stride: int) -> None:
    dimension = len(shape)
    x = torch.randn(2, *shape, 3)
    weight, bias = torch.randn(3, 1, *(3,) * dimension), torch.randn(3)
    found = depthwise_conv(x, weight, bias, stride=stride)
    convolve = functional.conv2d if dimension == 2 else functional.conv3d
    wanted = convolve(
        x.movedim(-1, 1).contiguous(), weight, bias, stride=stride, padding=1, groups=3
    )
    torch.testing.assert_close(found, wanted.movedim(1, -1), rtol=0, atol=1e-5)


def test_depthwise_kernel_may_be_flat() -> None:
    x, weight = torch.randn(1, 4, 5, 6, 2), torch.randn(2, 1, 1, 3, 3)
    slices = depthwise_conv(x.flatten(0, 1), weight[:, :, 0]).reshape(x.shape)
    torch.testing.assert_close(depthwise_conv(x, weight), slices, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stride", [(2, 2), (1, 2, 2), (2, 2, 2)])
def test_pool_and_enlargement(stride: tuple[int, ...]) -> None:
    shape = tuple(4 * step for step in stride)
    x = torch.randn(2, *shape, 3)
    usual = x.movedim(-1, 1).contiguous()
    pool = functional.max_pool2d if len(stride) == 2 else functional.max_pool3d
    small = max_pool(x, stride)
    assert torch.equal(small, pool(usual, stride).movedim(1, -1))
    mode = "bilinear" if len(stride) == 2 else "trilinear"
    scale = tuple(float(step) for step in stride)
    wanted = functional.interpolate(
        small.movedim(-1, 1).contiguous(), scale_factor=scale, mode=mode
    )
    found = upsample_linear(small, stride)
    assert found.shape == x.shape
    torch.testing.assert_close(found, wanted.movedim(1, -1), rtol=0, atol=1e-5)
