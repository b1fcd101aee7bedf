"""The causal convolution: compiled against PyTorch, gradients, and chunks against the whole."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from medmamba.kernels.causal_conv import causal_conv_silu, conv_silu, conv_silu_backward
from medmamba.kernels.placement import as_on_gpu

SHAPES = [
    (1, 1, 1, 4),
    (2, 3, 5, 4),
    (2, 65, 16, 4),
    (1, 2100, 33, 4),
    (3, 130, 48, 2),
    (1, 70, 20, 1),
]


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    batch, length, channels, taps = shape
    generator = torch.Generator().manual_seed(length * channels)
    # Rows are a view, as the first half of a projection is.
    x = torch.randn(batch, length, 2 * channels, generator=generator).to(dtype)[..., :channels]
    weight = torch.randn(channels, taps, generator=generator)
    bias = torch.randn(channels, generator=generator)
    history = torch.randn(batch, taps - 1, channels, generator=generator)
    grad = torch.randn(batch, length, channels, generator=generator).to(dtype)
    following = torch.randn(batch, taps - 1, channels, generator=generator)
    return x, weight, bias, history, grad, following


def relative(found: Tensor, expected: Tensor) -> float:
    scale = max(float(expected.abs().max()), 1e-12) if expected.numel() else 1.0
    return float((found.double() - expected.double()).abs().max()) / scale if found.numel() else 0.0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 6e-4)]
)
def test_compiled_equals_float64(shape, dtype, tolerance):
    x, weight, bias, history, grad, following = inputs(shape, dtype)
    wide = [tensor.double() for tensor in (x, weight, bias, history)]
    assert relative(conv_silu(x, weight, bias, history), conv_silu(*wide)) < tolerance
    found = conv_silu_backward(grad, x, weight, bias, history, following)
    expected = conv_silu_backward(grad.double(), *wide, following.double())
    for name, one, other in zip(found._fields, found, expected, strict=True):
        assert relative(one, other) < tolerance, name


@pytest.mark.parametrize("chunk", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (2, 65, 16, 4), (1, 50, 70, 2), (1, 20, 33, 1)])
def test_triton_equals_float64(interpreted, shape, chunk):
    x, weight, bias, history, grad, following = inputs(shape, torch.float32)
    history, following = (history, following) if chunk else (None, None)
    wide = [None if t is None else t.double() for t in (x, weight, bias, history, following)]
    out = interpreted.convolution("forward", x, weight, bias, history)
    assert relative(out, conv_silu(*wide[:4])) < 2e-6
    found = interpreted.convolution("backward", grad, x, weight, bias, history, following, 3)
    expected = conv_silu_backward(grad.double(), *wide)
    for name, one, other in zip(expected._fields, found, expected, strict=True):
        assert relative(one, other) < 2e-6, name
        assert one.shape == other.shape, name


def test_triton_keeps_half_precision(interpreted):
    x, weight, bias, history, grad, _ = inputs((1, 18, 33, 4), torch.float16)
    out = interpreted.convolution("forward", x, weight, bias, history)
    found = interpreted.convolution("backward", grad, x, weight, bias, history, None)
    wide = [tensor.double() for tensor in (x, weight, bias, history)]
    expected = conv_silu_backward(grad.double(), *wide)
    assert out.dtype == found[0].dtype == torch.float16
    assert relative(out, conv_silu(*wide)) < 6e-4
    assert relative(found[0], expected.x) < 6e-4
    assert relative(found[1], expected.weight) < 2e-6


def test_gradients_are_those_of_autograd():
    x, weight, bias, _, grad, _ = (t.double() for t in inputs((2, 9, 3, 4), torch.float32))
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    torch.autograd.backward(conv_silu(*leaves), grad)
    found = conv_silu_backward(grad, x, weight, bias)
    for one, leaf in zip(found, leaves, strict=False):
        assert relative(one, leaf.grad) < 1e-12


@pytest.mark.parametrize("on_gpu", [False, True])
def test_only_the_input_is_kept_for_the_backward(on_gpu):
    x, weight, bias, *_ = inputs((2, 65, 16, 4), torch.bfloat16)
    leaves = [x.clone().requires_grad_(), weight[:, None], bias]
    kept = []

    def keep(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with as_on_gpu() if on_gpu else nullcontext():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = causal_conv_silu(*leaves)
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert sum(kept) == 2 * x.numel() + 4 * (weight.numel() + bias.numel())


@pytest.mark.parametrize("cut", [1, 2, 64, 100])
def test_chunks_equal_the_whole(cut):
    x, weight, bias, _, grad, _ = inputs((2, 130, 24, 4), torch.float32)
    whole = conv_silu(x, weight, bias)
    head = conv_silu(x[:, :cut], weight, bias)
    history = torch.cat([torch.zeros(2, 3, 24), x[:, :cut]], dim=1)[:, -3:]
    tail = conv_silu(x[:, cut:], weight, bias, history)
    assert torch.equal(torch.cat([head, tail], dim=1), whole)
    expected = conv_silu_backward(grad, x, weight, bias)
    behind = conv_silu_backward(grad[:, cut:], x[:, cut:], weight, bias, history)
    before = conv_silu_backward(grad[:, :cut], x[:, :cut], weight, bias, None, behind.first)
    assert relative(torch.cat([before.x, behind.x], dim=1), expected.x) < 1e-6
    assert relative(before.weight + behind.weight, expected.weight) < 1e-6


def test_gradients_do_not_depend_on_threads():
    x, weight, bias, history, grad, following = inputs((2, 9000, 40, 4), torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(conv_silu_backward(grad, x, weight, bias, history, following))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
