"""The compiled instance norm against float64, on awkward shapes, types and threads."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from medmamba.kernels import instance_norm
from medmamba.kernels.compiled import compiled
from medmamba.kernels.instance_norm import normalize
from medmamba.networks.blocks import InstanceNorm

EPS = 1e-5
SHAPES = [(1, 32, 9, 12, 10), (2, 35, 5, 4, 7), (3, 3, 41, 37), (1, 320, 2, 3, 2), (2, 16, 3, 4)]
TYPES = [(torch.float32, 3e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)]

pytestmark = pytest.mark.skipif(
    compiled("native_norm", torch.zeros(1)) is None, reason="the extension is not built"
)


def channels_last(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    # A mean that is large against the deviation, and an outlier where sums begin.
    values = values * 3 + 40
    values[(0, 0, *(0 for _ in shape[2:]))] = -500
    return values.to(dtype).contiguous(memory_format=layout)


def expected(x: Tensor, weight: Tensor | None, bias: Tensor | None, slope: float) -> Tensor:
    wide = [None if each is None else each.double() for each in (weight, bias)]
    y = functional.instance_norm(x.double(), weight=wide[0], bias=wide[1], eps=EPS)
    return functional.leaky_relu(y, slope) if slope != 1 else y


@torch.inference_mode()
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
@pytest.mark.parametrize("slope", [1.0, 0.01])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("instructions", ["", "v3", "base"])
def test_it_equals_float64(shape, dtype, tolerance, slope, affine, instructions, monkeypatch):
    monkeypatch.setenv("MEDMAMBA_CPU_ISA", instructions)
    x = channels_last(shape, dtype)
    weight, bias = (torch.randn(shape[1]) for _ in range(2)) if affine else (None, None)
    y = normalize(x, weight, bias, eps=EPS, slope=slope)
    assert y is not None
    assert (y.dtype, y.stride()) == (x.dtype, x.stride())
    truth = expected(x, weight, bias, slope)
    scale = float(truth.abs().max())
    assert float((y.double() - truth).abs().max()) <= tolerance * scale
    before = x.clone()
    inside = normalize(x, weight, bias, eps=EPS, slope=slope, in_place=True)
    assert inside is x
    assert torch.equal(inside, y)
    assert not torch.equal(before, x)


@torch.inference_mode()
def test_threads_change_no_bit():
    x = channels_last((2, 32, 40, 30, 20), torch.bfloat16)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(normalize(x, None, None, eps=EPS, slope=0.01))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@torch.inference_mode()
def test_what_is_not_finite_stays_so():
    x = channels_last((1, 16, 4, 4, 4), torch.float32)
    x[0, 3, 0, 0, 1] = float("nan")
    x[0, 5, 1, 0, 0] = float("inf")
    y = normalize(x, None, None, eps=EPS, slope=0.01)
    channels = torch.isfinite(y).flatten(2).all(-1)[0]
    assert not channels[3]
    assert not channels[5]
    assert int(channels.sum()) == 14


def test_torch_does_what_it_cannot():
    x = channels_last((1, 4, 4, 4, 4), torch.float32)
    assert normalize(x, None, None, eps=EPS) is None  # gradients
    with torch.inference_mode():
        assert normalize(x.contiguous(), None, None, eps=EPS) is None
        assert normalize(x.double(), None, None, eps=EPS) is None


def test_the_layer_is_the_same_with_and_without_it(monkeypatch):
    norm = InstanceNorm(8)
    torch.nn.init.normal_(norm.weight)
    x = channels_last((2, 8, 6, 5, 4), torch.float32)
    with torch.no_grad():
        fast = norm(x, slope=0.01)
        monkeypatch.setattr(instance_norm, "compiled", lambda name, x: None)
        slow = norm(x, slope=0.01)
    torch.testing.assert_close(fast, slow, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(fast, norm(x, slope=0.01).detach(), atol=2e-4, rtol=1e-4)
