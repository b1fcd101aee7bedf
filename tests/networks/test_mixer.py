"""The convolutional twin computes what its layers say, in 2D and 3D, with gradients."""

import pytest
import torch
from torch.nn import functional

from medmamba.networks.mixer import DepthwiseMixer


@pytest.mark.parametrize("shape", [(5, 6), (4, 3, 5)])
def test_the_depthwise_twin_is_linear_convolution_silu_linear(shape) -> None:
    torch.manual_seed(0)
    mixer = DepthwiseMixer(6, len(shape), parameters=900).double()
    length = torch.Size(shape).numel()
    tokens = torch.randn(2, length, 6, dtype=torch.float64, requires_grad=True)
    inner = mixer.in_proj(tokens).unflatten(1, shape).movedim(-1, 1)
    expected = mixer.out_proj(functional.silu(mixer.conv(inner)).movedim(1, -1).flatten(1, -2))
    found = mixer(tokens, shape)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    weights = (tokens, *mixer.parameters())
    cotangent = torch.randn_like(expected)
    for own, reference in zip(
        torch.autograd.grad(found, weights, cotangent),
        torch.autograd.grad(expected, weights, cotangent),
        strict=True,
    ):
        assert torch.allclose(own, reference, rtol=1e-10, atol=1e-10)
