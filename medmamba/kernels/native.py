"""The compiled scan for CPUs: what it can do, and where its results are allocated.

The algorithm is in kernels/cpu; native_call.py hands tensors over. Local-bidirectional segments
that do not fit a tile of the kernel are two walks: the causal one, and one backwards in which each
token reads the state without its own input, zeroed where a segment ends.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from medmamba.kernels import _native
from medmamba.kernels.arguments import Gradients, Needs, ScanArguments, empty_rows
from medmamba.kernels.native_call import (
    NO_ROWS,
    TYPES,
    Walk,
    call,
    instruction_set,
    pointer_of,
    readable,
    rows_of,
    scan_inputs,
)

# as in kernels/cpu/problem.hpp
TILE = 32  # tokens between two stored states
LANES = 16  # channels of a block
STATE_PADDING = 4
FORWARDS = Walk()


def refusal(arguments: ScanArguments) -> str | None:
    """CPU tensors of float32, bfloat16 and float16."""
    if arguments.u.device.type != "cpu":
        return f"runs on CPU tensors, not on {arguments.u.device.type}"
    if arguments.compute_dtype is not torch.float32:
        return f"computes in float32; {arguments.compute_dtype} is left to the definition"
    if arguments.out_dtype not in TYPES:
        return f"writes float32, bfloat16 and float16, not {arguments.out_dtype}"
    return None


def description() -> str:
    """Instruction set and threads in use."""
    chosen = instruction_set() or _native.instruction_sets()[0]
    return f"instruction set {chosen}, {torch.get_num_threads()} threads"


def states_shape(arguments: ScanArguments) -> tuple[int, ...]:
    """(b, tiles, blocks of channels, padded state, lanes); `_native.states_shape` says the same.

    With long segments there is one such tensor per walk. Computed here so that symbolic sizes
    stay symbolic.
    """
    long = arguments.segment > TILE
    tile = TILE
    if arguments.segment and not long:
        tile = TILE // arguments.segment * arguments.segment
    groups = max(arguments.groups, 1)
    blocks = groups * -(-(arguments.channels // groups) // LANES)
    states = -(-arguments.state // STATE_PADDING) * STATE_PADDING
    shape = (arguments.batch, -(-arguments.length // tile), blocks, states, LANES)
    return (2, *shape) if long else shape


def forward(arguments: ScanArguments, *, save_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scan; see backend.py for the contract."""
    states = torch.empty(states_shape(arguments) if save_states else (0,))
    if arguments.segment <= TILE:
        out, h_last = _scan(arguments, states if save_states else None, FORWARDS, None)
        return out, h_last, states
    ahead, behind = (states[0], states[1]) if save_states else (None, None)
    partial, _ = _scan(*_behind(arguments, behind), None)
    out, h_last = _scan(replace(arguments, segment=0), ahead, FORWARDS, partial)
    return out, h_last, states


def backward(
    arguments: ScanArguments,
    states: Tensor,
    grad_out: Tensor | None,
    grad_h_last: Tensor | None,
    needs: Needs,
) -> Gradients:
    """Gradients; see backend.py for the contract."""
    last = None if grad_h_last is None else grad_h_last.float().contiguous()
    if arguments.segment <= TILE:
        return _differentiate(arguments, states, FORWARDS, grad_out, last, needs)
    return _differentiate_long(arguments, states, grad_out, last, needs)


def _behind(
    arguments: ScanArguments, states: Tensor | None
) -> tuple[ScanArguments, Tensor | None, Walk]:
    """The walk backwards over long segments, before gate and skip."""
    walked = replace(
        arguments,
        reverse=not arguments.reverse,
        reset_every=arguments.segment,
        segment=0,
        skip=None,
        gate=None,
        h0=None,
        out_dtype=torch.float32,
    )
    walk = Walk(reset_offset=-arguments.length % arguments.segment, exclusive=True)
    return walked, states, walk


def _scan(
    arguments: ScanArguments, states: Tensor | None, walk: Walk, partial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Out and last state of one walk; `partial` (b, l, d) is added before the gate."""
    out = empty_rows(arguments.u, arguments.out_dtype)
    h_last = torch.empty((arguments.batch, arguments.channels, arguments.state))
    values, keep = scan_inputs(arguments, states, walk)
    added = NO_ROWS if partial is None else rows_of(partial)
    call(_native.forward, [*values, *added, *rows_of(out), h_last.data_ptr()])
    del keep
    return out, h_last


def _differentiate(
    arguments: ScanArguments,
    states: Tensor,
    walk: Walk,
    grad_out: Tensor | None,
    grad_h_last: Tensor | None,
    needs: Needs,
) -> Gradients:
    """Gradients of one walk."""
    values, keep = scan_inputs(arguments, states, walk)
    grad_out = None if grad_out is None else readable(grad_out)
    grads = {
        name: _empty_gradient(name, getattr(arguments, name))
        for name, needed in zip(Needs._fields, needs, strict=True)
        if needed and getattr(arguments, name) is not None
    }
    values += [*rows_of(grad_out), pointer_of(grad_h_last)]
    for name in ("u", "delta", "gate", "B", "C"):
        values += rows_of(grads.get(name))
    values += [pointer_of(grads.get(name)) for name in ("A", "skip", "delta_bias", "h0")]
    call(_native.backward, values)
    del keep
    return Gradients(**grads)


def _differentiate_long(
    arguments: ScanArguments,
    states: Tensor,
    grad_out: Tensor | None,
    grad_h_last: Tensor | None,
    needs: Needs,
) -> Gradients:
    """Both walks of long segments, added in float32; the gate, which they share, in torch."""
    rows = ("u", "delta", "B", "C")
    plain = replace(
        arguments,
        **{name: getattr(arguments, name).float() for name in rows},
        gate=None,
        out_dtype=torch.float32,
    )
    grad = None if grad_out is None else grad_out.float()
    grad_gate = None
    if arguments.gate is not None and grad is not None:
        gate = arguments.gate.float()
        if needs.gate:
            y = forward(plain, save_states=False)[0]
            grad_gate = torch.ops.aten.silu_backward(grad * y, gate).to(arguments.gate.dtype)
        grad = grad * functional.silu(gate)
    causal = replace(plain, segment=0)
    first = _differentiate(causal, states[0], FORWARDS, grad, grad_h_last, needs)
    walked, walked_states, walk = _behind(plain, states[1])
    assert walked_states is not None
    second = _differentiate(walked, walked_states, walk, grad, None, needs)
    totals: dict[str, Tensor | None] = {"gate": grad_gate}
    for name in Needs._fields:
        one, other = getattr(first, name), getattr(second, name)
        if one is not None:
            total = one if other is None else one + other
            totals[name] = total.to(getattr(arguments, name).dtype)
    return Gradients(**totals)


def _empty_gradient(name: str, value: Tensor) -> Tensor:
    if name in ("u", "delta", "gate"):
        return empty_rows(value, value.dtype)
    return torch.empty(value.shape, dtype=value.dtype)
