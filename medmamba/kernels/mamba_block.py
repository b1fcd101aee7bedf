"""The Mamba-1 block over a sequence of tokens, evaluated in chunks that stay in cache.

A plain composition keeps every intermediate of the block, eight times the inner width per token.
The streamed form goes through the tokens chunk by chunk, carrying the convolution's last inputs and
the scan's state, and recomputes each chunk in the backward pass; it keeps the block's input, and a
state per chunk. Both give the same result. Modules with parameters are the networks'.

Shapes: B batch, L tokens, C model width, E inner width, N state size, R rank of the step, T taps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from medmamba.errors import KernelError
from medmamba.kernels.causal_conv import causal_conv_silu
from medmamba.kernels.linear import compute_dtype, linear
from medmamba.kernels.operator import selective_scan
from medmamba.kernels.placement import is_fake, on_cpu

STREAM_FROM_VALUES = 1 << 24
"""Inner values (B·L·E) from which a block is streamed. Below, its intermediates take at most about
256 MB in bfloat16, and computing them a second time would cost more than it saves."""
CPU_CHUNK_VALUES = 1 << 18
"""Inner values (B·tokens·E) of a chunk, whose intermediates then fit an L2 cache of 1 to 2 MB."""
GPU_CHUNK_VALUES = 1 << 24
"""On a GPU a chunk must fill the device; 32 MB in bfloat16 per intermediate."""
MINIMUM_CHUNK = 256
"""Tokens below which the work around a chunk outweighs the chunk."""


_whole: ContextVar[bool] = ContextVar("whole", default=False)


@contextmanager
def whole_blocks() -> Iterator[None]:
    """Evaluate blocks in one piece, whatever their size, for whoever counts operations."""
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


class MambaWeights(NamedTuple):
    """The tensors of one Mamba block; names and shapes as in the official state dict.

    Args:
        in_proj: (2E, C), inputs then gates.
        conv_weight: (E, 1, T).
        conv_bias: (E,).
        x_proj: (R + 2N, E): step, B, C.
        dt_proj: (E, R).
        dt_bias: (E,).
        A_log: (E, N).
        D: (E,).
        out_proj: (C, E).
    """

    in_proj: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    out_proj: Tensor


class _Carry(NamedTuple):
    """What a chunk hands to the next: inputs of the convolution (B, T-1, E), state (B, E, N)."""

    history: Tensor
    state: Tensor


def mamba_block(
    tokens: Tensor, weights: MambaWeights, *, segment: int = 0, chunk: int | None = None
) -> Tensor:
    """Evaluate one Mamba block over tokens in sequence order.

    Gu and Dao 2023, figure 3 and algorithm 2, as ``mamba_ssm.Mamba`` composes it. Projections
    run in the autocast type where autocast is on; A, D and the step bias enter the scan as they
    are stored, and the scan keeps its state in float32 (float64 for float64 input).

    Args:
        tokens: (B, L, C).
        weights: the block's tensors.
        segment: length of the segments of the local bidirectional scan; 0 scans forward only.
        chunk: tokens per chunk; chosen by size and device when None, 0 for the plain composition.

    Returns:
        (B, L, C), in the autocast type where autocast is on.

    Raises:
        KernelError: tokens or a weight of another shape, or a chunk that does not hold whole
            segments.
    """
    _check(tokens, weights, segment, chunk)
    dtype = compute_dtype(tokens)
    cast = _cast(weights, dtype)
    whole = torch.compiler.is_compiling()
    if not whole:
        inner = weights.A_log.shape[0]
        length = chunk_length(tokens, inner, segment=segment) if chunk is None else chunk
        whole = not length or length >= tokens.shape[1]
    with torch.autocast(tokens.device.type, enabled=False):
        if whole:
            return _chunk_output(tokens.to(dtype), cast, None, segment)[0]
        settings = (length, segment)
        return _Streamed.apply(settings, tokens.to(dtype), *cast)  # type: ignore[no-any-return,no-untyped-call]


def _check(tokens: Tensor, weights: MambaWeights, segment: int, chunk: int | None) -> None:
    """Refuse what does not belong together; the scan checks its own arguments."""
    if weights.A_log.dim() != 2:
        raise KernelError(f"A_log has shape {tuple(weights.A_log.shape)}; expected two dimensions")
    inner, state = weights.A_log.shape
    width, rank = weights.out_proj.shape[0], weights.dt_proj.shape[-1]
    shapes = {
        "in_proj": (2 * inner, width),
        "conv_weight": (inner, 1, weights.conv_weight.shape[-1]),
        "conv_bias": (inner,),
        "x_proj": (rank + 2 * state, inner),
        "dt_proj": (inner, rank),
        "dt_bias": (inner,),
        "D": (inner,),
        "out_proj": (width, inner),
    }
    for name, shape in shapes.items():
        _require_shape(name, getattr(weights, name), shape)
    if tokens.dim() != 3 or tokens.shape[2] != width:
        raise KernelError(
            f"tokens has shape {tuple(tokens.shape)}; expected (batch, length, {width})"
        )
    if chunk is not None and (chunk < 0 or (segment and chunk % segment)):
        raise KernelError(
            f"chunk is {chunk} and segment is {segment}; give 0 (one piece) or a number of tokens "
            "that holds whole segments"
        )


def _require_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if value.dim() != len(shape) or value.shape != shape:
        raise KernelError(f"{name} has shape {tuple(value.shape)}; expected {shape}")


def chunk_length(tokens: Tensor, inner: int, *, segment: int = 0) -> int:
    """Return the tokens of a chunk, 0 for a block too small to stream; never follows a timing.

    Args:
        tokens: (B, L, ...).
        inner: E.
        segment: chunks hold whole segments of this length.
    """
    if tokens.shape[0] * tokens.shape[1] * inner < STREAM_FROM_VALUES or _whole.get():
        return 0
    values = CPU_CHUNK_VALUES if on_cpu(tokens) else GPU_CHUNK_VALUES
    return _tokens_of(values, tokens.shape[0] * inner, segment or MINIMUM_CHUNK)


def _tokens_of(values: int, values_per_token: int, unit: int) -> int:
    count = values // max(1, values_per_token)
    return max(MINIMUM_CHUNK, count) // unit * unit or unit


def layer_chunk(tokens: Tensor, weights: MambaWeights) -> int:
    """Return the tokens of a chunk of ``mamba_layer``, 0 where it has nothing to offer.

    That is in training, whose backward pass needs what a chunk leaves out, on a GPU, where chunks
    share no cache, and for maps that fit a cache as they are.
    """
    inner = weights.A_log.shape[0]
    if not on_cpu(tokens) or is_fake(tokens) or torch.is_grad_enabled() or _whole.get():
        return 0
    length = _tokens_of(CPU_CHUNK_VALUES, tokens.shape[0] * inner, MINIMUM_CHUNK)
    return length if length < tokens.shape[1] else 0


def mamba_layer(
    tokens: Tensor,
    weights: MambaWeights,
    *,
    before: Callable[[Tensor], Tensor],
    after: Callable[[Tensor, Tensor], Tensor],
    length: int,
) -> Tensor:
    """Evaluate a block with the token-wise work around it, chunk by chunk; no gradient.

    A chunk goes through everything while it lies in the cache; otherwise each of these steps
    reads and writes a whole map.

    Args:
        tokens: (B, L, C).
        weights: the block's tensors.
        before: what makes the block's input of tokens.
        after: what makes the layer's output of the block's output and the layer's own tokens.
        length: tokens of a chunk, from ``layer_chunk``.

    Returns:
        (B, L, channels of ``after``).
    """
    dtype = compute_dtype(tokens)
    cast = _cast(weights, dtype)
    carry, out = None, None
    for start in range(0, tokens.shape[1], length):
        piece = tokens[:, start : start + length]
        entry = before(piece).to(dtype)
        carry = _first_carry(entry, cast) if carry is None else carry
        with torch.autocast("cpu", enabled=False):
            mixed, inputs, last = _chunk_output(entry, cast, carry, 0)
        carry = _Carry(_last_inputs(carry.history, inputs), last)
        y = after(mixed, piece)
        out = y.new_empty(*tokens.shape[:2], y.shape[-1]) if out is None else out
        out[:, start : start + length] = y
    assert out is not None
    return out


def _cast(weights: MambaWeights, dtype: torch.dtype) -> MambaWeights:
    """Projections in the type they compute in; what the scan and the convolution read stays."""
    names = ("in_proj", "x_proj", "dt_proj", "out_proj")
    return weights._replace(**{name: getattr(weights, name).to(dtype) for name in names})


def _chunk_output(
    tokens: Tensor, weights: MambaWeights, carry: _Carry | None, segment: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, n, C) of a chunk, the inputs of its convolution (B, n, E), and its last state."""
    rank, state = weights.dt_proj.shape[1], weights.A_log.shape[1]
    inputs, gate = linear(tokens, weights.in_proj).chunk(2, dim=-1)
    history = None if carry is None else carry.history
    x = causal_conv_silu(inputs, weights.conv_weight, weights.conv_bias, history)
    step, B, C = linear(x, weights.x_proj).split_with_sizes([rank, state, state], dim=-1)
    y, last = selective_scan(
        x,
        linear(step, weights.dt_proj),
        -torch.exp(weights.A_log),
        B,
        C,
        skip=weights.D,
        gate=gate,
        delta_bias=weights.dt_bias,
        delta_softplus=True,
        segment=segment,
        h0=None if carry is None else carry.state,
        return_last_state=True,
    )
    return linear(y, weights.out_proj), inputs, last


def _last_inputs(history: Tensor, inputs: Tensor) -> Tensor:
    count = history.shape[1]
    if inputs.shape[1] >= count:
        return inputs[:, inputs.shape[1] - count :]
    return torch.cat([history, inputs], dim=1)[:, inputs.shape[1] :]


def _first_carry(tokens: Tensor, weights: MambaWeights) -> _Carry:
    batch, inner, taps = tokens.shape[0], weights.A_log.shape[0], weights.conv_weight.shape[-1]
    wide = torch.promote_types(tokens.dtype, torch.float32)
    return _Carry(
        tokens.new_zeros(batch, taps - 1, inner),
        tokens.new_zeros((batch, inner, weights.A_log.shape[1]), dtype=wide),
    )


class _Streamed(torch.autograd.Function):
    """The block in chunks; saves its input and the carry into every chunk."""

    @staticmethod
    def forward(ctx: Any, settings: tuple[int, int], tokens: Tensor, *tensors: Tensor) -> Tensor:
        length, segment = settings
        weights = MambaWeights(*tensors)
        starts = range(0, tokens.shape[1], length)
        carry = _first_carry(tokens, weights)
        histories = carry.history.new_empty(len(starts), *carry.history.shape)
        states = carry.state.new_empty(len(starts), *carry.state.shape)
        out = tokens.new_empty(*tokens.shape[:2], weights.out_proj.shape[0])
        needed = starts[:1] if is_fake(out) else starts
        for index, start in enumerate(needed):
            histories[index], states[index] = carry
            piece = tokens[:, start : start + length]
            out[:, start : start + length], inputs, last = _chunk_output(
                piece, weights, carry, segment
            )
            carry = _Carry(_last_inputs(carry.history, inputs), last)
        ctx.settings = settings
        ctx.save_for_backward(tokens, histories, states, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, histories, states, *tensors = ctx.saved_tensors
        length, segment = ctx.settings
        carry = _Carry(histories[0], states[0])
        grad_carry = _Carry(*(torch.zeros_like(part) for part in carry))
        grad_tokens = torch.empty_like(tokens)
        totals = [torch.zeros_like(tensor, dtype=states.dtype) for tensor in tensors]
        count = len(states)
        first = count - 1 if is_fake(states) else 0
        for index in reversed(range(first, count)):
            part = slice(index * length, (index + 1) * length)
            leaves = [tokens[:, part], histories[index], states[index], *tensors]
            found = _chunk_gradients(leaves, grad[:, part], grad_carry, segment)
            grad_tokens[:, part] = found[0]
            grad_carry = _Carry(found[1], found[2])
            for total, share in zip(totals, found[3:], strict=True):
                total += share
        given = [total.to(tensor.dtype) for total, tensor in zip(totals, tensors, strict=True)]
        return (None, grad_tokens, *given)


def _chunk_gradients(
    leaves: Sequence[Tensor], grad: Tensor, grad_carry: _Carry, segment: int
) -> tuple[Tensor, ...]:
    """Recompute a chunk and differentiate it with respect to its tokens, carry and weights."""
    with torch.enable_grad():
        tokens, history, state, *tensors = (leaf.detach().requires_grad_() for leaf in leaves)
        weights = MambaWeights(*tensors)
        out, inputs, last = _chunk_output(tokens, weights, _Carry(history, state), segment)
        outputs = (out, _last_inputs(history, inputs), last)
        return torch.autograd.grad(
            outputs, (tokens, history, state, *tensors), (grad, *grad_carry), materialize_grads=True
        )
