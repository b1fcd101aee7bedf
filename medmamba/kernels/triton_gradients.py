"""The backward of one scan: its legs one after another, and fixed-order sums over programs."""

from __future__ import annotations

import torch
from torch import Tensor

from medmamba.kernels.arguments import Gradients, Needs
from medmamba.kernels.triton_cut import Leg, blocks_per_chunk, group_channels, tile_of
from medmamba.kernels.triton_launch import Scan, laid_out_as


def differentiate(
    scan: Scan, needs: Needs, states: Tensor, grad_out: Tensor, grad_h_last: Tensor | None
) -> Gradients:
    """Gradients of all arguments.

    Args:
        scan: what to differentiate.
        needs: which gradients are wanted.
        states: what forward saved.
        grad_out: (b, l, d), channels adjacent.
        grad_h_last: (b, d, n) or None for zero.
    """
    work = _Backward(scan, needs, grad_out)
    for leg in work.legs:
        work.walk(leg, states, grad_h_last)
    return work.gradients()


class _Backward:
    """Buffers of one backward while its legs add to them."""

    def __init__(self, scan: Scan, needs: Needs, grad_out: Tensor) -> None:
        arguments = scan.arguments
        self.scan, self.needs, self.grad_out = scan, needs, grad_out
        self.legs = scan.legs(trained=True)
        self.tile = tile_of(arguments, scan.tuning.backward_tile)
        self.tiles = scan.tiles_per_group(self.tile)
        self.grad_u = _like(arguments.u)
        self.grad_delta = _like(arguments.delta)
        gate = arguments.gate
        self.grad_gate = None if gate is None or not needs.gate else _like(gate)
        self.grad_initial: Tensor | None = None
        if needs.h0 and arguments.h0 is not None:
            self.grad_initial = scan.float(arguments.batch, arguments.state, arguments.channels)
        self.parameters: dict[str, Tensor] = {}
        self.projections: dict[str, list[tuple[Leg, Tensor]]] = {"B": [], "C": []}
        self.slopes: list[tuple[Leg, Tensor]] = []
        self.y: Tensor | None = None
        self.partial_u: Tensor | None = None
        self.partial_delta: Tensor | None = None
        single = len(self.legs) == 1
        # R_t is read where the gradient of dt is written, token by token: they share memory.
        shared = single and self.grad_delta.dtype is torch.float32
        self.decay_sum = self.grad_delta if shared else scan.rows()
        # So do the gradient before the gate and that of u.
        shared = single and self.grad_u.dtype is torch.float32
        self.gated: Tensor | None = None
        if gate is not None:
            self.gated = self.grad_u if shared else scan.rows()

    def walk(self, leg: Leg, states: Tensor, grad_h_last: Tensor | None) -> None:
        """Run both passes of one leg."""
        scan, arguments, final = self.scan, self.scan.arguments, leg is self.legs[-1]
        shape = (arguments.batch, leg.cut.chunks)
        programs = (*shape, arguments.groups, self.tiles)
        states_of = leg.last - leg.first
        kept = scan.float(
            *programs, blocks_per_chunk(leg.cut, scan.tuning.anchor), states_of + 1, self.tile
        )
        sums = scan.float(2, *programs, states_of + 1, self.tile)
        self._forward_pass(
            leg,
            states=self._entering_states(leg, states),
            kept=kept,
            sums=sums[0],
        )
        before_gate = self.grad_out if self.gated is None else self.gated
        carries = scan.entering_carries(leg, before_gate, grad_h_last)
        grad_B = self._projection("B", leg)
        target_u, target_delta = self._targets(final)
        grad_initial = self.grad_initial if leg.causal else None
        scan.reverse_pass(
            leg,
            carries=carries,
            grad_out=before_gate,
            final=final,
            grad_initial=None if grad_initial is None else grad_initial[:, leg.first :],
            partial_u=self.partial_u,
            partial_delta=self.partial_delta,
            decay_sum=self.decay_sum,
            kept=kept,
            grad_u=target_u,
            grad_delta=target_delta,
            grad_B=grad_B,
            sums=sums[1],
        )
        self.partial_u, self.partial_delta = target_u, target_delta
        forward, reverse = self._over_programs(sums)
        self.slopes.append((leg, forward[:, :states_of] + reverse[:, :states_of]))
        if final:
            self.parameters = {"skip": forward[:, -1], "delta_bias": reverse[:, -1]}

    def gradients(self) -> Gradients:
        """Reduce what the programs wrote, in a fixed order."""
        arguments, needs = self.scan.arguments, self.needs
        sums = {
            name: value.contiguous()
            for name, value in self.parameters.items()
            if getattr(arguments, name) is not None
        }
        grad_gate = self.grad_gate
        return Gradients(
            u=laid_out_as(arguments.u, self.grad_u) if needs.u else None,
            delta=laid_out_as(arguments.delta, self.grad_delta) if needs.delta else None,
            A=self._assemble(self.slopes, arguments.A) if needs.A else None,
            B=self._assemble(self.projections["B"], arguments.B) if needs.B else None,
            C=self._assemble(self.projections["C"], arguments.C) if needs.C else None,
            skip=sums.get("skip"),
            gate=None if grad_gate is None else self._gate_as_given(grad_gate),
            delta_bias=sums.get("delta_bias"),
            h0=None if self.grad_initial is None else self.grad_initial.mT.contiguous(),
        )

    def _forward_pass(
        self,
        leg: Leg,
        *,
        states: Tensor | None,
        **buffers: Tensor | None,
    ) -> None:
        final = leg is self.legs[-1]
        y_before = self.y
        if not final and self.grad_gate is not None and self.y is None:
            self.y = self.scan.rows()
        self.scan.forward_pass(
            leg,
            states=states,
            grad_out=self.grad_out,
            partial=y_before,
            y_out=None if final else self.y,
            grad_gate=self.grad_gate if final else None,
            gated=self.gated,
            decay_sum=self.decay_sum,
            grad_C=self._projection("C", leg),
            with_skip=final,
            **buffers,
        )

    def _entering_states(self, leg: Leg, states: Tensor) -> Tensor | None:
        if leg.causal and leg.cut.passes_states:
            return states[:, :, leg.first : leg.last]
        return self.scan.entering_states(leg)

    def _targets(self, final: bool) -> tuple[Tensor, Tensor]:
        """Where the gradients of u and dt go: a float32 sum while more legs follow."""
        if final:
            return self.grad_u, self.grad_delta
        if self.partial_u is None or self.partial_delta is None:
            return self.scan.rows(), self.scan.rows()
        return self.partial_u, self.partial_delta

    def _projection(self, name: str, leg: Leg) -> Tensor | None:
        """Room for the sums over channels of every tile, (tiles, b, l, g, n)."""
        if not getattr(self.needs, name):
            return None
        arguments = self.scan.arguments
        shape = (self.tiles, arguments.batch, arguments.length, arguments.groups)
        room = self.scan.float(*shape, leg.last - leg.first)
        self.projections[name].append((leg, room))
        return room

    def _over_programs(self, part: Tensor) -> Tensor:
        """Sum (2, b, chunks, groups, tiles, n + 1, tile) to (2, d, n + 1)."""
        tiled = part.sum((1, 2)).transpose(-1, -2)
        width = part.shape[-2]
        whole = tiled.reshape(2, -1, self.tiles * self.tile, width)
        return whole[:, :, : group_channels(self.scan.arguments)].reshape(2, -1, width)

    def _assemble(self, parts: list[tuple[Leg, Tensor]], like: Tensor) -> Tensor:
        """Add the legs' blocks of states, in the type of the argument."""
        tiled = [
            (leg, part if part.dim() == like.dim() else _sum_tiles(part)) for leg, part in parts
        ]
        if len(tiled) == 1:
            return tiled[0][1].to(like.dtype).contiguous()
        total = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
        for leg, part in tiled:
            total[..., leg.first : leg.last] += part
        return total.to(like.dtype)

    def _gate_as_given(self, grad_gate: Tensor) -> Tensor:
        gate = self.scan.arguments.gate
        assert gate is not None
        return laid_out_as(gate, grad_gate)


def _sum_tiles(part: Tensor) -> Tensor:
    return part[0] if part.shape[0] == 1 else part.sum(0)


def _like(rows: Tensor) -> Tensor:
    """Channels-last rows, whatever the layout of the argument."""
    return torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
