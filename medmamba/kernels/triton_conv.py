"""The causal depthwise convolution with SiLU on a GPU, in Triton: a launch forward, two backward.

A step of small patches is bound by launches, and in PyTorch's operations this is forty of them. The
backward computes the window sums of a token and of those behind it anew, from inputs that are in
the cache; every program leaves its share of the gradients of taps and bias, added in a fixed order.

Shapes: B batch, L tokens, E channels, T taps.
"""

# Triton is a language of its own: tuples grow by addition, ifs on constants stay apart.
# mypy: disable-error-code="untyped-decorator,assignment,no-untyped-def,no-untyped-call"
# ruff: noqa: RUF005

from typing import Any

import torch
import triton  # noqa: TID251  (part of triton's door)
import triton.language as tl  # noqa: TID251
from torch import Tensor

from medmamba.kernels.placement import on_device_of
from medmamba.kernels.triton_cut import CAPABILITY
from medmamba.kernels.triton_parts import sigmoid

TOKENS = 16  # of a block, at least T - 1
NARROW, WIDE = 32, 64  # channels of a program
PROGRAMS = 132 * 32  # of the backward, from which one walks several blocks of tokens
MOST_BLOCKS = 16
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}
SIZES = ("length", "spans", "blocks")


@triton.jit
def load_taps(weight, d, channel, T: tl.constexpr):
    """The T taps of each channel of a tile, float32."""
    taps = ()
    for tap in tl.static_range(T):
        taps = taps + (tl.load(weight + d * T + tap, mask=channel, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def inputs_at(x, history, t, d, channel, length, channels, x_row, T: tl.constexpr):
    """Inputs (tokens, channels) at t; before the first token the history's, or zero."""
    inside = (t >= 0) & (t < length)
    mask = inside[:, None] & channel[None, :]
    value = tl.load(x + t[:, None] * x_row + d[None, :], mask=mask, other=0.0).to(tl.float32)
    if history is not None:
        mask = (t < 0)[:, None] & channel[None, :]
        rows = history + (t + (T - 1))[:, None] * channels + d[None, :]
        value += tl.load(rows, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def window_sums(x, history, taps, bias, t, d, channel, length, channels, x_row, T: tl.constexpr):
    """What the convolution makes of the tokens t, before the SiLU."""
    total = tl.zeros([t.shape[0], d.shape[0]], tl.float32) + bias[None, :]
    for tap in tl.static_range(T):
        at = t + (tap - (T - 1))
        value = inputs_at(x, history, at, d, channel, length, channels, x_row, T)
        total += value * taps[tap][None, :]
    return total


@triton.jit(do_not_specialize=SIZES)
def conv_forward(
    x,
    weight,
    bias,
    history,
    out,
    length,
    channels,
    tiles,
    spans,
    x_batch,
    x_row,
    T: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
):
    """Write the outputs of one block of tokens."""
    program = tl.program_id(0).to(tl.int64)
    d = (program % tiles) * BE + tl.arange(0, BE)
    batch = program // (tiles * spans)
    t = (program // tiles) % spans * BT + tl.arange(0, BT)
    channel = d < channels
    x += batch * x_batch
    if history is not None:
        history += batch * (T - 1) * channels
    taps = load_taps(weight, d, channel, T)
    bias_row = tl.load(bias + d, mask=channel, other=0.0).to(tl.float32)
    sums = window_sums(x, history, taps, bias_row, t, d, channel, length, channels, x_row, T)
    rows = out + (batch * length + t)[:, None] * channels + d[None, :]
    mask = (t < length)[:, None] & channel[None, :]
    tl.store(rows, (sums * sigmoid(sums)).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def conv_backward(
    grad,
    x,
    weight,
    bias,
    history,
    following,
    grad_x,
    first,
    shares,
    length,
    channels,
    tiles,
    spans,
    blocks,
    grad_batch,
    grad_row,
    x_batch,
    x_row,
    T: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
):
    """Write the gradient of x for `blocks` blocks of tokens, and what they add to the others.

    A token's input meets the window sums of the token itself and of T - 1 behind it; behind the
    last token these gradients are `following`'s (b, t - 1, e), or zero. `first` (b, t - 1, e)
    receives those of the first tokens. A program's row of `shares` holds (e, t) for the taps, then
    (e) for the bias.
    """
    program = tl.program_id(0).to(tl.int64)
    d = (program % tiles) * BE + tl.arange(0, BE)
    span = (program // tiles) % spans
    batch = program // (tiles * spans)
    channel = d < channels
    x += batch * x_batch
    grad += batch * grad_batch
    first += batch * (T - 1) * channels
    if history is not None:
        history += batch * (T - 1) * channels
    if following is not None:
        following += batch * (T - 1) * channels
    taps = load_taps(weight, d, channel, T)
    bias_row = tl.load(bias + d, mask=channel, other=0.0).to(tl.float32)
    of_bias = tl.zeros([BE], tl.float32)
    of_taps = ()
    for _ in tl.static_range(T):
        of_taps = of_taps + (tl.zeros([BE], tl.float32),)
    for i in range(blocks):
        t = (span * blocks + i) * BT + tl.arange(0, BT)
        total = tl.zeros([BT, BE], tl.float32)
        for j in tl.static_range(T):
            s = t + j
            sums = window_sums(
                x, history, taps, bias_row, s, d, channel, length, channels, x_row, T
            )
            opened = sigmoid(sums)
            own = (s < length)[:, None] & channel[None, :]
            dy = tl.load(grad + s[:, None] * grad_row + d[None, :], mask=own, other=0.0)
            inner = tl.where(own, dy.to(tl.float32) * opened * (1.0 + sums * (1.0 - opened)), 0.0)
            if j == 0:
                of_bias += tl.sum(inner, axis=0)
                added = ()
                for tap in tl.static_range(T):
                    at = t + (tap - (T - 1))
                    value = inputs_at(x, history, at, d, channel, length, channels, x_row, T)
                    added = added + (of_taps[tap] + tl.sum(inner * value, axis=0),)
                of_taps = added
            if following is not None:
                behind = ((s >= length) & (s < length + (T - 1)))[:, None] & channel[None, :]
                rows = following + (s - length)[:, None] * channels + d[None, :]
                inner += tl.load(rows, mask=behind, other=0.0)
            if j == 0:
                rows = first + t[:, None] * channels + d[None, :]
                tl.store(rows, inner, mask=(t < T - 1)[:, None] & channel[None, :])
            total += inner * taps[T - 1 - j][None, :]
        rows = grad_x + (batch * length + t)[:, None] * channels + d[None, :]
        mask = (t < length)[:, None] & channel[None, :]
        tl.store(rows, total.to(grad_x.dtype.element_ty), mask=mask)
    shares += (batch * spans + span) * (T + 1) * channels
    for tap in tl.static_range(T):
        tl.store(shares + d * T + tap, of_taps[tap], mask=channel)
    tl.store(shares + T * channels + d, of_bias, mask=channel)


def refusal(x: Tensor) -> str | None:
    """Why Triton cannot run this convolution; types and taps are the caller's to judge."""
    if triton.knobs.runtime.interpret or torch.version.hip is not None:
        return None
    if torch.cuda.get_device_capability(x.device) < CAPABILITY:
        return "needs compute capability 8.0 or newer"
    return None


def forward(x: Tensor, weight: Tensor, bias: Tensor, history: Tensor | None) -> Tensor:
    """See ``causal_conv.conv_silu``."""
    batch, length, channels = x.shape
    x, out = _rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = _tile(channels)
    tiles, spans = -(-channels // tile), -(-length // TOKENS)
    with on_device_of(x):
        conv_forward[(batch * spans * tiles,)](
            x=x,
            **_parameters(weight, bias, history),
            out=out,
            length=length,
            channels=channels,
            tiles=tiles,
            spans=spans,
            x_batch=x.stride(0),
            x_row=x.stride(1),
            BT=TOKENS,
            BE=tile,
            **OPTIONS,
        )
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    history: Tensor | None,
    following: Tensor | None,
    walked: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``causal_conv.conv_silu_backward``: gradients of x, weight, bias and the first sums.

    ``walked`` blocks of tokens are one program's; by shape when None.
    """
    (batch, length, channels), taps = x.shape, weight.shape[1]
    x, grad = _rows(x), _rows(grad)
    tile = _tile(channels)
    tiles, blocks = -(-channels // tile), -(-length // TOKENS)
    walked = walked or min(max(batch * blocks * tiles // PROGRAMS, 1), MOST_BLOCKS)
    spans = -(-blocks // walked)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    first = torch.empty((batch, taps - 1, channels), device=x.device)
    shares = torch.empty((batch * spans, (taps + 1) * channels), device=x.device)
    with on_device_of(x):
        conv_backward[(batch * spans * tiles,)](
            grad=grad,
            x=x,
            **_parameters(weight, bias, history),
            following=None if following is None or taps == 1 else following.float().contiguous(),
            grad_x=grad_x,
            first=first,
            shares=shares,
            length=length,
            channels=channels,
            tiles=tiles,
            spans=spans,
            blocks=walked,
            grad_batch=grad.stride(0),
            grad_row=grad.stride(1),
            x_batch=x.stride(0),
            x_row=x.stride(1),
            BT=TOKENS,
            BE=tile,
            **OPTIONS,
        )
    total = shares[0] if len(shares) == 1 else shares.sum(0)
    of_taps, of_bias = total.split_with_sizes([taps * channels, channels])
    return grad_x, of_taps.view(channels, taps), of_bias, first


def _parameters(weight: Tensor, bias: Tensor, history: Tensor | None) -> dict[str, Any]:
    taps = weight.shape[1]
    return {
        "weight": weight.contiguous(),
        "bias": bias.contiguous(),
        "history": None if history is None or taps == 1 else history.contiguous(),
        "T": taps,
    }


def _tile(channels: int) -> int:
    return NARROW if channels <= NARROW else WIDE


def _rows(values: Tensor) -> Tensor:
    return values if values.stride(-1) == 1 else values.contiguous()
