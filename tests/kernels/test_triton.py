"""The Triton kernels, interpreted, against the definition in float64."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from interpreted import Interpreted
from scan_cases import (
    Sizes,
    assert_agrees,
    golden_cases,
    in_float64,
    make_arguments,
    relative_error,
)

from medmamba.kernels import reference
from medmamba.kernels.arguments import Needs, ScanArguments
from medmamba.kernels.triton_cut import (
    AMD_LANES,
    NVIDIA_LANES,
    Tuning,
    causal_cut,
    forward_tile,
    legs_of,
)

pytest.importorskip("triton", reason="triton is not installed")

SMALL = Sizes(batch=1, length=9, channels=5, state=2)  # the interpreter takes 20 ms a token


@pytest.mark.parametrize("length", [0, 1, 4, 9])
def test_agrees_for_ragged_lengths(interpreted: Interpreted, length: int) -> None:
    assert_agrees(interpreted, make_arguments(replace(SMALL, length=length)))


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (33, 1), (6, 3)])
def test_agrees_for_ragged_tiles_and_groups(
    interpreted: Interpreted, channels: int, groups: int
) -> None:
    sizes = replace(SMALL, length=5, channels=channels, groups=groups)
    # with the first seed the terms of one channel's bias gradient cancel to a fiftieth
    assert_agrees(interpreted, make_arguments(sizes, seed=1))


@pytest.mark.parametrize("state", [1, 3, 16])
def test_agrees_for_any_state(interpreted: Interpreted, state: int) -> None:
    assert_agrees(interpreted, make_arguments(replace(SMALL, length=5, state=state)))


def test_agrees_when_states_are_walked_in_blocks(interpreted: Interpreted) -> None:
    blocks = interpreted.tuned(chunk=4, state_block=2)
    assert_agrees(blocks, make_arguments(replace(SMALL, length=5, state=3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_agrees_for_narrow_types(interpreted: Interpreted, dtype: torch.dtype) -> None:
    arguments = make_arguments(replace(SMALL, length=5, dtype=dtype), out_dtype=torch.float32)
    assert_agrees(interpreted, replace(arguments, delta=arguments.delta.float()))


def test_agrees_without_optional_pieces(interpreted: Interpreted) -> None:
    assert_agrees(interpreted, make_arguments(SMALL, bare=True))
    plain = make_arguments(SMALL, bare=True, delta_softplus=False)
    assert_agrees(interpreted, replace(plain, delta=plain.delta.abs()))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("segment", [0, 3])
def test_agrees_for_orders_and_segments(
    interpreted: Interpreted, reverse: bool, segment: int
) -> None:
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3)).int()
    options = {"order": order, "reverse": reverse, "segment": segment}
    assert_agrees(interpreted, make_arguments(SMALL, **options))


@pytest.mark.parametrize(("reset_every", "segment"), [(2, 0), (6, 0), (6, 3), (0, 6)])
def test_agrees_with_resets(interpreted: Interpreted, reset_every: int, segment: int) -> None:
    arguments = make_arguments(SMALL, reset_every=reset_every, segment=segment)
    assert_agrees(interpreted, arguments)


def test_a_reset_before_every_token_leaves_no_memory(interpreted: Interpreted) -> None:
    assert_agrees(interpreted, make_arguments(SMALL, reset_every=1))


def test_agrees_for_views(interpreted: Interpreted) -> None:
    arguments = make_arguments(replace(SMALL, length=5))
    wide = torch.cat([arguments.u, arguments.gate], dim=-1)
    projections = torch.cat([arguments.B, arguments.C], dim=-1)
    views = replace(
        arguments,
        u=wide.chunk(2, dim=-1)[0],
        gate=wide.chunk(2, dim=-1)[1],
        delta=arguments.delta.mT.contiguous().mT,
        B=projections.chunk(2, dim=-1)[0],
        C=projections.chunk(2, dim=-1)[1],
    )
    assert_agrees(interpreted, views)


def test_gradients_stay_exact_where_decays_are_strong(interpreted: Interpreted) -> None:
    arguments = make_arguments(replace(SMALL, length=40, channels=2), bare=True)
    rates, delta = -torch.full_like(arguments.A, 16.0), arguments.delta.abs() * 0.3 + 0.3
    _, _, states = interpreted.tuned(chunk=64).forward(
        strong := replace(arguments, A=rates, delta=delta), save_states=True
    )
    grad_out = torch.ones_like(arguments.u)
    needs = Needs(skip=False, gate=False, delta_bias=False, h0=False)
    grads = interpreted.tuned(chunk=64).backward(strong, states, grad_out, None, needs)
    exact = in_float64(strong)
    _, _, states = reference.forward(exact, save_states=True)
    expected = reference.backward(exact, states, grad_out.double(), None, needs)
    assert relative_error(grads.delta, expected.delta) <= 5e-7
    assert relative_error(grads.A, expected.A) <= 3e-6


@pytest.mark.slow
def test_states_pass_through_spans_of_many_chunks(interpreted: Interpreted) -> None:
    tiny = replace(SMALL, length=300, channels=2, state=1)
    assert_agrees(interpreted.tuned(chunk=1), make_arguments(tiny))


def test_missing_gradients_are_zero_and_unneeded_ones_are_skipped(
    interpreted: Interpreted,
) -> None:
    arguments = make_arguments(replace(SMALL, length=5))
    _, last, states = interpreted.forward(arguments, save_states=True)
    needs = Needs(*(name in ("u", "h0") for name in Needs._fields))
    only_last = interpreted.backward(arguments, states, None, torch.ones_like(last), needs)
    assert only_last.B is None
    assert only_last.A is None
    zeros = torch.zeros_like(arguments.u)
    same = interpreted.backward(arguments, states, zeros, torch.ones_like(last), Needs())
    assert torch.equal(only_last.u, same.u)
    assert torch.equal(only_last.h0, same.h0)


def test_nan_reaches_the_output_and_stays_in_its_channel(interpreted: Interpreted) -> None:
    arguments = make_arguments(replace(SMALL, length=5))
    delta = arguments.delta.clone()
    delta[0, 3, 2] = float("nan")
    out, _, _ = interpreted.forward(replace(arguments, delta=delta), save_states=False)
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[0, 3:, 2] = True
    assert torch.equal(out.isnan(), expected)


@pytest.mark.parametrize(
    "tokens", [(1, 10), pytest.param((11, 100), marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_golden_cases(
    interpreted: Interpreted, fixtures_dir: Path, tokens: tuple[int, int]
) -> None:
    checked = 0
    for case, tensors in golden_cases(fixtures_dir):
        if not tokens[0] <= tensors["in.u"].shape[-1] <= tokens[1]:
            continue
        arguments = _golden_arguments(case, tensors)
        out, last, states = interpreted.forward(arguments, save_states=True)
        assert relative_error(out, tensors["out"].mT) <= 1e-6
        assert relative_error(last, tensors["last_state"]) <= 1e-6
        grad_out = tensors["grad_out"].float().mT
        grads = interpreted.backward(arguments, states, grad_out, None, Needs())
        assert relative_error(grads.u, tensors["grad.u"].mT) <= 3e-6
        assert relative_error(grads.delta, tensors["grad.delta"].mT) <= 3e-6
        for name in ("A", "D", "delta_bias", "B", "C", "z"):
            if f"grad.{name}" in tensors:
                found = getattr(grads, {"D": "skip", "z": "gate"}.get(name, name))
                expected = _golden_layout(name, tensors[f"grad.{name}"])
                assert relative_error(found, expected) <= 3e-6, name
        checked += 1
    assert checked


def _golden_layout(name: str, value: torch.Tensor) -> torch.Tensor:
    """A golden gradient as the backend lays it out."""
    if name in ("B", "C"):
        return (value.unsqueeze(1) if value.dim() == 3 else value).movedim(-1, 1)
    return value.mT if name == "z" else value


def _golden_arguments(case: dict[str, object], tensors: dict[str, torch.Tensor]) -> ScanArguments:
    def rows(name: str) -> torch.Tensor | None:
        value = tensors.get(f"in.{name}")
        return None if value is None else value.float().mT

    def projection(name: str) -> torch.Tensor:
        value = tensors[f"in.{name}"].float()
        return (value.unsqueeze(1) if value.dim() == 3 else value).movedim(-1, 1)

    def vector(name: str) -> torch.Tensor | None:
        value = tensors.get(f"in.{name}")
        return None if value is None else value.float()

    return ScanArguments(
        u=rows("u"),
        delta=rows("delta"),
        A=tensors["in.A"].float(),
        B=projection("B"),
        C=projection("C"),
        skip=vector("D"),
        gate=rows("z"),
        delta_bias=vector("delta_bias"),
        delta_softplus=bool(case["delta_softplus"]),
    )


def test_refuses_float64_and_tells_what_it_lacks() -> None:
    from medmamba.kernels import triton

    arguments = make_arguments(SMALL)
    assert "GPU" in triton.refusal(arguments)
    wide = replace(arguments, A=arguments.A.double())
    assert "float64" in triton.refusal(wide)


@pytest.mark.parametrize("length", [1, 64, 1000, 2**21])
@pytest.mark.parametrize("reset_every", [0, 1, 49, 512, 5000])
@pytest.mark.parametrize("chunk", [None, 64, 100])
def test_every_position_belongs_to_one_chunk(
    length: int, reset_every: int, chunk: int | None
) -> None:
    rows = torch.empty((1, length, 64), device="meta")
    projection = torch.empty((1, length, 1, 16), device="meta")
    matrix = torch.empty((64, 16), device="meta")
    arguments = ScanArguments(
        u=rows, delta=rows, A=matrix, B=projection, C=projection, reset_every=reset_every
    )
    cut = causal_cut(arguments, Tuning(chunk=chunk), trained=True)
    first = [
        index // cut.per_window * cut.window + index % cut.per_window * cut.chunk
        for index in range(cut.chunks)
    ]
    ends = [
        min(start + cut.chunk, (index // cut.per_window + 1) * cut.window, length)
        for index, start in enumerate(first)
    ]
    assert first[0] == 0
    assert ends[-1] == length or cut.per_window > 1
    covered = [(start, end) for start, end in zip(first, ends, strict=True) if end > start]
    assert [end for _, end in covered[:-1]] == [start for start, _ in covered[1:]]
    assert covered[-1][1] == length
    if reset_every and not cut.passes_states:
        assert cut.segment == min(reset_every, length)
        assert cut.window % cut.segment == 0
    assert legs_of(arguments, Tuning(), trained=True)[-1].causal


def test_wide_wavefronts_take_twice_the_channels_forward_and_change_no_cut() -> None:
    arguments = make_arguments(Sizes(length=5000, channels=96), bare=True)
    amd, nvidia = Tuning(lanes=AMD_LANES), Tuning(lanes=NVIDIA_LANES)
    assert (forward_tile(arguments, amd), forward_tile(arguments, nvidia)) == (128, 64)
    assert forward_tile(make_arguments(Sizes(channels=64), bare=True), amd) == 64
    for trained in (False, True):
        assert causal_cut(arguments, amd, trained=trained) == causal_cut(
            arguments, nvidia, trained=trained
        )


def test_agrees_on_wide_wavefronts(interpreted: Interpreted) -> None:
    sizes = Sizes(batch=1, length=9, channels=130, state=3)
    assert_agrees(interpreted.tuned(chunk=4, lanes=AMD_LANES), make_arguments(sizes))
