"""Channels-last layers against torch's own on the usual layout."""

import pytest
import torch
from torch.nn import functional

from medmamba.networks.channels_last import TokenNorm, depthwise_conv, max_pool, upsample_linear


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


@pytest.mark.parametrize("kernel", [(3, 3), (1, 3, 3), (5, 3, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_gradients_are_torchs(kernel: tuple[int, ...], stride: int) -> None:
    x = torch.randn(2, *(4, 5, 6)[-len(kernel) :], 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 1, *kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    found = depthwise_conv(x, weight, bias, stride=stride)
    convolve = functional.conv2d if len(kernel) == 2 else functional.conv3d
    padding = tuple(size // 2 for size in kernel)
    wanted = convolve(x.movedim(-1, 1), weight, bias, stride, padding, groups=3).movedim(1, -1)
    upstream = torch.randn(found.shape, dtype=torch.float64)
    ours = torch.autograd.grad(found, (x, weight, bias), upstream)
    theirs = torch.autograd.grad(wanted, (x, weight, bias), upstream)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_depthwise_gradients_in_bf16_are_those_of_float32_rounded_once() -> None:
    x = torch.randn(1, 4, 5, 6, 3).bfloat16().requires_grad_()
    weight = torch.randn(3, 1, 3, 3, 3).bfloat16().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = depthwise_conv(x, weight)
    assert found.dtype == torch.bfloat16
    upstream = torch.randn(found.shape).bfloat16()
    ours = torch.autograd.grad(found, (x, weight), upstream)
    assert [one.dtype for one in ours] == [torch.bfloat16, torch.float32]
    exact = x.detach().float().requires_grad_()
    theirs = torch.autograd.grad(depthwise_conv(exact, weight), (exact, weight), upstream.float())
    for one, other in zip(ours, theirs, strict=True):
        assert float((one.float() - other).abs().max() / other.abs().max()) < 2**-8


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [4, 8, 16])
def test_token_norm_is_layer_norm(channels: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = TokenNorm(channels)
    x = torch.randn(2, 50, channels).to(dtype).requires_grad_()
    y = norm(x)
    assert y.dtype == dtype
    exact = functional.layer_norm(x.double(), (channels,))
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=2 * torch.finfo(dtype).eps)
    y.square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("autocast", [False, True])
def test_depthwise_convolution_keeps_the_type_of_its_surroundings(autocast: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 5, 6, 8)
    weight = torch.randn(8, 1, 3, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = depthwise_conv(x, weight)
    wanted = functional.conv3d(
        x.movedim(-1, 1).double(), weight.double(), padding=1, groups=8
    ).movedim(1, -1)
    assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
    torch.testing.assert_close(y.double(), wanted, rtol=8e-3 if autocast else 1e-5, atol=1e-5)
    y.float().square().sum().backward()
    assert weight.grad is not None
