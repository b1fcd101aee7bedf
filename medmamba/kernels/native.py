"""The compiled scan for CPUs: hands pointers, sizes and strides of torch tensors to `_native`.

Owns the order of the argument list (kernels/cpu/binding.cpp reads it) and where outputs are
allocated; the algorithm is in kernels/cpu.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from medmamba.errors import KernelError
from medmamba.kernels import _native
from medmamba.kernels.arguments import Gradients, Needs, ScanArguments, empty_rows

INSTRUCTION_SET_VARIABLE = "MEDMAMBA_CPU_ISA"  # for tests: v4, v3 or base
# as in kernels/cpu/problem.hpp
TILE = 64  # tokens between two stored states
LANES = 16  # channels of a block
STATE_PADDING = 4
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NO_ROWS = (0, 0, 0, 0, 1, 0)


def refusal(arguments: ScanArguments) -> str | None:
    """CPU tensors of float32, bfloat16 and float16."""
    if arguments.u.device.type != "cpu":
        return f"runs on CPU tensors, not on {arguments.u.device.type}"
    if arguments.compute_dtype is not torch.float32:
        return f"computes in float32; {arguments.compute_dtype} is left to the definition"
    if arguments.out_dtype not in _TYPES:
        return f"writes float32, bfloat16 and float16, not {arguments.out_dtype}"
    if arguments.segment > TILE:
        return f"takes segments of at most {TILE}, not {arguments.segment}"
    return None


def description() -> str:
    """Instruction set and threads in use."""
    chosen = _instruction_set() or _native.instruction_sets()[0]
    return f"instruction set {chosen}, {torch.get_num_threads()} threads"


def states_shape(arguments: ScanArguments) -> tuple[int, ...]:
    """(b, tiles, blocks of channels, padded state, lanes); `_native.states_shape` says the same.

    Computed here so that symbolic sizes stay symbolic.
    """
    tile = TILE // arguments.segment * arguments.segment if arguments.segment else TILE
    groups = max(arguments.groups, 1)
    blocks = groups * -(-(arguments.channels // groups) // LANES)
    states = -(-arguments.state // STATE_PADDING) * STATE_PADDING
    return (arguments.batch, -(-arguments.length // tile), blocks, states, LANES)


def forward(arguments: ScanArguments, *, save_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scan; see backend.py for the contract."""
    u = arguments.u
    out = empty_rows(u, arguments.out_dtype)
    h_last = torch.empty((arguments.batch, arguments.channels, arguments.state))
    states = torch.empty(states_shape(arguments) if save_states else (0,))
    arguments_list, keep = _inputs(arguments, states if save_states else None)
    arguments_list += [*rows_of(out), h_last.data_ptr()]
    call(_native.forward, arguments_list)
    del keep
    return out, h_last, states


def backward(
    arguments: ScanArguments,
    states: Tensor,
    grad_out: Tensor | None,
    grad_h_last: Tensor | None,
    needs: Needs,
) -> Gradients:
    """Gradients; see backend.py for the contract."""
    values, keep = _inputs(arguments, states)
    grad_out = None if grad_out is None else readable(grad_out)
    last = None if grad_h_last is None else grad_h_last.float().contiguous()
    grads = {
        name: _empty_gradient(name, getattr(arguments, name))
        for name, needed in zip(Needs._fields, needs, strict=True)
        if needed and getattr(arguments, name) is not None
    }
    values += [*rows_of(grad_out), pointer_of(last)]
    for name in ("u", "delta", "gate", "B", "C"):
        values += rows_of(grads.get(name))
    values += [pointer_of(grads.get(name)) for name in ("A", "skip", "delta_bias", "h0")]
    call(_native.backward, values)
    del keep
    return Gradients(**grads)


def _inputs(arguments: ScanArguments, states: Tensor | None) -> tuple[list[int], list[Tensor]]:
    """The list both directions begin with, and the tensors that must outlive the call."""
    values = [
        arguments.batch,
        arguments.length,
        arguments.channels,
        arguments.groups,
        arguments.state,
    ]
    keep: list[Tensor] = []
    for rows in (arguments.u, arguments.delta, arguments.gate, arguments.B, arguments.C):
        if rows is not None:
            rows = readable(rows)
            keep.append(rows)
        values += rows_of(rows)
    for parameter in (arguments.A, arguments.skip, arguments.delta_bias, arguments.h0):
        if parameter is not None:
            parameter = parameter.contiguous()
            keep.append(parameter)
        values.append(pointer_of(parameter))
    order = None if arguments.order is None else arguments.order.contiguous()
    if order is not None:
        keep.append(order)
    values += [
        pointer_of(order),
        int(arguments.reverse),
        int(arguments.delta_softplus),
        arguments.reset_every,
        arguments.segment,
        pointer_of(states),
    ]
    return values, keep


def readable(rows: Tensor) -> Tensor:
    """The tensor itself unless neither its last dimension nor its tokens are adjacent."""
    if rows.stride(-1) == 1 or rows.stride(1) == 1:
        return rows
    return rows.contiguous()


def rows_of(tensor: Tensor | None) -> tuple[int, ...]:
    """Pointer, type and strides of token rows, as the extension reads them."""
    if tensor is None:
        return NO_ROWS
    strides = tensor.stride()
    group = strides[2] if len(strides) == 4 else 0
    return (tensor.data_ptr(), _TYPES[tensor.dtype], strides[0], strides[1], strides[-1], group)


def pointer_of(tensor: Tensor | None) -> int:
    """Address of the first element; 0 for no tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def _empty_gradient(name: str, value: Tensor) -> Tensor:
    if name in ("u", "delta", "gate"):
        return empty_rows(value, value.dtype)
    return torch.empty(value.shape, dtype=value.dtype)


def _instruction_set() -> str:
    return os.environ.get(INSTRUCTION_SET_VARIABLE, "")


def call(function: object, values: list[int]) -> None:
    """Run a function of the extension with torch's number of threads.

    Raises:
        KernelError: the extension refuses the arguments.
    """
    assert callable(function)
    try:
        function(values, torch.get_num_threads(), _instruction_set())
    except ValueError as error:
        raise KernelError(str(error)) from error
