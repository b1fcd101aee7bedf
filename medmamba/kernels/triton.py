"""The scan on a GPU, in Triton: what it refuses, its forward and its backward.

The door of triton, together with triton_forward.py and triton_backward.py, which hold the kernels,
and triton_parts.py and triton_sums.py, of which these are made.
Forward in three phases (chunk states, pass over chunks, scan), backward in two streaming passes; no
float atomics, every sum over programs in a fixed order. Buffers and launches are in
triton_launch.py, the cut of sequences in triton_cut.py.
"""

from __future__ import annotations

import torch
import triton  # noqa: TID251
from torch import Tensor

from medmamba.kernels.arguments import Gradients, Needs, ScanArguments, empty_rows
from medmamba.kernels.placement import on_device_of
from medmamba.kernels.triton_cut import CAPABILITY, DEFAULT, Tuning, states_shape
from medmamba.kernels.triton_gradients import differentiate
from medmamba.kernels.triton_launch import Scan, laid_out_as

MAX_LENGTH = 2**31 - 2**14  # positions are 32-bit inside the kernels; rows and offsets are 64-bit


def refusal(arguments: ScanArguments) -> str | None:
    """Why Triton cannot run this scan here."""
    if arguments.compute_dtype is torch.float64:
        return "computes in float32, not float64"
    device = arguments.u.device
    if not triton.knobs.runtime.interpret:
        if device.type != "cuda":
            return f"needs a GPU, not {device.type}"
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < CAPABILITY:
            return "needs compute capability 8.0 or newer"
    # last, since it would limit the lengths of a program exported for another device
    if arguments.length > MAX_LENGTH:
        return f"takes at most {MAX_LENGTH} tokens, not {arguments.length}"
    return None


def description() -> str:
    """What runs, for the report."""
    interpreted = ", interpreted" if triton.knobs.runtime.interpret else ""
    return f"Triton {triton.__version__}{interpreted}"


def forward(
    arguments: ScanArguments, *, save_states: bool, tuning: Tuning = DEFAULT
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan; returns out (b, l, d), h_last (b, d, n) and the states that enter the chunks."""
    u = arguments.u
    shape = states_shape(arguments, tuning) if save_states else (0,)
    saved = torch.empty(shape, dtype=torch.float32, device=u.device)
    if _is_empty(arguments):
        return empty_rows(u, arguments.out_dtype), _initial(arguments), saved
    with on_device_of(u):
        scan = Scan(arguments, tuning)
        last = scan.float(arguments.batch, arguments.state, arguments.channels)
        out = torch.empty(u.shape, dtype=arguments.out_dtype, device=u.device)
        legs = scan.legs(trained=save_states)
        partial = None
        for leg in legs:
            final = leg is legs[-1]
            target = out if final else partial if partial is not None else scan.rows()
            states = scan.entering_states(leg, saved if saved.numel() else None)
            scan.chunk_scan(leg, states, partial, target, last=last, final=final)
            partial = target
    return laid_out_as(u, out), last.mT.contiguous(), saved


def backward(
    arguments: ScanArguments,
    states: Tensor,
    grad_out: Tensor | None,
    grad_h_last: Tensor | None,
    needs: Needs,
    *,
    tuning: Tuning = DEFAULT,
) -> Gradients:
    """Gradients of the scan, from its inputs and the chunk states that forward saved."""
    if _is_empty(arguments):
        return _empty_gradients(arguments, grad_h_last)
    if grad_out is None:
        grad_out = torch.zeros_like(arguments.u)
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    with on_device_of(arguments.u):
        return differentiate(Scan(arguments, tuning), needs, states, grad_out, grad_h_last)


def _is_empty(arguments: ScanArguments) -> bool:
    return arguments.u.numel() == 0


def _initial(arguments: ScanArguments) -> Tensor:
    if arguments.h0 is not None:
        return arguments.h0.clone(memory_format=torch.contiguous_format)
    shape = (arguments.batch, arguments.channels, arguments.state)
    return torch.zeros(shape, dtype=torch.float32, device=arguments.u.device)


def _empty_gradients(arguments: ScanArguments, grad_h_last: Tensor | None) -> Gradients:
    values = (getattr(arguments, name) for name in Gradients._fields)
    zeros = Gradients(*(None if value is None else torch.zeros_like(value) for value in values))
    return zeros if grad_h_last is None else zeros._replace(h0=grad_h_last.clone())
