"""What the scan is measured against: PyTorch forms of the same recurrence, all differentiable.

Shapes as in medmamba/kernels/arguments.py; all apply softplus, bias, skip and gate.
"""

import torch
from torch import Tensor
from torch.nn import functional


def prepare(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and inputs of every token (batch, length, channels, state)."""
    dt = functional.softplus(delta + bias)
    return torch.exp(dt[..., None] * A), (dt * u)[..., None] * B[:, :, None]


def finish(y: Tensor, u: Tensor, skip: Tensor, gate: Tensor) -> Tensor:
    return (y + skip * u) * functional.silu(gate)


def step_by_step(u, delta, A, B, C, skip, gate, bias) -> Tensor:
    """The public reference: everything materialised, one token a step."""
    decay, inputs = prepare(u, delta, A, B, bias)
    h = torch.zeros_like(inputs[:, 0])
    ys = []
    for t in range(u.shape[1]):
        h = decay[:, t] * h + inputs[:, t]
        ys.append(torch.einsum("bdn,bn->bd", h, C[:, t]))
    return finish(torch.stack(ys, dim=1), u, skip, gate)


def linear_loop(u, delta, A, B, C, skip, gate, bias) -> Tensor:
    """The steps of the public reference over slices made once: backward is linear in the length."""
    decay, inputs = prepare(u, delta, A, B, bias)
    h = torch.zeros_like(inputs[:, 0])
    ys = []
    for a, x, c in zip(decay.unbind(1), inputs.unbind(1), C.unbind(1), strict=True):
        h = a * h + x
        ys.append(torch.einsum("bdn,bn->bd", h, c))
    return finish(torch.stack(ys, dim=1), u, skip, gate)


def tight_loop(u, delta, A, B, C, skip, gate, bias) -> Tensor:
    """The same with as little in a step as there can be: one operation, and one sum at the end."""
    decay, inputs = prepare(u, delta, A, B, bias)
    h = torch.zeros_like(inputs[:, 0])
    states = []
    for a, x in zip(decay.unbind(1), inputs.unbind(1), strict=True):
        h = torch.addcmul(x, a, h)
        states.append(h)
    y = (torch.stack(states, dim=1) * C[:, :, None]).sum(-1)
    return finish(y, u, skip, gate)


def parallel_scan(u, delta, A, B, C, skip, gate, bias) -> Tensor:
    """Log-depth scan by doubling (Hillis and Steele 1986), differentiable."""
    decay, h = prepare(u, delta, A, B, bias)
    length, step = u.shape[1], 1
    while step < length:
        h = torch.cat([h[:, :step], h[:, step:] + decay[:, step:] * h[:, :-step]], dim=1)
        decay = torch.cat([decay[:, :step], decay[:, step:] * decay[:, :-step]], dim=1)
        step *= 2
    return finish((h * C[:, :, None]).sum(-1), u, skip, gate)


def mambapy_scan(u, delta, A, B, C, skip, gate, bias) -> Tensor:
    """The work-efficient scan of the mambapy package, where installed."""
    from mambapy.pscan import pscan

    decay, inputs = prepare(u, delta, A, B, bias)
    h = pscan(decay, inputs)
    return finish((h * C[:, :, None]).sum(-1), u, skip, gate)
