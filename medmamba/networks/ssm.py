"""State-space modules of the networks: the Mamba block, and the scan over several directions.

Owns parameters, their official names and their initialisation, and the order of operations
around the scan. The scan is ``medmamba.kernels``; which layer stands where is the networks'.

Shapes: B batch, L tokens (D·H·W in raster order), C model width, E = expand·C inner width,
N state size, R rank of the step size, K scan directions, G groups.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from medmamba.errors import PlanError
from medmamba.kernels.directions import DirectionWeights, scan_direction
from medmamba.kernels.mamba_block import (
    MambaWeights,
    chunk_length,
    layer_chunk,
    mamba_block,
    mamba_layer,
)
from medmamba.networks.channels_last import depthwise_conv
from medmamba.networks.directions import (
    SIAMESE,
    Direction,
    count_directions,
    directions,
    require_merge,
    views,
    walk,
    walk_back,
)

DEFAULT_STATE = 16
DEFAULT_CONV = 4
DEFAULT_EXPAND = 2
RANK_DIVISOR = 16
"""R = ceil(C / 16): Mamba's "auto" rank."""

STEP_MIN, STEP_MAX, STEP_FLOOR = 1e-3, 1e-1, 1e-4
"""Range of the initial step sizes and the clamp below (Gu and Dao 2023, section 3.6; code)."""


class ScanBranch(nn.Module):
    """What one scan direction of a Mamba block owns: convolution, projections, A, D, step bias."""

    def __init__(self, inner: int, rank: int, *, d_state: int, d_conv: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(initial_log_decay(inner, d_state))
        self.D = nn.Parameter(torch.ones(inner))
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        initialize_step_(self.dt_proj.weight, self.dt_proj.bias)


class Mamba(ScanBranch):
    """Mamba block (Gu and Dao 2023) over the tokens of a map, along one or several scan orders.

    With the order "raster" it is ``mamba_ssm.Mamba``, names included. Further directions, as in
    Vim (Zhu et al. 2024), have their own convolution and scan tensors (``directions.{k}``) and
    share both outer projections; their outputs are summed or averaged. "siamese-flip" (nnMamba,
    Gong et al. 2024) always averages its four views.

    Args:
        d_model: C, channels of a token.
        dimension: of the map whose tokens are mixed.
        d_state: N, size of the state per inner channel.
        d_conv: taps of the causal convolution.
        expand: E / C.
        order: name of a scan order.
        merge: "sum" or "mean" over directions.
        reverse: let a local bidirectional scan run backwards, as every second layer does.
    """

    def __init__(
        self,
        d_model: int,
        dimension: int = 3,
        *,
        d_state: int = DEFAULT_STATE,
        d_conv: int = DEFAULT_CONV,
        expand: int = DEFAULT_EXPAND,
        order: str = "raster",
        merge: str = "sum",
        reverse: bool = False,
    ) -> None:
        require_sizes(d_state=d_state, d_conv=d_conv, expand=expand)
        inner, rank = expand * d_model, step_rank(d_model)
        super().__init__(inner, rank, d_state=d_state, d_conv=d_conv)
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        self.order, self.reverse = order, reverse
        self.averages = require_merge(merge, ("sum", "mean")) == "mean" or order == SIAMESE
        further = count_directions(order, dimension) - 1
        if further:
            self.directions = nn.ModuleList(
                ScanBranch(inner, rank, d_state=d_state, d_conv=d_conv) for _ in range(further)
            )

    def forward(self, tokens: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Return (B, L, C) for tokens (B, L, C) in raster order of a map of ``shape``.

        The shape may be left out where the order needs none (raster, and both ways along it).
        """
        if self.order == "raster":
            return mamba_block(tokens, self.weights(self))
        ways = directions(
            self.order, shape or tokens.shape[1:2], tokens.device, reverse=self.reverse
        )
        branches: list[ScanBranch] = [self, *getattr(self, "directions", ())]
        total: Tensor | None = None
        for number, way in enumerate(ways):
            weights = self.weights(branches[number % len(branches)])
            mixed = mamba_block(walk(tokens, way), weights, segment=way.segment)
            part = walk_back(mixed, way, tokens.shape[0])
            total = part if total is None else total + part
        assert total is not None
        return total / len(ways) if self.averages else total

    def layer_chunk(self, tokens: Tensor) -> int:
        """Return the tokens of a chunk of ``around``; 0 where the layer is evaluated as a whole."""
        return layer_chunk(tokens, self.weights(self)) if self.order == "raster" else 0

    def around(
        self,
        tokens: Tensor,
        before: Callable[[Tensor], Tensor],
        after: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Return ``after(block(before(tokens)), tokens)``, in chunks of ``layer_chunk``.

        Args:
            tokens: (B, L, C), of the layer that holds this block.
            before: token by token, makes the block's input.
            after: token by token, makes the layer's output.
        """
        length = self.layer_chunk(tokens)
        return mamba_layer(tokens, self.weights(self), before=before, after=after, length=length)

    def weights(self, branch: ScanBranch) -> MambaWeights:
        """Return the tensors with which ``branch`` evaluates one Mamba block."""
        assert branch.conv1d.bias is not None
        return MambaWeights(
            in_proj=self.in_proj.weight,
            conv_weight=branch.conv1d.weight,
            conv_bias=branch.conv1d.bias,
            x_proj=branch.x_proj.weight,
            dt_proj=branch.dt_proj.weight,
            dt_bias=branch.dt_proj.bias,
            A_log=branch.A_log,
            D=branch.D,
            out_proj=self.out_proj.weight,
        )


class DirectionalScan(nn.Module):
    """SS2D of VMamba (Liu et al. 2024, figure 3), for maps of two or three axes.

    A depthwise convolution sees all neighbours; then every direction of the scan order has its
    own projections, decay and skip, and shares the input, the norm, the gate and the output.
    With the order "cross" in 2D it is the official SS2D, names included: rows, columns, and both
    backwards. In 3D "cross" has six directions.

    Args:
        d_model: C, channels of a token.
        dimension: 2 or 3.
        d_state: N.
        d_conv: side of the depthwise kernel.
        expand: E / C.
        order: name of a scan order.
        merge: "sum", "mean", or "attention", which weighs directions channel by channel
            (shuffle attention of MaIR, Li et al. 2025).
        reverse: let a local bidirectional scan run backwards, as every second layer does.
    """

    def __init__(
        self,
        d_model: int,
        dimension: int,
        *,
        d_state: int = DEFAULT_STATE,
        d_conv: int = 3,
        expand: int = DEFAULT_EXPAND,
        order: str = "cross",
        merge: str = "sum",
        reverse: bool = False,
    ) -> None:
        super().__init__()
        require_sizes(d_state=d_state, d_conv=d_conv, expand=expand)
        if d_conv % 2 == 0:
            raise PlanError(f"option d_conv is {d_conv}; give an odd number, the side of a kernel.")
        inner, rank = expand * d_model, step_rank(d_model)
        count = count_directions(order, dimension)
        self.dimension, self.d_state = dimension, d_state
        self.order, self.reverse = order, reverse
        self.merge = require_merge(merge, ("sum", "mean", "attention"))
        self.x_proj_weight = nn.Parameter(torch.empty(count, rank + 2 * d_state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(count, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(count, inner))
        self.A_logs = nn.Parameter(initial_log_decay(count * inner, d_state))
        self.Ds = nn.Parameter(torch.ones(count * inner))
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        make = {2: nn.Conv2d, 3: nn.Conv3d}[dimension]
        self.conv_name = f"conv{dimension}d"
        self.add_module(self.conv_name, make(inner, inner, d_conv, groups=inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        bound = inner**-0.5
        nn.init.uniform_(self.x_proj_weight, -bound, bound)
        initialize_step_(self.dt_projs_weight, self.dt_projs_bias)
        if self.merge == "attention":
            self.attention = DirectionAttention(inner, views(order, dimension))

    def forward(self, tokens: Tensor, shape: Sequence[int]) -> Tensor:
        """Return (B, L, C) for tokens (B, L, C) in raster order of a map of ``shape``.

        A large map is streamed: its directions go through it in chunks, and the backward pass
        computes the block a second time, so that only its input is kept.
        """
        chunk = 0
        if not torch.compiler.is_compiling():
            chunk = chunk_length(tokens, self.out_norm.normalized_shape[0])
        if not chunk or not torch.is_grad_enabled():
            return self._block(tokens, shape, chunk)
        out: Tensor = checkpoint(
            self._block, tokens, shape, chunk, use_reentrant=False, preserve_rng_state=False
        )
        return out

    def _block(self, tokens: Tensor, shape: Sequence[int], chunk: int) -> Tensor:
        x, gate = self.in_proj(tokens).chunk(2, dim=-1)
        conv = cast(nn.Conv2d | nn.Conv3d, self.get_submodule(self.conv_name))
        x = x.reshape(*tokens.shape[:1], *shape, x.shape[-1])
        x = functional.silu(depthwise_conv(x, conv.weight, conv.bias)).flatten(1, -2)
        ways = directions(self.order, shape, tokens.device, reverse=self.reverse)
        parts = (self._scan(x, way, index, chunk) for index, way in enumerate(ways))
        y = self.attention(list(parts)) if self.merge == "attention" else sum_in_order(parts)
        if self.merge == "mean":
            y = y / len(ways)
        y = self.out_norm(y) * functional.silu(gate)
        out: Tensor = self.out_proj(y)
        return out

    def _scan(self, x: Tensor, way: Direction, index: int, chunk: int) -> Tensor:
        """Scan x (B, L, E) one way; (B, L, E) in raster order, in float32 at least."""
        index %= len(self.x_proj_weight)
        own = slice(index * x.shape[2], (index + 1) * x.shape[2])
        weights = DirectionWeights(
            x_proj=self.x_proj_weight[index],
            dt_proj=self.dt_projs_weight[index],
            dt_bias=self.dt_projs_bias[index],
            A_log=self.A_logs[own],
            D=self.Ds[own],
        )
        x = x.flip(2) if way.flip_channels else x
        y = scan_direction(x, weights, way.order, segment=way.segment, chunk=chunk)
        return y.flip(2) if way.flip_channels else y


class DirectionAttention(nn.Module):
    """Sum of direction outputs, each weighed per channel by what all directions found on average.

    Args:
        channels: E.
        count: K, outputs to merge.
    """

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        bound = count**-0.5
        self.weight = nn.Parameter(torch.empty(channels, count, count).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels, count).uniform_(-bound, bound))

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        """Return (B, L, E) for K maps (B, L, E)."""
        means = torch.stack([part.mean(dim=1) for part in parts], dim=-1)
        weights = torch.sigmoid(torch.einsum("ekj,bej->bek", self.weight, means) + self.bias)
        return sum_in_order([part * weights[:, None, :, index] for index, part in enumerate(parts)])


def sum_in_order(parts: Iterable[Tensor]) -> Tensor:
    """Sum from first to last, so that the rounding is the same everywhere."""
    return functools.reduce(torch.add, parts)


def require_sizes(**sizes: int) -> None:
    """Refuse option values that are no positive whole numbers.

    Raises:
        PlanError: naming the option and its value.
    """
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise PlanError(f"option {name} is {value!r}; give a whole number from 1.")


def step_rank(d_model: int) -> int:
    """Return R for a model width C."""
    return math.ceil(d_model / RANK_DIVISOR)


def initial_log_decay(channels: int, state: int) -> Tensor:
    """Return log(1..N) in every row: S4D-real, the decay A = -n (Gu and Dao 2023, section 3.6)."""
    return torch.log(torch.arange(1, state + 1, dtype=torch.float32)).repeat(channels, 1)


@torch.no_grad()
def initialize_step_(weight: Tensor, bias: Tensor) -> None:
    """Fill a step projection so that steps start log-uniform in [STEP_MIN, STEP_MAX].

    Args:
        weight: (..., E, R).
        bias: (..., E); receives the inverse softplus of the steps drawn.
    """
    bound = weight.shape[-1] ** -0.5
    weight.uniform_(-bound, bound)
    low, high = math.log(STEP_MIN), math.log(STEP_MAX)
    step = torch.exp(torch.rand_like(bias) * (high - low) + low).clamp(min=STEP_FLOOR)
    bias.copy_(step + torch.log(-torch.expm1(-step)))
