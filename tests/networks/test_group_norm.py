"""Group norm with ReLU against torch's definition, forward and every gradient."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from medmamba.networks import group_norm
from medmamba.networks.group_norm import EPS, GroupNormReLU


def plain(x: Tensor, layer: GroupNormReLU) -> Tensor:
    usual = x.movedim(-1, 1).contiguous()
    y = functional.group_norm(usual, layer.groups, layer.weight, layer.bias, EPS)
    return functional.relu(y).movedim(1, -1)


def make(channels: int, dtype: torch.dtype = torch.float64) -> GroupNormReLU:
    torch.manual_seed(0)
    layer = GroupNormReLU(8, channels)
    torch.nn.init.normal_(layer.weight, 1.0, 0.5)
    torch.nn.init.normal_(layer.bias)
    return layer.to(dtype)


@pytest.mark.parametrize(
    ("channels", "shape"), [(8, (3, 5, 4)), (16, (7, 9)), (24, (2, 3, 5)), (8, (1, 1))]
)
@pytest.mark.parametrize("chunk", [64, 1 << 16])
def test_equals_torch_across_chunks(
    monkeypatch: pytest.MonkeyPatch, channels: int, shape: tuple[int, ...], chunk: int
) -> None:
    monkeypatch.setattr(group_norm, "CHUNK_VALUES", chunk)
    layer = make(channels)
    x = (3 * torch.randn(2, *shape, channels, dtype=torch.float64) + 5).requires_grad_()
    probe = torch.randn_like(x)
    inputs = [x, layer.weight, layer.bias]
    found, wanted = layer(x), plain(x, layer)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad((found * probe).sum(), inputs)
    expected = torch.autograd.grad((wanted * probe).sum(), inputs)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-11)


def test_long_maps_are_cut_and_keep_float32_precision() -> None:
    layer = make(8, torch.float32)
    x = torch.randn(1, 20, 30, 40, 8) + 10
    error = layer(x).detach().double() - plain(x.double(), make(8)).detach()
    assert float(error.abs().max()) < 2e-5


def test_bf16_maps_are_normalised_in_float32() -> None:
    layer = make(16, torch.float32)
    x = torch.randn(2, 6, 7, 16).bfloat16().requires_grad_()
    found = layer(x)
    assert found.dtype is torch.bfloat16
    wanted = plain(x.detach().double(), make(16)).detach()
    error = found.detach().double() - wanted
    assert float(error.abs().max()) < 0.01 * float(wanted.max())
    found.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype is torch.bfloat16
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype is torch.float32
