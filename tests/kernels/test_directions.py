"""A streamed direction equals the plain one, whatever its order, and keeps little."""

import pytest
import torch
from torch import Tensor

from medmamba.kernels.directions import DirectionWeights, scan_direction
from medmamba.kernels.scan_order import SCAN_ORDERS, scan_orders

SHAPE, INNER, STATE, RANK = (8, 16), 6, 4, 2


def make_weights(dtype: torch.dtype, inner: int = INNER) -> DirectionWeights:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (0.3 * torch.randn(*shape, generator=random)).to(dtype).requires_grad_()

    return DirectionWeights(
        x_proj=normal(RANK + 2 * STATE, inner),
        dt_proj=normal(inner, RANK),
        dt_bias=normal(inner),
        A_log=normal(inner, STATE),
        D=normal(inner),
    )


def results(x: Tensor, weights: DirectionWeights, **options: object) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    out = scan_direction(leaf, weights, **options)
    torch.manual_seed(1)
    grads = torch.autograd.grad(out, (leaf, *weights), torch.randn_like(out))
    return [out.detach(), *grads]


@pytest.mark.parametrize("name", SCAN_ORDERS)
@pytest.mark.parametrize("chunk", [1, 30, 64])
def test_streamed_equals_plain(name: str, chunk: int) -> None:
    weights = make_weights(torch.float64)
    x = torch.randn(2, 128, INNER, dtype=torch.float64)
    for order in scan_orders(name, SHAPE):
        plain = results(x, weights, order=order)
        streamed = results(x, weights, order=order, chunk=chunk)
        for one, other in zip(streamed, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["raster", "reverse", "cross"])
def test_segments_are_not_cut(name: str) -> None:
    weights = make_weights(torch.float64)
    x = torch.randn(1, 128, INNER, dtype=torch.float64)
    for order in scan_orders(name, SHAPE):
        plain = results(x, weights, order=order, segment=12)
        streamed = results(x, weights, order=order, segment=12, chunk=40)
        for one, other in zip(streamed, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_streamed_equals_plain_under_autocast() -> None:
    weights = make_weights(torch.float32, 32)
    x = torch.randn(1, 512, 32).bfloat16()
    order = scan_orders("cross", (16, 32))[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = results(x, weights, order=order)
        streamed = results(x, weights, order=order, chunk=100)
    for one, other in zip(streamed, plain, strict=True):
        assert one.dtype is other.dtype
        assert (one - other).abs().max() <= 2e-2 * other.abs().max()


def test_only_input_and_states_are_kept() -> None:
    weights = make_weights(torch.float32, 32)
    x = torch.randn(1, 20_000, 32, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    order = scan_orders("cross", (100, 200))[1]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scan_direction(x, weights, order, chunk=4096)
    own = sum(weight.untyped_storage().nbytes() for weight in weights)
    assert sum(kept.values()) <= x.untyped_storage().nbytes() + 5 * 32 * STATE * 4 + own
