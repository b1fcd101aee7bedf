"""The streamed Mamba block equals the plain composition, and keeps little for the backward pass."""

import pytest
import torch
from torch import Tensor

from medmamba.errors import KernelError
from medmamba.kernels.mamba_block import MambaWeights, chunk_length, mamba_block

STATE, TAPS, RANK = 16, 4, 2


def make_weights(width: int, dtype: torch.dtype) -> MambaWeights:
    generator = torch.Generator().manual_seed(width)
    inner = 2 * width

    def normal(*shape: int, scale: float = 0.3) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(dtype).requires_grad_()

    return MambaWeights(
        in_proj=normal(2 * inner, width),
        conv_weight=normal(inner, 1, TAPS),
        conv_bias=normal(inner),
        x_proj=normal(RANK + 2 * STATE, inner),
        dt_proj=normal(inner, RANK),
        dt_bias=normal(inner),
        A_log=normal(inner, STATE),
        D=normal(inner),
        out_proj=normal(width, inner),
    )


def results(tokens: Tensor, weights: MambaWeights, *, chunk: int, segment: int = 0) -> list[Tensor]:
    leaf = tokens.clone().requires_grad_()
    for weight in weights:
        weight.grad = None
    out = mamba_block(leaf, weights, chunk=chunk, segment=segment)
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape, dtype=torch.float64).to(out.dtype))
    return [out.detach(), leaf.grad, *(weight.grad.clone() for weight in weights)]


def largest_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(
        float((one.double() - other.double()).abs().max() / other.double().abs().max())
        for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("length", [5, 64, 97, 200])
@pytest.mark.parametrize("chunk", [2, 33, 64])
def test_streamed_equals_plain_in_float64(length, chunk):
    weights = make_weights(6, torch.float64)
    tokens = torch.randn(2, length, 6, dtype=torch.float64)
    plain = results(tokens, weights, chunk=0)
    assert largest_difference(results(tokens, weights, chunk=chunk), plain) < 1e-12


def test_segments_may_be_streamed_in_whole_chunks_of_them():
    weights = make_weights(4, torch.float64)
    tokens = torch.randn(1, 70, 4, dtype=torch.float64)
    plain = results(tokens, weights, chunk=0, segment=16)
    assert largest_difference(results(tokens, weights, chunk=32, segment=16), plain) < 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_streamed_equals_plain_in_working_precision(dtype, tolerance):
    weights = make_weights(8, torch.float32)
    tokens = torch.randn(2, 700, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        plain = results(tokens, weights, chunk=0)
        streamed = results(tokens, weights, chunk=256)
    assert streamed[0].dtype == dtype
    assert largest_difference(streamed, plain) < tolerance


def test_gradients_are_bitwise_repeatable():
    weights = make_weights(8, torch.float32)
    tokens = torch.randn(2, 900, 8)
    first, second = (results(tokens, weights, chunk=256) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("width", [8, 32])
def test_little_is_kept_for_the_backward_pass(width):
    weights = make_weights(width, torch.float32)
    tokens = torch.randn(1, 40_000, width, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mamba_block(tokens, weights, chunk=4096)
    own = sum(weight.numel() * weight.element_size() for weight in weights)
    chunks = -(-tokens.shape[1] // 4096)
    states = chunks * 2 * width * (STATE + TAPS - 1) * 4
    allowed = 1.25 * tokens.shape[1] * width * 4 + states + own
    assert sum(kept.values()) <= allowed


def test_chunks_follow_from_shapes_alone():
    def chunk(batch: int, length: int, segment: int = 0) -> int:
        return chunk_length(torch.empty(batch, length, 8, device="meta"), 16, segment=segment)

    assert chunk(2, 1000) == 0
    assert chunk(2, 1 << 20) == chunk(2, 1 << 21) > 0
    assert chunk(1, 1 << 21) == 2 * chunk(2, 1 << 21)
    assert chunk(2, 1 << 21, segment=24) % 24 == 0
    assert chunk(1 << 14, 1 << 10) == 256


@pytest.mark.parametrize(
    ("tokens", "change", "settings", "message"),
    [
        ((20, 8), {}, {}, r"tokens has shape \(20, 8\); expected \(batch, length, 8\)"),
        ((1, 20, 4), {}, {}, r"tokens has shape \(1, 20, 4\); expected \(batch, length, 8\)"),
        ((1, 20, 8), {"D": (3,)}, {}, r"D has shape \(3,\); expected \(16,\)"),
        ((1, 20, 8), {"x_proj": (2, 16)}, {}, r"x_proj has shape \(2, 16\); expected \("),
        ((1, 20, 8), {"A_log": (16,)}, {}, r"A_log has shape \(16,\); expected two dimensions"),
        ((1, 20, 8), {}, {"chunk": -4}, "chunk is -4"),
        ((1, 20, 8), {}, {"chunk": 10, "segment": 4}, "chunk is 10 and segment is 4"),
    ],
)
def test_what_does_not_belong_together_is_named(tokens, change, settings, message):
    changed = {name: torch.ones(shape) for name, shape in change.items()}
    weights = make_weights(8, torch.float32)._replace(**changed)
    with pytest.raises(KernelError, match=message):
        mamba_block(torch.ones(tokens), weights, **settings)
