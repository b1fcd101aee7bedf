"""The linear layer for many tokens against torch's own, with every gradient."""

import pytest
import torch
from torch.nn import functional

from medmamba.kernels.linear import linear


@pytest.mark.parametrize(("entry", "out"), [(4, 7), (7, 4), (5, 5)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_and_its_gradients_are_torchs(entry: int, out: int, has_bias: bool) -> None:
    x = torch.randn(2, 11, entry, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(out, entry, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(out, dtype=torch.float64, requires_grad=True) if has_bias else None
    inputs = [x, weight] if bias is None else [x, weight, bias]
    probe = torch.randn(2, 11, out, dtype=torch.float64)
    found, wanted = linear(x, weight, bias), functional.linear(x, weight, bias)
    torch.testing.assert_close(found, wanted)
    gradients = torch.autograd.grad((found * probe).sum(), inputs)
    expected = torch.autograd.grad((wanted * probe).sum(), inputs)
    torch.testing.assert_close(gradients, expected)
