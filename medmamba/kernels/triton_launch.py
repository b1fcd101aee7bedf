"""Buffers and launches of the Triton kernels: one method for each phase of a leg.

Shapes as in arguments.py; states and carries are (b, chunks, n, d) views, float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from medmamba.kernels import triton_backward, triton_forward
from medmamba.kernels.arguments import ScanArguments, empty_rows, is_channels_first
from medmamba.kernels.triton_cut import (
    NVIDIA_LANES,
    Leg,
    Tuning,
    blocks_per_chunk,
    forward_tile,
    group_channels,
    legs_of,
    tile_of,
    tiles_per_group,
)

# One warp per program; fused multiply-add is pinned, since its default differs between releases.
OPTIONS: dict[str, Any] = {"num_warps": 1, "enable_fp_fusion": True}
PASS_TILE = 32  # channels of one program of the pass over chunks
SPAN = 64  # chunks that one program passes when there are more than LONGEST_PASS
LONGEST_PASS = 256


class Scan:
    """The arguments of one scan as the kernels read them, and the launches over them."""

    def __init__(self, arguments: ScanArguments, tuning: Tuning) -> None:
        self.arguments = arguments
        self.tuning = tuning
        self.u = _rows(arguments.u)
        self.delta = _rows(arguments.delta)
        self.gate = None if arguments.gate is None else _rows(arguments.gate)
        self.A = arguments.A.contiguous()
        self.B = _rows(arguments.B)
        self.C = _rows(arguments.C)
        self.skip = _vector(arguments.skip)
        self.delta_bias = _vector(arguments.delta_bias)
        self.order = _vector(arguments.order)

    def float(self, *shape: int) -> Tensor:
        """An empty float32 buffer."""
        return torch.empty(shape, dtype=torch.float32, device=self.u.device)

    def rows(self) -> Tensor:
        """An empty float32 (b, l, d) buffer."""
        return self.float(*self.u.shape)

    def legs(self, *, trained: bool) -> tuple[Leg, ...]:
        """The walks of this scan."""
        return legs_of(self.arguments, self.tuning, trained=trained)

    def tiles_per_group(self, tile: int) -> int:
        """Programs side by side that one group needs."""
        return tiles_per_group(self.arguments, tile)

    def entering_states(self, leg: Leg, into: Tensor | None = None) -> Tensor | None:
        """The state that enters each chunk, None where all are zero.

        Args:
            leg: which walk.
            into: buffer (b, chunks, n, d) of all states to write this leg's block into.
        """
        initial = _entering(self.arguments.h0, leg)
        if not leg.cut.passes_states:
            return self._place(initial, leg, 0)
        states = self._states_of(leg, into)
        sums = self.chunk_states(leg, states, grad_out=None)
        self.state_pass(leg, states, sums, initial, adjoint=False)
        return states

    def entering_carries(
        self, leg: Leg, grad_out: Tensor, grad_h_last: Tensor | None
    ) -> Tensor | None:
        """The gradient that enters each chunk from the one after it, None where all are zero."""
        initial = _entering(grad_h_last, leg)
        if not leg.cut.passes_states:
            return self._place(initial, leg, -1)
        carries = self._states_of(leg, None)
        sums = self.chunk_states(leg, carries, grad_out=grad_out)
        self.state_pass(leg, carries, sums, initial, adjoint=True)
        return carries

    def chunk_states(self, leg: Leg, states: Tensor, grad_out: Tensor | None) -> Tensor:
        """Walk all chunks from zero; returns the sum of dt of each, (b, chunks, d)."""
        adjoint = grad_out is not None
        value = self.u if grad_out is None else grad_out
        weight = self.C if adjoint else self.B
        sums = self.float(self.arguments.batch, leg.cut.chunks, self.arguments.channels)
        grid, common = self._common(leg, forward_tile(self.arguments, self.tuning))
        del common["segment"]
        triton_forward.chunk_state[grid](
            value=value,
            delta=self.delta,
            A=self.A[:, leg.first :],
            weight=weight[..., leg.first :],
            delta_bias=self.delta_bias,
            order=self.order,
            states=states,
            delta_sum=sums,
            **common,
            **_strides("value", value),
            **_strides("delta", self.delta),
            **_strides("weight", weight),
            A_row=self.A.stride(0),
            states_chunk=states.stride(1),
            DESCEND=leg.descend != adjoint,
            ADJOINT=adjoint,
            **OPTIONS,
        )
        return sums

    def state_pass(
        self, leg: Leg, states: Tensor, sums: Tensor, initial: Tensor | None, *, adjoint: bool
    ) -> None:
        """Turn the states chunks end with into those that enter them, in place.

        Many chunks are walked in spans side by side: what every span does to a zero state first,
        then the pass over spans, then each span from the state that enters it.
        """
        per_window = leg.cut.per_window
        if per_window <= LONGEST_PASS:
            self._state_pass(leg, states, sums, initial, adjoint=adjoint)
            return
        spans = -(-per_window // SPAN)
        shape = (self.arguments.batch, leg.cut.windows * spans)
        ends = self.float(*shape, leg.last - leg.first, self.arguments.channels)
        end_sums = self.float(*shape, self.arguments.channels)
        sizes: dict[str, Any] = {"span": SPAN, "spans": spans, "adjoint": adjoint}
        self._state_pass(leg, states, sums, None, ends=ends, end_sums=end_sums, **sizes)
        upper = replace(leg, cut=replace(leg.cut, per_window=spans))
        self.state_pass(upper, ends, end_sums, initial, adjoint=adjoint)
        self._state_pass(leg, states, sums, ends, seeded=True, **sizes)

    def _state_pass(
        self,
        leg: Leg,
        states: Tensor,
        sums: Tensor,
        initial: Tensor | None,
        *,
        adjoint: bool,
        span: int | None = None,
        spans: int = 1,
        seeded: bool = False,
        ends: Tensor | None = None,
        end_sums: Tensor | None = None,
    ) -> None:
        batch, channels, cut = self.arguments.batch, self.arguments.channels, leg.cut
        tiles = -(-channels // PASS_TILE)
        grid = (tiles * (leg.last - leg.first) * spans * cut.windows * batch,)
        triton_forward.state_pass[grid](
            states=states,
            delta_sum=sums,
            A=self.A[:, leg.first :],
            initial=initial,
            ends=ends,
            end_sums=end_sums,
            initial_window=cut.windows - 1 if adjoint else 0,
            per_window=cut.per_window,
            span=span or cut.per_window,
            spans=spans,
            windows=cut.windows,
            channels=channels,
            states_chunk=states.stride(1),
            initial_batch=0 if initial is None else initial.stride(0),
            A_row=self.A.stride(0),
            N=leg.last - leg.first,
            BD=PASS_TILE,
            DESCEND=leg.descend != adjoint,
            SEEDED=seeded,
            **OPTIONS,
        )

    def chunk_scan(
        self,
        leg: Leg,
        states: Tensor | None,
        partial: Tensor | None,
        out: Tensor,
        *,
        last: Tensor,
        final: bool,
    ) -> None:
        """Write the output rows, or the float32 sum so far when other legs follow."""
        grid, common = self._common(leg, forward_tile(self.arguments, self.tuning))
        gate = self.gate if final else None
        triton_forward.chunk_scan[grid](
            **self._inputs(leg, final=final),
            gate=gate,
            **_strides("gate", gate),
            states=states,
            partial=partial,
            out=out,
            last_state=last[:, leg.first :] if leg.causal else None,
            **common,
            states_chunk=0 if states is None else states.stride(1),
            last_batch=last.stride(0),
            DESCEND=leg.descend,
            EXCLUSIVE=leg.exclusive,
            SEGMENTED=leg.cut.segments_per_chunk > 1,
            **OPTIONS,
        )

    def forward_pass(
        self,
        leg: Leg,
        *,
        states: Tensor | None,
        grad_out: Tensor,
        with_skip: bool,
        **buffers: Tensor | None,
    ) -> None:
        """First pass of the backward; `buffers` are named as the kernel's arguments."""
        grid, common = self._common(leg, tile_of(self.arguments, self.tuning.backward_tile))
        triton_backward.forward_pass[grid](
            **self._inputs(leg, final=with_skip),
            gate=self.gate,
            **_strides("gate", self.gate),
            states=states,
            grad_out=grad_out,
            **buffers,
            **common,
            **self._blocks(leg),
            batches=self.arguments.batch,
            **_strides("out", grad_out),
            states_chunk=0 if states is None else states.stride(1),
            DESCEND=leg.descend,
            EXCLUSIVE=leg.exclusive,
            SEGMENTED=leg.cut.segments_per_chunk > 1,
            **self._registers(),
            **OPTIONS,
        )

    def reverse_pass(
        self,
        leg: Leg,
        *,
        carries: Tensor | None,
        grad_out: Tensor,
        final: bool,
        grad_initial: Tensor | None,
        **buffers: Tensor | None,
    ) -> None:
        """Second pass of the backward; `buffers` are named as the kernel's arguments."""
        grid, common = self._common(leg, tile_of(self.arguments, self.tuning.backward_tile))
        triton_backward.reverse_pass[grid](
            **self._inputs(leg, final=True),
            carries=carries,
            grad_out=grad_out,
            grad_initial=grad_initial,
            **buffers,
            **common,
            **self._blocks(leg),
            batches=self.arguments.batch,
            **_strides("out", grad_out),
            carries_chunk=0 if carries is None else carries.stride(1),
            initial_batch=0 if grad_initial is None else grad_initial.stride(0),
            DESCEND=leg.descend,
            EXCLUSIVE=leg.exclusive,
            SEGMENTED=leg.cut.segments_per_chunk > 1,
            FINAL=final,
            **self._registers(),
            **OPTIONS,
        )

    def _inputs(self, leg: Leg, *, final: bool) -> dict[str, Any]:
        B, C = self.B[..., leg.first :], self.C[..., leg.first :]
        return {
            "u": self.u,
            "delta": self.delta,
            "A": self.A[:, leg.first :],
            "B": B,
            "C": C,
            "skip": self.skip if final else None,
            "delta_bias": self.delta_bias,
            "order": self.order,
            **_strides("u", self.u),
            **_strides("delta", self.delta),
            **_strides("B", B),
            **_strides("C", C),
            "A_row": self.A.stride(0),
        }

    def _common(self, leg: Leg, tile: int) -> tuple[tuple[int], dict[str, Any]]:
        """Grid and the sizes that all walking kernels share."""
        arguments, cut = self.arguments, leg.cut
        tiles = self.tiles_per_group(tile)
        sizes = {
            "length": arguments.length,
            "window": cut.window,
            "chunk_length": cut.chunk,
            "segment": cut.segment,
            "per_window": cut.per_window,
            "chunks": cut.chunks,
            "channels": arguments.channels,
            "group_channels": group_channels(arguments),
            "tiles_per_group": tiles,
            "groups": arguments.groups,
            "N": leg.last - leg.first,
            "BD": tile,
            "LANE_BITS": min(self.tuning.lanes, tile).bit_length() - 1,
            "EVEN": group_channels(arguments) % tile == 0,
            "SOFTPLUS": arguments.delta_softplus,
            "REVERSE": arguments.reverse,
        }
        return (arguments.batch * cut.chunks * arguments.groups * tiles,), sizes

    def _registers(self) -> dict[str, int]:
        """A cap, without which the assembler of NVIDIA doubles what the passes need."""
        cap = self.tuning.registers
        return {} if cap is None or self.tuning.lanes != NVIDIA_LANES else {"maxnreg": cap}

    def _blocks(self, leg: Leg) -> dict[str, int]:
        """Sizes that only the passes of the backward take."""
        return {
            "LEVELS": max((leg.last - leg.first - 1).bit_length(), 1),
            "ANCHOR": self.tuning.anchor,
            "blocks_per_chunk": blocks_per_chunk(leg.cut, self.tuning.anchor),
        }

    def _states_of(self, leg: Leg, into: Tensor | None) -> Tensor:
        if into is not None and leg.causal:
            return into[:, :, leg.first : leg.last]
        shape = (self.arguments.batch, leg.cut.chunks, leg.last - leg.first)
        return self.float(*shape, self.arguments.channels)

    def _place(self, initial: Tensor | None, leg: Leg, chunk: int) -> Tensor | None:
        """States that are zero but for one chunk."""
        if initial is None:
            return None
        states = self._states_of(leg, None).zero_()
        states[:, chunk] = initial
        return states


def laid_out_as(like: Tensor, rows: Tensor) -> Tensor:
    """Channels-last rows in the layout that a caller with `like` expects back."""
    return empty_rows(like, rows.dtype).copy_(rows) if is_channels_first(like) else rows


def _entering(state: Tensor | None, leg: Leg) -> Tensor | None:
    """A state (b, d, n) as (b, n, d) for the causal leg; the local one starts from zero."""
    if state is None or not leg.causal:
        return None
    return state.mT[:, leg.first : leg.last].float().contiguous()


def _rows(values: Tensor) -> Tensor:
    return values if values.stride(-1) == 1 else values.contiguous()


def _vector(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _strides(name: str, values: Tensor | None) -> dict[str, int]:
    """Strides of batch, row and, for B and C, group."""
    if values is None:
        return {f"{name}_batch": 0, f"{name}_row": 0}
    strides = {f"{name}_batch": values.stride(0), f"{name}_row": values.stride(1)}
    if values.dim() == 4:
        strides[f"{name}_group"] = values.stride(2)
    return strides
