"""The scan in PyTorch where nothing is compiled: all chunks at once, one position of each per step.

A chunk is scanned from zero, the chunks' states are joined one after the other, and every chunk is
scanned again from the state it starts with. Nothing is divided by a cumulative decay, which would
overflow. One state per chunk is held; the backward recomputes those of a few chunks at a time.
Shapes: see arguments.py; k chunks of t positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from medmamba.kernels.arguments import Gradients, Needs, ScanArguments, empty_rows
from medmamba.kernels.reference import initial_state, position_to_token, step_sizes

CHUNK_LENGTH = 64  # positions
RECOMPUTED_ELEMENTS = (
    2**23
)  # (token, channel, state) triples whose states the backward holds at once


def refusal(arguments: ScanArguments) -> str | None:
    """Everything but float64 (the definition's) and local-bidirectional segments."""
    if arguments.compute_dtype is not torch.float32:
        return f"computes in float32; {arguments.compute_dtype} is left to the definition"
    if arguments.segment:
        return "has no local-bidirectional mode"
    return None


def states_shape(arguments: ScanArguments) -> tuple[int, ...]:
    """(k, b, d, n): the state that enters each chunk."""
    chunks = -(-arguments.length // CHUNK_LENGTH)
    return (chunks, arguments.batch, arguments.channels, arguments.state)


def forward(arguments: ScanArguments, *, save_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scan; see backend.py for the contract."""
    out = empty_rows(arguments.u, arguments.out_dtype)
    if arguments.u.numel() == 0:
        states = out.new_empty(states_shape(arguments) if save_states else 0, dtype=torch.float32)
        return out, initial_state(arguments).clone(), states
    chunks = _Chunks.of(arguments)
    local = chunks.zeros()
    for _, decay, step in chunks.forwards():
        local = decay * local + step.x[..., None] * step.B
    entering, last = chunks.join(local, initial_state(arguments))
    state, y = entering, []
    for _, decay, step in chunks.forwards():
        state = decay * state + step.x[..., None] * step.B
        y.append((state * step.C).sum(dim=-1))
    rows = chunks.unfold(torch.stack(y, dim=2))
    rows = _finish(arguments, rows)
    out[:, chunks.tokens] = rows.to(out.dtype)
    states = entering.movedim(1, 0).contiguous() if save_states else out.new_empty(0).float()
    return out, last, states


def backward(
    arguments: ScanArguments,
    states: Tensor,
    grad_out: Tensor | None,
    grad_h_last: Tensor | None,
    needs: Needs,
) -> Gradients:
    """Gradients; see backend.py for the contract."""
    carry = torch.zeros_like(initial_state(arguments))
    if grad_h_last is not None:
        carry = carry + grad_h_last
    if arguments.u.numel() == 0 or states.numel() == 0:
        return Gradients(h0=carry if needs.h0 else None)
    chunks = _Chunks.of(arguments)
    grads: dict[str, Tensor] = {}
    zeros = torch.zeros_like(chunks.u)
    grad = zeros if grad_out is None else grad_out[:, chunks.tokens].float()
    if arguments.gate is not None:
        z = arguments.gate[:, chunks.tokens].float()
        sigmoid = torch.sigmoid(z)
        gate_grad, grad = grad * sigmoid * (1 + z * (1 - sigmoid)), grad * z * sigmoid
    folded = _fold(grad)
    reaching, grads["h0"] = _join_back(chunks, folded, carry)
    parts = [
        _differentiate(
            chunks.part(some), folded[:, some], states[some].movedim(0, 1), reaching[:, some]
        )
        for some in chunks.groups()
    ]
    if arguments.gate is not None:
        y = _rows_of([part.y for part in parts], chunks)
        if arguments.skip is not None:
            y = y + arguments.skip * chunks.u
        grads["gate"] = gate_grad * y
    grads |= _collect(arguments, chunks, parts, grad)
    return Gradients(
        **{
            name: _scatter(arguments, chunks, name, grads[name])
            for name, needed in zip(Needs._fields, needs, strict=True)
            if needed
        }
    )


@dataclass(frozen=True, kw_only=True)
class _Step:
    """One position of every chunk: dt, x = dt u (b, k, d); B, C (b, k, d, n)."""

    dt: Tensor
    x: Tensor
    B: Tensor
    C: Tensor


@dataclass(frozen=True, kw_only=True)
class _Chunks:
    """The problem in scan order, padded to whole chunks with positions that change nothing.

    Args:
        tokens: token of each position, a slice where they agree.
        u: (b, l, d); dt, x (b, k, t, d); B, C (b, k, t, g, n).
        resets: (k, t), true where the state is zeroed first.
    """

    tokens: slice | Tensor
    length: int
    A: Tensor
    u: Tensor
    dt: Tensor
    x: Tensor
    B: Tensor
    C: Tensor
    resets: Tensor

    @staticmethod
    def of(arguments: ScanArguments) -> _Chunks:
        """Gather, widen and fold."""
        index = position_to_token(arguments)
        tokens: slice | Tensor = slice(None) if index is None else index
        length = arguments.length
        u = arguments.u[:, tokens].float()
        dt = step_sizes(arguments)[:, tokens]
        position = torch.arange(-(-length // CHUNK_LENGTH) * CHUNK_LENGTH, device=u.device)
        resets = torch.zeros_like(position, dtype=torch.bool)
        if arguments.reset_every:
            resets = (position > 0) & (position % arguments.reset_every == 0) & (position < length)
        return _Chunks(
            tokens=tokens,
            length=length,
            A=arguments.A,
            u=u,
            dt=_fold(dt),
            x=_fold(dt * u),
            B=_fold(arguments.B[:, tokens].float()),
            C=_fold(arguments.C[:, tokens].float()),
            resets=resets.reshape(-1, CHUNK_LENGTH),
        )

    def zeros(self) -> Tensor:
        """A state for every chunk (b, k, d, n)."""
        batch, chunks, _, channels = self.x.shape
        return self.x.new_zeros(batch, chunks, channels, self.A.shape[1])

    def unfold(self, rows: Tensor) -> Tensor:
        """(b, k, t, d) back to (b, l, d)."""
        return rows.flatten(1, 2)[:, : self.length]

    def part(self, some: slice) -> _Chunks:
        """A few of the chunks."""
        rows = {name: getattr(self, name)[:, some] for name in ("dt", "x", "B", "C")}
        return replace(self, **rows, resets=self.resets[some])

    def groups(self) -> list[slice]:
        """Runs of chunks whose states may be held at once."""
        batch, chunks, length, channels = self.x.shape
        size = max(1, RECOMPUTED_ELEMENTS // (batch * length * channels * self.A.shape[1]))
        return [slice(first, first + size) for first in range(0, chunks, size)]

    def at(self, t: int) -> _Step:
        """Rows of position t of every chunk."""
        repeat = self.x.shape[-1] // self.B.shape[3]
        B = self.B[:, :, t].repeat_interleave(repeat, dim=2)
        C = self.C[:, :, t].repeat_interleave(repeat, dim=2)
        return _Step(dt=self.dt[:, :, t], x=self.x[:, :, t], B=B, C=C)

    def decay(self, t: int) -> Tensor:
        """Decay at position t of every chunk (b, k, d, n)."""
        decay = torch.exp(self.dt[:, :, t, :, None] * self.A)
        return decay.masked_fill(self.resets[:, t, None, None], 0.0)

    def forwards(self) -> Iterator[tuple[int, Tensor, _Step]]:
        """Positions of a chunk, first to last."""
        for t in range(CHUNK_LENGTH):
            yield t, self.decay(t), self.at(t)

    def whole_decay(self) -> Tensor:
        """Decay over each chunk (b, k, d, n); the argument of the exponential is never positive."""
        decay = torch.exp(self.dt.sum(dim=2)[..., None] * self.A)
        return decay.masked_fill(self.resets.any(dim=1)[:, None, None], 0.0)

    def join(self, local: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """State that enters each chunk, and the one that leaves the last."""
        decay, entering = self.whole_decay(), []
        for chunk in range(local.shape[1]):
            entering.append(state)
            state = decay[:, chunk] * state + local[:, chunk]
        return torch.stack(entering, dim=1), state


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What the states of some chunks add up to.

    Args:
        by_input: sum over states of B dL/dh (b, k, t, d).
        by_rate: sum over states of A dL/dh exp(dt A) h_{t-1}.
        grads: of A, B and C.
    """

    y: Tensor
    by_input: Tensor
    by_rate: Tensor
    grads: dict[str, Tensor]


def _differentiate(chunks: _Chunks, grad: Tensor, entering: Tensor, reaching: Tensor) -> _Part:
    """Both sweeps over some chunks: h first to last, then dL/dh last to first.

    Args:
        chunks: the chunks.
        grad: with respect to y before the gate (b, k, t, d).
        entering: state before each chunk (b, k, d, n).
        reaching: adjoint from behind each chunk.
    """
    groups = chunks.B.shape[3]
    grad_A = torch.zeros_like(chunks.A)
    grad_B, grad_C = torch.zeros_like(chunks.B), torch.zeros_like(chunks.C)
    y, by_input, by_rate = (torch.zeros_like(chunks.x) for _ in range(3))
    state, kept = entering, []
    for t, decay, step in chunks.forwards():
        carried = decay * state
        state = carried + step.x[..., None] * step.B
        kept.append((decay, carried))
        y[:, :, t] = (step.C * state).sum(dim=-1)
        grad_C[:, :, t] = _per_group(grad[:, :, t, :, None] * state, groups)
    for t in reversed(range(CHUNK_LENGTH)):
        step = chunks.at(t)
        decay, carried = kept.pop()
        adjoint = reaching + step.C * grad[:, :, t, :, None]
        q = adjoint * carried
        reaching = decay * adjoint
        by_input[:, :, t] = (step.B * adjoint).sum(dim=-1)
        by_rate[:, :, t] = (chunks.A * q).sum(dim=-1)
        grad_A += (step.dt[..., None] * q).sum(dim=(0, 1))
        grad_B[:, :, t] = _per_group(step.x[..., None] * adjoint, groups)
    return _Part(
        y=y, by_input=by_input, by_rate=by_rate, grads={"A": grad_A, "B": grad_B, "C": grad_C}
    )


def _collect(
    arguments: ScanArguments, chunks: _Chunks, parts: list[_Part], grad: Tensor
) -> dict[str, Tensor]:
    """Gradients in scan order (b, l, ...), and of the parameters."""
    grad_x = _rows_of([part.by_input for part in parts], chunks)
    dt = chunks.unfold(chunks.dt)
    grad_u = grad_x * dt
    if arguments.skip is not None:
        grad_u = grad_u + arguments.skip * grad
    grad_dt = grad_x * chunks.u + _rows_of([part.by_rate for part in parts], chunks)
    if arguments.delta_softplus:
        grad_dt = grad_dt * -torch.expm1(-dt)
    return {
        "u": grad_u,
        "delta": grad_dt,
        "A": torch.stack([part.grads["A"] for part in parts]).sum(dim=0),
        "B": _rows_of([part.grads["B"] for part in parts], chunks),
        "C": _rows_of([part.grads["C"] for part in parts], chunks),
        "skip": (grad * chunks.u).sum(dim=(0, 1)),
        "delta_bias": grad_dt.sum(dim=(0, 1)),
    }


def _join_back(chunks: _Chunks, grad: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
    """Adjoint that reaches each chunk from behind, and the one that leaves the first."""
    local = chunks.zeros()
    for t in reversed(range(CHUNK_LENGTH)):
        step = chunks.at(t)
        local = chunks.decay(t) * (local + step.C * grad[:, :, t, :, None])
    decay, reaching = chunks.whole_decay(), []
    for chunk in reversed(range(local.shape[1])):
        reaching.append(carry)
        carry = decay[:, chunk] * carry + local[:, chunk]
    return torch.stack(reaching[::-1], dim=1), carry


def _rows_of(parts: list[Tensor], chunks: _Chunks) -> Tensor:
    return chunks.unfold(torch.cat(parts, dim=1))


def _per_group(value: Tensor, groups: int) -> Tensor:
    return value.reshape(*value.shape[:2], groups, -1, value.shape[-1]).sum(dim=3)


def _fold(rows: Tensor) -> Tensor:
    missing = -rows.shape[1] % CHUNK_LENGTH
    padding = (0, 0) * (rows.dim() - 2) + (0, missing)
    padded = functional.pad(rows, padding)
    return padded.reshape(rows.shape[0], -1, CHUNK_LENGTH, *rows.shape[2:])


def _finish(arguments: ScanArguments, rows: Tensor) -> Tensor:
    index = position_to_token(arguments)
    tokens = slice(None) if index is None else index
    if arguments.skip is not None:
        rows = rows + arguments.skip * arguments.u[:, tokens].float()
    if arguments.gate is not None:
        rows = rows * functional.silu(arguments.gate[:, tokens].float())
    return rows


def _scatter(arguments: ScanArguments, chunks: _Chunks, name: str, grad: Tensor) -> Tensor:
    value: Tensor = getattr(arguments, name)
    if name in ("A", "skip", "delta_bias", "h0"):
        return grad
    if name in ("B", "C"):
        target = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    else:
        target = empty_rows(value, value.dtype)
    target[:, chunks.tokens] = grad.to(value.dtype)
    return target
