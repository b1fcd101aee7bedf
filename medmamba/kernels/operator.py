"""The scan as a torch operator: schema, fake kernels, autograd, and the function people call.

Owns `medmamba::selective_scan` and `medmamba::selective_scan_bwd`; backend.py chooses what runs.
Registered with Library.define/impl because the dispatch cost matters where sequences are short.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from medmamba.errors import KernelError
from medmamba.kernels import triton_cut
from medmamba.kernels.arguments import (
    MAX_ORDER_LENGTH,
    Gradients,
    Needs,
    ScanArguments,
    check_options,
    check_tensors,
    empty_rows,
)
from medmamba.kernels.backend import choose
from medmamba.kernels.eager import is_plain, once_per_kind
from medmamba.kernels.placement import is_on_gpu
from medmamba.kernels.scan_order import INTEGERS, ScanOrder, require_permutation

_TENSORS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? skip, Tensor? gate, " + (
    "Tensor? delta_bias, Tensor? h0, Tensor? order"
)
_OPTIONS = (
    "bool delta_softplus, bool reverse, SymInt reset_every, SymInt segment, ScalarType out_dtype"
)
_FORWARD = (
    f"selective_scan({_TENSORS}, {_OPTIONS}, bool save_states)"
    " -> (Tensor out, Tensor h_last, Tensor states)"
)
_BACKWARD = (
    "selective_scan_bwd(Tensor? grad_out, Tensor? grad_h_last, Tensor states, "
    f"{_TENSORS}, {_OPTIONS}, bool[] needs) -> Tensor[]"
)
_DIFFERENTIABLE = len(Needs._fields)
_REQUIRED = 5  # the first of them: u, delta, A, B, C
_TENSOR_COUNT = _DIFFERENTIABLE + 1  # with the order
_NAMES = (
    *Needs._fields,
    "order",
    "delta_softplus",
    "reverse",
    "reset_every",
    "segment",
    "out_dtype",
)

_make_library: Any = torch.library.Library  # has no annotations
_library = _make_library("medmamba", "FRAGMENT")
_library.define(_FORWARD)
_library.define(_BACKWARD)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    skip: Tensor | None = None,
    gate: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    h0: Tensor | None = None,
    return_last_state: bool = False,
    out_dtype: torch.dtype | None = None,
    order: ScanOrder | Tensor | None = None,
    reset_every: int = 0,
    segment: int = 0,
    layout: str = "channels_last",
) -> Any:
    """Selective scan of Mamba with everything around it fused; see reference.py for the equations.

    Args:
        u: input (batch, length, channels) of float32, bfloat16, float16; float64 runs reference.py.
        delta: step sizes before bias and softplus, like u.
        A: real decay rates (channels, state), negative in practice.
        B: input projection (batch, length, groups, state), or without groups.
        C: output projection, like B.
        skip: the paper's D (channels,).
        gate: the paper's z, like u; the output is multiplied by silu(gate).
        delta_bias: (channels,), added to delta before softplus.
        delta_softplus: whether the step sizes are softplus(delta + delta_bias).
        h0: initial state (batch, channels, state), differentiable.
        return_last_state: return (out, h_last); h_last is differentiable.
        out_dtype: type of the output; u's when omitted.
        order: a scan order or a table of token indices by position; raster when omitted. A table is
            looked through at every call, which a GPU must wait for; a scan order once.
        reset_every: zero the state every so many positions; overrides the order's own when not 0.
        segment: length of local-bidirectional segments; 0 is a causal scan.
        layout: "channels_last", or "channels_first" for (batch, channels, length) and
            (batch, groups, state, length), which is also the output's layout then.

    Returns:
        out like u, or (out, h_last) with h_last (batch, channels, state).

    Raises:
        KernelError: an argument that cannot be used; names it, its shape and what was expected.
    """
    if layout == "channels_first":
        u, delta = _tokens_first("u", u), _tokens_first("delta", delta)
        gate = None if gate is None else _tokens_first("gate", gate)
        B, C = _projection_by_token("B", B), _projection_by_token("C", C)
    elif layout != "channels_last":
        raise KernelError(f"layout is {layout!r}; give 'channels_last' or 'channels_first'")
    if isinstance(order, ScanOrder):
        reset_every = reset_every or order.reset_every
    arguments = _canonical(
        (u, delta, A, B, C, skip, gate, delta_bias, h0),
        order=order,
        delta_softplus=delta_softplus,
        reset_every=reset_every,
        segment=segment,
        out_dtype=out_dtype,
    )
    values = [getattr(arguments, name) for name in _NAMES]
    plain = is_plain(values[:_TENSOR_COUNT])
    if plain:
        once_per_kind(values[:_DIFFERENTIABLE], lambda: check_tensors(arguments))
    else:
        check_tensors(arguments)
    check_options(arguments)
    if isinstance(order, Tensor) and not torch.compiler.is_compiling():
        require_permutation(order)
    tracked = torch.is_grad_enabled() and any(
        value is not None and value.requires_grad for value in values[:_DIFFERENTIABLE]
    )
    if plain and not tracked:
        out, h_last, _ = choose(arguments).forward(arguments, save_states=False)
    elif plain:
        apply: Any = _Scan.apply  # has no annotations
        out, h_last, _ = apply(*values, True)
    elif tracked or torch.compiler.is_compiling():
        out, h_last, _ = _SCAN(*values, tracked)
    elif forward_ad._current_level >= 0 and any(map(_has_tangent, values)):
        raise KernelError(
            "the scan has no forward-mode gradient (jvp); use the backward pass, or detach its "
            "arguments"
        )
    else:  # nothing for autograd to do, whose Python costs as much as a short scan
        out, h_last, _ = _below_autograd(_SCAN, (*values, False))
    if layout == "channels_first":
        out = out.mT
    return (out, h_last) if return_last_state else out


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """The public Mamba signature: channels first, D and z by the paper's letters.

    Args:
        u: (batch, channels, length); delta and z like it.
        delta: step sizes.
        A: (channels, state).
        B: (batch, state, length) or (batch, groups, state, length).
        C: like B.
        D: (channels,).
        z: gate.
        delta_bias: (channels,).
        delta_softplus: whether the step sizes are softplus(delta + delta_bias).
        return_last_state: return the state after the last token too.

    Returns:
        out (batch, channels, length), or (out, last_state (batch, channels, state)).
    """
    return selective_scan(
        u,
        delta,
        A,
        B,
        C,
        skip=D,
        gate=z,
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
        return_last_state=return_last_state,
        layout="channels_first",
    )


def _has_tangent(value: object) -> bool:
    unpack: Any = forward_ad.unpack_dual  # has no annotations
    return isinstance(value, Tensor) and unpack(value).tangent is not None


def _tokens_first(name: str, rows: Tensor) -> Tensor:
    _require_tensor(name, rows)
    if rows.dim() != 3:
        raise KernelError(
            f"{name} has shape {tuple(rows.shape)}; expected (batch, channels, length)"
        )
    return rows.mT


def _projection_by_token(name: str, projection: Tensor) -> Tensor:
    _require_tensor(name, projection)
    if projection.dim() not in (3, 4):
        raise KernelError(
            f"{name} has shape {tuple(projection.shape)}; "
            "expected (batch, groups, state, length) or (batch, state, length)"
        )
    return projection.movedim(-1, 1)


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise KernelError(f"{name} is {type(value).__name__}; expected a tensor")


def _canonical(
    tensors: tuple[Tensor | None, ...],
    *,
    order: ScanOrder | Tensor | None,
    delta_softplus: bool,
    reset_every: int,
    segment: int,
    out_dtype: torch.dtype | None,
) -> ScanArguments:
    """Give B and C their group dimension, and parameters and state the compute type."""
    for at, value in enumerate(tensors):
        if not isinstance(value, Tensor) and (value is not None or at < _REQUIRED):
            _require_tensor(Needs._fields[at], value)
    u, delta, A, B, C, skip, gate, delta_bias, h0 = tensors
    assert u is not None and delta is not None and A is not None
    assert B is not None and C is not None
    wide = torch.float64
    activations = (u, delta, B, C) if gate is None else (u, delta, B, C, gate)
    dtype = wide if any(value.dtype is wide for value in activations) else torch.float32
    table, reverse = order, False
    if isinstance(order, ScanOrder):
        table, reverse = order.index, order.reverse
    assert not isinstance(table, ScanOrder)
    return ScanArguments(
        u=u,
        delta=delta,
        A=_wide(A, dtype),
        B=B.unsqueeze(2) if B.dim() == 3 else B,
        C=C.unsqueeze(2) if C.dim() == 3 else C,
        skip=None if skip is None else _wide(skip, dtype),
        gate=gate,
        delta_bias=None if delta_bias is None else _wide(delta_bias, dtype),
        h0=None if h0 is None else _wide(h0, dtype),
        order=None if table is None else _short(table),
        reverse=reverse,
        delta_softplus=delta_softplus,
        reset_every=reset_every,
        segment=segment,
        out_dtype=u.dtype if out_dtype is None else out_dtype,
    )


def _wide(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter or state in the compute type; what is not real is left for the check to name."""
    if parameter.dtype is dtype or not parameter.dtype.is_floating_point:
        return parameter
    return parameter.to(dtype)


def _short(table: Tensor) -> Tensor:
    """An order as int32. Tokens that no int32 holds become one that is certainly wrong."""
    _require_tensor("order", table)
    if table.dtype is torch.int64:
        return table.clamp(-1, MAX_ORDER_LENGTH).to(torch.int32)
    return table.to(torch.int32) if table.dtype in INTEGERS else table


def _forward(*values: Any) -> tuple[Tensor, Tensor, Tensor]:
    arguments = _arguments(values)
    out, h_last, states = choose(arguments).forward(arguments, save_states=values[-1])
    # flat, so that a program exported for any length need not ask whether there is one chunk
    return out, h_last, states.reshape(-1)


def _forward_fake(*values: Any) -> tuple[Tensor, Tensor, Tensor]:
    arguments = _arguments(values)
    dtype, u = arguments.compute_dtype, arguments.u
    shape_of = triton_cut.states_shape if is_on_gpu() else choose(arguments).states_shape
    states = math.prod(shape_of(arguments)) if values[-1] else 0
    return (
        empty_rows(u, arguments.out_dtype),
        u.new_empty((arguments.batch, arguments.channels, arguments.state), dtype=dtype),
        u.new_empty(states, dtype=dtype),
    )


def _backward(
    grad_out: Tensor | None, grad_h_last: Tensor | None, states: Tensor, *values: Any
) -> list[Tensor]:
    arguments = _arguments(values)
    needs = _needs(arguments, values[-1])
    grads = _gradients(grad_out, grad_h_last, states, arguments, needs)
    return [arguments.u.new_empty(0) if value is None else value for value in grads]


def _gradients(
    grad_out: Tensor | None,
    grad_h_last: Tensor | None,
    states: Tensor,
    arguments: ScanArguments,
    needs: Needs,
) -> list[Tensor | None]:
    backend = choose(arguments)
    states = states.view(backend.states_shape(arguments))
    grads = backend.backward(arguments, states, grad_out, grad_h_last, needs)
    return [
        _zeros(arguments, name) if value is None and needed else value if needed else None
        for name, value, needed in zip(Gradients._fields, grads, needs, strict=True)
    ]


def _backward_fake(
    grad_out: Tensor | None, grad_h_last: Tensor | None, states: Tensor, *values: Any
) -> list[Tensor]:
    arguments = _arguments(values)
    needs = _needs(arguments, values[-1])
    return [
        _gradient_like(arguments, name) if needed else arguments.u.new_empty(0)
        for name, needed in zip(Gradients._fields, needs, strict=True)
    ]


def _zeros(arguments: ScanArguments, name: str) -> Tensor:
    return _gradient_like(arguments, name).zero_()


def _gradient_like(arguments: ScanArguments, name: str) -> Tensor:
    value: Tensor = getattr(arguments, name)
    if name in ("u", "delta", "gate"):
        return empty_rows(value, value.dtype)
    return torch.empty(value.shape, dtype=value.dtype, device=value.device)


def _arguments(values: Sequence[Any]) -> ScanArguments:
    return ScanArguments(**dict(zip(_NAMES, values, strict=False)))


def _needs(arguments: ScanArguments, needs: Sequence[bool]) -> Needs:
    present = (getattr(arguments, name) is not None for name in Needs._fields)
    return Needs(*(need and here for need, here in zip(needs, present, strict=True)))


class _Scan(torch.autograd.Function):
    """Autograd of the operator, itself at the autograd key.

    torch.library.register_autograd does the same, and spends 0.4 ms a call on reading the schema.
    """

    @staticmethod
    def forward(ctx: Any, *values: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Run below autograd and keep the inputs and the chunk states."""
        plain = is_plain(values[:_TENSOR_COUNT])
        out, h_last, states = _forward(*values) if plain else _below_autograd(_SCAN, values)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(states)
        ctx.save_for_backward(*values[:_TENSOR_COUNT], states)
        ctx.options = values[_TENSOR_COUNT:-1]
        return out, h_last, states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the tensors that want one."""
        *tensors, states = ctx.saved_tensors
        needs = ctx.needs_input_grad[:_DIFFERENTIABLE]
        values = (*tensors, *ctx.options)
        found: Sequence[Tensor | None]
        if not torch.is_grad_enabled() and is_plain((*grads[:2], states, *tensors)):
            found = _gradients(grads[0], grads[1], states, _arguments(values), Needs(*needs))
        else:
            found = _SCAN_BACKWARD(grads[0], grads[1], states, *values, list(needs))
        wanted = (
            grad if need and tensor is not None else None
            for grad, need, tensor in zip(found, needs, tensors, strict=False)
        )
        return (*wanted, *[None] * (len(_NAMES) + 1 - _DIFFERENTIABLE))


class _ScanBackward(torch.autograd.Function):
    """The gradient operator where somebody means to differentiate it again."""

    @staticmethod
    def forward(ctx: Any, *values: Any) -> tuple[Tensor, ...]:
        """Run below autograd."""
        return tuple(_below_autograd(_SCAN_BACKWARD, values))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """There is none."""
        raise KernelError(
            "the scan has no second-order gradient; do not differentiate through its gradient "
            "(create_graph=True), or detach it first"
        )


def _autograd(*values: Any) -> Any:
    # without saved states there is no backward: the caller has seen that nothing wants a gradient
    apply: Any = _Scan.apply  # has no annotations
    return apply(*values) if values[-1] else _below_autograd(_SCAN, values)


def _autograd_backward(*values: Any) -> list[Tensor]:
    tracked = torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in values
    )
    if tracked:
        apply: Any = _ScanBackward.apply
        return list(apply(*values))
    found: list[Tensor] = _below_autograd(_SCAN_BACKWARD, values)
    return found


def backward_buffers(values: Sequence[Any]) -> int:
    """Bytes that the backward of a scan takes on a GPU beside its results, for estimates.

    Args:
        values: the arguments of the operator of the backward.
    """
    return triton_cut.backward_bytes(_arguments(values[3:]))


def _below_autograd(function: Any, values: Sequence[Any]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return function(*values)


_SCAN = torch.ops.medmamba.selective_scan.default
_SCAN_BACKWARD = torch.ops.medmamba.selective_scan_bwd.default
_library.impl("selective_scan", _forward, "CompositeExplicitAutograd")
_library.impl("selective_scan_bwd", _backward, "CompositeExplicitAutograd")
_library.impl("selective_scan", _autograd, "Autograd")
_library.impl("selective_scan_bwd", _autograd_backward, "Autograd")
torch.library.register_fake("medmamba::selective_scan", _forward_fake, lib=_library)
torch.library.register_fake("medmamba::selective_scan_bwd", _backward_fake, lib=_library)
