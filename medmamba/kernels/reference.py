"""The definition of the selective scan in PyTorch: float32 or float64, one token a step.

Everything else in this package is measured against this file. Per batch, channel and state, over
scan positions t (Gu and Dao, "Mamba", arXiv 2312.00752, equations 1a and 2a, simplified B):

    dt_t  = softplus(delta_t + delta_bias)            (softplus optional)
    h_t   = exp(dt_t A) h_{t-1} + (dt_t u_t) B_t      h_{-1} = h0, 0 by default
    y_t   = sum_n C_t h_t + skip u_t
    out_t = y_t silu(gate_t)                          (gate optional)

Local-bidirectional (Zhang et al., "LBMamba", arXiv 2506.15976): inside segments of fixed length the
same recurrence also runs backwards from zero; its state before the token's own input is added to
h_t.
Shapes: see arguments.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from medmamba.kernels.arguments import Gradients, Needs, ScanArguments, empty_rows

CHUNK_LENGTH = 64  # tokens between two stored states; the backward recomputes one chunk at a time


def refusal(arguments: ScanArguments) -> str | None:
    """The definition runs everywhere."""
    del arguments
    return None


def states_shape(arguments: ScanArguments) -> tuple[int, ...]:
    """(chunks, b, d, n): the state that enters each chunk."""
    chunks = -(-arguments.length // _chunk_length(arguments))
    return (chunks, arguments.batch, arguments.channels, arguments.state)


def forward(arguments: ScanArguments, *, save_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scan; returns out (b, l, d), h_last (b, d, n) and the states that enter the chunks."""
    chunk = _chunk_length(arguments)
    index = position_to_token(arguments)
    out = empty_rows(arguments.u, arguments.out_dtype)
    state = initial_state(arguments)
    states = state.new_empty(states_shape(arguments) if save_states else (0,))
    for number, first in enumerate(range(0, arguments.length, chunk)):
        if save_states:
            states[number] = state
        tokens = _tokens(index, first, min(first + chunk, arguments.length))
        part = _Chunk.of(arguments, tokens, state, first)
        out[:, tokens] = part.output().to(out.dtype)
        state = part.h[:, -1]
    return out, state.clone(), states


def backward(
    arguments: ScanArguments,
    states: Tensor,
    grad_out: Tensor | None,
    grad_h_last: Tensor | None,
    needs: Needs,
) -> Gradients:
    """Differentiate chunk by chunk, last to first, recomputing each from the state before it."""
    chunk = _chunk_length(arguments)
    index = position_to_token(arguments)
    dtype = arguments.compute_dtype
    totals = _zero_gradients(arguments)
    carry = torch.zeros_like(initial_state(arguments))
    if grad_h_last is not None:
        carry = carry + grad_h_last
    for number in reversed(range(states.shape[0])):
        first = number * chunk
        tokens = _tokens(index, first, min(first + chunk, arguments.length))
        part = _Chunk.of(arguments, tokens, states[number], first)
        grad = torch.zeros_like(part.u) if grad_out is None else grad_out[:, tokens].to(dtype)
        grads, carry = part.differentiate(grad, carry)
        for name, value in grads.items():
            if totals[name] is not None:
                _accumulate(totals, name, value, tokens)
    totals["h0"] = carry if arguments.h0 is not None else None
    return Gradients(**{name: totals[name] for name in Needs._fields if getattr(needs, name)})


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """A few consecutive scan positions with everything the equations name; t is dimension 1.

    Args:
        arguments: the chunk's rows in scan order.
        B: per channel (b, t, d, n); C, decay, inputs, h, h_before, local likewise.
        resets: positions of the chunk before which the state is zeroed.
        local: reverse state inside the segment, without the token's own input; else zeros.
    """

    arguments: ScanArguments
    u: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    decay: Tensor
    inputs: Tensor
    h: Tensor
    h_before: Tensor
    local: Tensor
    resets: frozenset[int]

    @staticmethod
    def of(arguments: ScanArguments, tokens: slice | Tensor, state: Tensor, first: int) -> _Chunk:
        """Recur over the tokens from the state that enters position `first`."""
        part = _slice(arguments, tokens)
        dtype = state.dtype
        u, dt = part.u.to(dtype), step_sizes(part)
        repeat = part.channels // part.groups
        B = part.B.to(dtype).repeat_interleave(repeat, dim=2)
        C = part.C.to(dtype).repeat_interleave(repeat, dim=2)
        decay = torch.exp(dt[..., None] * part.A)
        inputs = (dt * u)[..., None] * B
        before, after = [], []
        resets = {t for t in range(u.shape[1]) if is_reset(first + t, part.reset_every)}
        for t in range(u.shape[1]):
            if t in resets:
                state = torch.zeros_like(state)
            before.append(state)
            state = decay[:, t] * state + inputs[:, t]
            after.append(state)
        return _Chunk(
            arguments=part,
            u=u,
            dt=dt,
            B=B,
            C=C,
            decay=decay,
            inputs=inputs,
            h=torch.stack(after, dim=1),
            h_before=torch.stack(before, dim=1),
            local=_local_states(decay, inputs, part.segment),
            resets=frozenset(resets),
        )

    def scanned(self) -> Tensor:
        """Y before the gate (b, t, d)."""
        y = ((self.h + self.local) * self.C).sum(dim=-1)
        return y if self.arguments.skip is None else y + self.arguments.skip * self.u

    def output(self) -> Tensor:
        """Out (b, t, d) in the compute type."""
        gate = self.arguments.gate
        y = self.scanned()
        return y if gate is None else y * functional.silu(gate.to(y.dtype))

    def differentiate(self, grad: Tensor, carry: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of the chunk's arguments, and of the state that enters it.

        Args:
            grad: with respect to out (b, t, d).
            carry: with respect to the state that leaves the chunk (b, d, n).
        """
        grads: dict[str, Tensor] = {}
        gate, skip = self.arguments.gate, self.arguments.skip
        if gate is not None:
            z = gate.to(grad.dtype)
            sigmoid = torch.sigmoid(z)
            grads["gate"] = grad * self.scanned() * sigmoid * (1 + z * (1 - sigmoid))
            grad = grad * z * sigmoid
        weighted = grad[..., None] * self.C
        adjoint, carry = self._adjoint(weighted, carry)
        grad_inputs, rates = adjoint, adjoint * self.decay * self.h_before
        if self.arguments.segment:
            local, e_after = self._local_adjoint(weighted)
            grad_inputs = adjoint + local - weighted
            rates = rates + local * self.decay * e_after
        grad_x = (grad_inputs * self.B).sum(dim=-1)
        grads["u"] = grad_x * self.dt
        grad_dt = grad_x * self.u + (rates * self.arguments.A).sum(dim=-1)
        grads["A"] = (rates * self.dt[..., None]).sum(dim=(0, 1))
        grads["B"] = self._per_group(grad_inputs * (self.dt * self.u)[..., None])
        grads["C"] = self._per_group(grad[..., None] * (self.h + self.local))
        if skip is not None:
            grads["u"] = grads["u"] + skip * grad
            grads["skip"] = (grad * self.u).sum(dim=(0, 1))
        if self.arguments.delta_softplus:
            # d softplus = sigmoid(raw) = 1 - exp(-dt)
            grad_dt = grad_dt * -torch.expm1(-self.dt)
        grads["delta"] = grad_dt
        grads["delta_bias"] = grad_dt.sum(dim=(0, 1))
        return grads, carry

    def _adjoint(self, weighted: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        """dL/dh_t = C_t dy_t + exp(dt_{t+1} A) dL/dh_{t+1}; also what passes the first position."""
        adjoint = torch.empty_like(weighted)
        for t in reversed(range(weighted.shape[1])):
            adjoint[:, t] = weighted[:, t] + carry
            carry = self.decay[:, t] * adjoint[:, t]
            if t in self.resets:
                carry = torch.zeros_like(carry)
        return adjoint, carry

    def _local_adjoint(self, weighted: Tensor) -> tuple[Tensor, Tensor]:
        """Adjoint of the local state, and the full reverse state one token later in the segment."""
        adjoint, e_after = torch.empty_like(weighted), torch.zeros_like(weighted)
        for t in range(weighted.shape[1]):
            adjoint[:, t] = weighted[:, t]
            if t % self.arguments.segment:
                adjoint[:, t] += self.decay[:, t - 1] * adjoint[:, t - 1]
                e_after[:, t - 1] = self.local[:, t] + self.inputs[:, t]
        return adjoint, e_after

    def _per_group(self, value: Tensor) -> Tensor:
        batch, length, channels, state = value.shape
        groups = self.arguments.groups
        return value.reshape(batch, length, groups, channels // groups, state).sum(dim=3)


def _local_states(decay: Tensor, inputs: Tensor, segment: int) -> Tensor:
    """Reverse state of each token inside its segment, without the token's own input."""
    local = torch.zeros_like(inputs)
    if segment:
        for t in reversed(range(inputs.shape[1] - 1)):
            if (t + 1) % segment:
                local[:, t] = decay[:, t] * (local[:, t + 1] + inputs[:, t + 1])
    return local


def step_sizes(arguments: ScanArguments) -> Tensor:
    """Dt of every token and channel, in the compute type."""
    dt = arguments.delta.to(arguments.compute_dtype)
    if arguments.delta_bias is not None:
        dt = dt + arguments.delta_bias
    if arguments.delta_softplus:
        # log1p(exp(-|x|)) + max(x, 0), without the usual threshold: exact for every x
        dt = torch.logaddexp(dt, torch.zeros_like(dt))
    return dt


def is_reset(position: int, reset_every: int) -> bool:
    """Whether the state is zeroed before this scan position."""
    return reset_every > 0 and position > 0 and position % reset_every == 0


def initial_state(arguments: ScanArguments) -> Tensor:
    """h0, or zeros (b, d, n)."""
    if arguments.h0 is not None:
        return arguments.h0
    shape = (arguments.batch, arguments.channels, arguments.state)
    return arguments.u.new_zeros(shape, dtype=arguments.compute_dtype)


def position_to_token(arguments: ScanArguments) -> Tensor | None:
    """Token read at each scan position; None where position and token agree."""
    if arguments.order is None and not arguments.reverse:
        return None
    if arguments.order is None:
        return torch.arange(arguments.length - 1, -1, -1, device=arguments.u.device)
    index = arguments.order.long()
    return index.flip(0) if arguments.reverse else index


def _chunk_length(arguments: ScanArguments) -> int:
    """A multiple of the segment, so that no segment is cut."""
    segment = max(arguments.segment, 1)
    return -(-CHUNK_LENGTH // segment) * segment


def _tokens(index: Tensor | None, first: int, last: int) -> slice | Tensor:
    return slice(first, last) if index is None else index[first:last]


def _slice(arguments: ScanArguments, tokens: slice | Tensor) -> ScanArguments:
    rows = {name: getattr(arguments, name)[:, tokens] for name in ("u", "delta", "B", "C")}
    gate = None if arguments.gate is None else arguments.gate[:, tokens]
    return replace(arguments, **rows, gate=gate)


def _zero_gradients(arguments: ScanArguments) -> dict[str, Tensor | None]:
    totals: dict[str, Tensor | None] = {}
    for name in Needs._fields:
        value: Tensor | None = getattr(arguments, name)
        if value is None:
            totals[name] = None
        elif value.dim() == 3 and name != "h0":
            totals[name] = empty_rows(value, value.dtype).zero_()
        else:
            totals[name] = torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    return totals


def _accumulate(
    totals: dict[str, Tensor | None], name: str, grad: Tensor, tokens: slice | Tensor
) -> None:
    total = totals[name]
    assert total is not None
    if name in ("A", "skip", "delta_bias"):
        total += grad
    else:
        total[:, tokens] = grad
