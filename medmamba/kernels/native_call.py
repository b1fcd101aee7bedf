"""How torch tensors reach the extension: pointers, sizes and strides in one list of integers.

Owns the order of that list, which kernels/cpu/binding.cpp reads, and the choice of instruction set.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from medmamba.errors import KernelError
from medmamba.kernels.arguments import ScanArguments

INSTRUCTION_SET_VARIABLE = "MEDMAMBA_CPU_ISA"  # for tests: v4, v3 or base
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NO_ROWS = (0, 0, 0, 0, 1, 0)


@dataclass(frozen=True, kw_only=True)
class Walk:
    """How the state is walked, beyond what `ScanArguments` can say.

    Args:
        reset_offset: the state is zeroed before t > 0 where (t + reset_offset) % reset_every == 0.
        exclusive: a token reads the state without its own input.
    """

    reset_offset: int = 0
    exclusive: bool = False


def scan_inputs(
    arguments: ScanArguments, states: Tensor | None, walk: Walk
) -> tuple[list[int], list[Tensor]]:
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
        walk.reset_offset,
        int(walk.exclusive),
        pointer_of(states),
    ]
    return values, keep


def readable(rows: Tensor) -> Tensor:
    """The tensor itself unless its last dimension and its tokens are both far apart."""
    if rows.stride(-1) in (0, 1) or rows.stride(1) == 1:
        return rows
    return rows.contiguous()


def rows_of(tensor: Tensor | None) -> tuple[int, ...]:
    """Pointer, type and strides of token rows, as the extension reads them."""
    if tensor is None:
        return NO_ROWS
    strides = tensor.stride()
    group = strides[2] if len(strides) == 4 else 0
    return (tensor.data_ptr(), TYPES[tensor.dtype], strides[0], strides[1], strides[-1], group)


def pointer_of(tensor: Tensor | None) -> int:
    """Address of the first element; 0 for no tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def instruction_set() -> str:
    """The one that the environment forces; empty when it leaves the choice to us."""
    return os.environ.get(INSTRUCTION_SET_VARIABLE, "")


def call(function: object, values: list[int], *numbers: float) -> None:
    """Run a function of the extension with torch's number of threads.

    Args:
        function: of `_native`.
        values: pointers, sizes and strides in the order that it reads.
        numbers: what else it takes.

    Raises:
        KernelError: the extension refuses the arguments.
    """
    assert callable(function)
    try:
        function(values, *numbers, torch.get_num_threads(), instruction_set())
    except ValueError as error:
        raise KernelError(str(error)) from error
