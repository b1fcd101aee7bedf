"""Group norm with ReLU over channels-last maps.

On CPU it runs chunk by chunk, twice over the map, and keeps only its input: torch's own kernel
takes twice as long for few channels, and sums squares in a way that costs it two digits.

Shapes: B batch, L voxels, C channels, G groups.
"""

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

from medmamba.kernels.placement import is_fake, on_cpu

EPS = 1e-5
CHUNK_VALUES = 1 << 16
"""Values per chunk: 0.25 MB in float32, so that the four buffers of the backward share an L2."""


WIDE = 512
"""Values of a row that several tokens make together."""


class GroupNormReLU(nn.Module):
    """Group normalisation of a channels-last map, then ReLU."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        if on_cpu(x):
            y = _GroupNormReLU.apply(x, self.weight, self.bias, self.groups)  # type: ignore[no-untyped-call]
            return cast(Tensor, y)
        y = functional.group_norm(x.movedim(-1, 1), self.groups, self.weight, self.bias, EPS)
        return functional.relu(y).movedim(1, -1)

    def by_token(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Measure a map, and return what then norms any of its tokens (B, n, C); no gradient."""
        mean, scale = _moments(x.flatten(1, -2), self.groups)
        slope = scale * self.weight
        shift = self.bias - mean * slope
        return lambda part: (
            torch.addcmul(shift, part.to(shift.dtype), slope).clamp_min_(0).to(part.dtype)
        )


class _GroupNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
        tokens = x.flatten(1, -2)
        mean, scale = _moments(tokens, groups)
        dtype, slope = mean.dtype, scale * weight
        shift = bias - mean * slope
        out = torch.empty_like(tokens)
        for sample, voxels in _chunks(tokens):
            wide, (slopes, shifts) = _widened(
                tokens[sample, voxels].to(dtype), slope[sample], shift[sample]
            )
            y = torch.addcmul(shifts, wide, slopes).clamp_min_(0)
            out[sample, voxels] = y.view(-1, tokens.shape[2])
        ctx.save_for_backward(x, weight, mean, scale, slope, shift)
        ctx.groups = groups  # type: ignore[attr-defined]
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, scale, slope, shift = ctx.saved_tensors  # type: ignore[attr-defined]
        groups: int = ctx.groups  # type: ignore[attr-defined]
        tokens, grads = x.flatten(1, -2), grad.reshape(x.shape).flatten(1, -2)
        passed = torch.empty(tokens.shape, dtype=mean.dtype)
        total, moment = torch.zeros_like(mean), torch.zeros_like(mean)
        for sample, voxels in _chunks(tokens):
            values = tokens[sample, voxels].to(mean.dtype)
            wide, (slopes, shifts) = _widened(values, slope[sample], shift[sample])
            y = torch.addcmul(shifts, wide, slopes).view(values.shape)
            part = torch.ops.aten.threshold_backward(grads[sample, voxels].to(mean.dtype), y, 0)
            passed[sample, voxels] = part
            total[sample] += part.sum(0)
            moment[sample] += torch.mul(part, values, out=y).sum(0)
        # From here on the moment is that of the normalised input.
        moment = (moment - mean * total) * scale
        voxels_count = tokens.shape[1]
        constant = -scale * _group_mean(total * weight / voxels_count, groups)
        linear = -scale * scale * _group_mean(moment * weight / voxels_count, groups)
        constant = constant - linear * mean
        grad_x = passed if passed.dtype == x.dtype else torch.empty_like(tokens)
        for sample, voxels in _chunks(tokens):
            values = tokens[sample, voxels].to(mean.dtype)
            wide, (slopes, factors, constants) = _widened(
                values, slope[sample], linear[sample], constant[sample]
            )
            y = torch.addcmul(constants, wide, factors)
            y.addcmul_(passed[sample, voxels].view(wide.shape), slopes)
            grad_x[sample, voxels] = y.view(values.shape)
        weight_grad = moment.sum((0, 1)).to(weight.dtype)
        return grad_x.view(x.shape), weight_grad, total.sum((0, 1)).to(weight.dtype), None


def _moments(tokens: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation of each channel's group, (B, 1, C)."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    mean = _group_mean(tokens.mean(1, keepdim=True, dtype=dtype), groups)
    squares = torch.zeros_like(mean)
    for sample, voxels in _chunks(tokens):
        wide, (means,) = _widened(tokens[sample, voxels], mean[sample])
        offset = wide - means
        squares[sample] += offset.mul_(offset).view(-1, tokens.shape[2]).sum(0)
    variance = _group_mean(squares / tokens.shape[1], groups)
    return mean, (variance + EPS).rsqrt()


def _widened(part: Tensor, *rows: Tensor) -> tuple[Tensor, list[Tensor]]:
    """View a chunk (n, C) with several tokens to a row, and repeat rows (1, C) to that width.

    Torch's loop over a broadcast row is one over its values: with 8 of them it takes four times
    as long as with WIDE.
    """
    channels = part.shape[1]
    fold = max(1, WIDE // channels)
    if not part.is_contiguous() or len(part) % fold:
        return part, list(rows)
    return part.view(-1, fold * channels), [row.repeat(1, fold) for row in rows]


def _group_mean(values: Tensor, groups: int) -> Tensor:
    """Replace (B, 1, C) by the mean over the channels of each group."""
    grouped = values.view(values.shape[0], groups, -1)
    return grouped.mean(-1, keepdim=True).expand_as(grouped).reshape(values.shape)


def _chunks(tokens: Tensor) -> Iterator[tuple[int, slice]]:
    batch, length, channels = tokens.shape
    size = max(64, CHUNK_VALUES // max(1, channels))
    if is_fake(tokens):
        # A fake tensor has nothing to keep in cache: estimates need no thousand chunks.
        size = length
    for sample in range(batch):
        for start in range(0, length, size):
            yield sample, slice(start, min(start + size, length))
