"""The compiled scan against the definition, on every instruction set this machine has."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scan_cases import Sizes, assert_agrees, make_arguments

from medmamba.errors import KernelError
from medmamba.kernels.arguments import Needs, ScanArguments
from medmamba.kernels.native_call import INSTRUCTION_SET_VARIABLE

native = pytest.importorskip("medmamba.kernels.native", reason="the native kernel is not built")
SETS = native._native.instruction_sets()
ALL = Needs()


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(INSTRUCTION_SET_VARIABLE, request.param)
    return str(request.param)


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 64, 65, 200])
@pytest.mark.parametrize("channels", [1, 16, 20, 64, 70])
def test_agrees_for_ragged_shapes(instruction_set: str, length: int, channels: int) -> None:
    assert_agrees(native, make_arguments(Sizes(length=length, channels=channels)))


@pytest.mark.parametrize("state", [1, 4, 5, 8, 16, 20, 32, 64, 300])
def test_agrees_for_any_state(instruction_set: str, state: int) -> None:
    assert_agrees(native, make_arguments(Sizes(state=state, length=67, channels=18)))


@pytest.mark.parametrize(("channels", "groups"), [(8, 2), (48, 3), (96, 2), (21, 3), (6, 6)])
def test_agrees_for_groups(instruction_set: str, channels: int, groups: int) -> None:
    assert_agrees(native, make_arguments(Sizes(channels=channels, groups=groups)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_agrees_for_narrow_types(
    instruction_set: str, dtype: torch.dtype, out_dtype: torch.dtype | None
) -> None:
    sizes = Sizes(dtype=dtype, channels=40)
    assert_agrees(native, make_arguments(sizes, out_dtype=out_dtype or dtype))


def test_agrees_for_mixed_types(instruction_set: str) -> None:
    arguments = make_arguments(Sizes(dtype=torch.bfloat16))
    mixed = replace(arguments, delta=arguments.delta.float(), B=arguments.B.float())
    assert_agrees(native, mixed)


def test_agrees_without_optional_pieces(instruction_set: str) -> None:
    assert_agrees(native, make_arguments(Sizes(), bare=True))
    plain = make_arguments(Sizes(), bare=True, delta_softplus=False)
    assert_agrees(native, replace(plain, delta=plain.delta.abs()))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("reset_every", [0, 1, 8, 50, 64])
@pytest.mark.parametrize("shuffled", [False, True])
def test_agrees_for_orders(
    instruction_set: str, reverse: bool, reset_every: int, shuffled: bool
) -> None:
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1)).int()
    arguments = make_arguments(
        Sizes(length=150),
        order=order if shuffled else None,
        reverse=reverse,
        reset_every=reset_every,
    )
    assert_agrees(native, arguments)


@pytest.mark.parametrize("segment", [1, 3, 16, 24, 32])
@pytest.mark.parametrize("channels", [5, 64])
@pytest.mark.parametrize("gated", [False, True])
def test_agrees_for_local_segments(
    instruction_set: str, segment: int, channels: int, gated: bool
) -> None:
    sizes = Sizes(length=150, channels=channels, state=20)
    assert_agrees(native, make_arguments(sizes, bare=not gated, segment=segment))


def test_agrees_for_segments_with_order_and_resets(instruction_set: str) -> None:
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1)).int()
    options = {"order": order, "reverse": True, "segment": 8, "reset_every": 48}
    assert_agrees(native, make_arguments(Sizes(length=150), **options))


@pytest.mark.parametrize("segment", [33, 64, 100, 150, 400])
@pytest.mark.parametrize("gated", [False, True])
def test_agrees_for_segments_longer_than_a_tile(
    instruction_set: str, segment: int, gated: bool
) -> None:
    sizes = Sizes(length=290, channels=21, state=20)
    assert_agrees(native, make_arguments(sizes, bare=not gated, segment=segment))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_for_long_segments_with_order_and_resets(dtype: torch.dtype) -> None:
    order = torch.randperm(350, generator=torch.Generator().manual_seed(1)).int()
    options = {"order": order, "reverse": True, "segment": 70, "reset_every": 140}
    assert_agrees(native, make_arguments(Sizes(length=350, dtype=dtype), **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("walk", ["raster", "reverse", "shuffled"])
def test_agrees_with_channels_first_views(
    instruction_set: str, dtype: torch.dtype, walk: str
) -> None:
    order = torch.randperm(130, generator=torch.Generator().manual_seed(1)).int()
    arguments = make_arguments(
        Sizes(channels=37, length=130, state=7, dtype=dtype),
        order=order if walk == "shuffled" else None,
        reverse=walk == "reverse",
    )
    first = replace(
        arguments,
        **{name: getattr(arguments, name).mT.contiguous().mT for name in ("u", "delta", "gate")},
        **{
            name: getattr(arguments, name).movedim(1, -1).contiguous().movedim(-1, 1)
            for name in ("B", "C")
        },
    )
    assert_agrees(native, first)
    out = native.forward(first, save_states=False)[0]
    assert out.mT.is_contiguous()


def test_agrees_with_row_views(instruction_set: str) -> None:
    arguments = make_arguments(Sizes(channels=16, state=4))
    wide = torch.cat([arguments.u, arguments.gate], dim=-1)
    projected = torch.cat([arguments.B, arguments.C], dim=-1)
    views = replace(
        arguments,
        u=wide[..., :16],
        gate=wide[..., 16:],
        B=projected[..., :4],
        C=projected[..., 4:],
    )
    assert_agrees(native, views)


@pytest.mark.parametrize("scale", [0.001, 30.0, 1000.0])
def test_extreme_steps_stay_exact(instruction_set: str, scale: float) -> None:
    arguments = make_arguments(Sizes(), bare=True, delta_softplus=False)
    assert_agrees(native, replace(arguments, delta=arguments.delta.abs() * scale))


def test_growing_states_are_exact(instruction_set: str) -> None:
    arguments = make_arguments(Sizes(length=20), bare=True)
    assert_agrees(native, replace(arguments, A=arguments.A.abs() * 0.1))


def test_nan_and_infinity_reach_the_output(instruction_set: str) -> None:
    arguments = make_arguments(Sizes(batch=1, length=80, channels=20))
    for name in ("u", "delta", "gate", "B", "C"):
        value = getattr(arguments, name).clone()
        value[0, 30, 0] = float("nan")
        out = native.forward(replace(arguments, **{name: value}), save_states=False)[0]
        assert out[0, 30].isnan().any(), name
        assert out[0, :30].isfinite().all(), name
    infinite = replace(arguments, u=arguments.u.index_fill(1, torch.tensor([30]), torch.inf))
    assert not native.forward(infinite, save_states=False)[0][0, 30].isfinite().any()


def gradients(arguments: ScanArguments, threads: int) -> list[torch.Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out, last, states = native.forward(arguments, save_states=True)
        ones = torch.ones_like(out)
        return [out, last, *native.backward(arguments, states, ones, last, ALL)]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("batch", "channels", "state"),
    [(1, 16, 16), (1, 16, 20), (2, 16, 8), (1, 64, 16), (2, 64, 16), (1, 200, 16)],
)
@pytest.mark.parametrize("segment", [0, 16])
def test_bits_do_not_depend_on_threads(batch: int, channels: int, state: int, segment: int) -> None:
    # long enough for several threads: fewer blocks than threads are cut by states
    sizes = Sizes(batch=batch, length=2000 * 64 // channels, channels=channels, state=state)
    arguments = make_arguments(sizes, segment=segment)
    one = gradients(arguments, 1)
    for threads in (1, 2, 3, 7):
        for first, second in zip(one, gradients(arguments, threads), strict=True):
            assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_may_use_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = make_arguments(Sizes(batch=1, length=40_000, channels=16), bare=True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    expected = native.forward(arguments, save_states=False)[0]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        found = native.forward(arguments, save_states=False)[0]
        os.write(writing, b"1" if found.numpy().tobytes() == expected.numpy().tobytes() else b"0")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 1) == b"1"


def test_empty_problems_have_empty_results() -> None:
    for sizes in (Sizes(batch=0), Sizes(length=0), Sizes(channels=0)):
        arguments = make_arguments(sizes)
        out, last, states = native.forward(arguments, save_states=True)
        grads = native.backward(arguments, states, out, last, ALL)
        assert out.shape == arguments.u.shape
        if sizes.length == 0:
            assert torch.equal(last, arguments.h0)
            assert torch.equal(grads.h0, last)


@pytest.mark.parametrize("channels", [5, 40])
def test_a_gradient_that_repeats_one_value_needs_no_copy(
    instruction_set: str, channels: int
) -> None:
    arguments = make_arguments(Sizes(channels=channels, length=70))
    out, _, states = native.forward(arguments, save_states=True)
    per_token = torch.randn(out.shape[0], out.shape[1], 1)
    for repeated in (torch.tensor(0.5).expand_as(out), per_token.expand_as(out)):
        found = native.backward(arguments, states, repeated, None, ALL)
        expected = native.backward(arguments, states, repeated.contiguous(), None, ALL)
        for first, second in zip(found, expected, strict=True):
            assert torch.equal(first, second)


def test_unwanted_gradients_are_not_made() -> None:
    arguments = make_arguments(Sizes())
    out, _, states = native.forward(arguments, save_states=True)
    grads = native.backward(arguments, states, out, None, Needs(*[False] * 9)._replace(u=True))
    assert grads.u is not None
    assert all(grad is None for name, grad in grads._asdict().items() if name != "u")


@pytest.mark.parametrize("bad", [[0, 0, 2], [0, 1, 3], [-1, 0, 1]])
def test_refuses_an_order_that_is_no_permutation(bad: list[int]) -> None:
    order = torch.tensor(bad, dtype=torch.int32)
    with pytest.raises(KernelError, match="permutation"):
        native.forward(make_arguments(Sizes(length=3), order=order), save_states=False)


def test_rows_beyond_32_bit_offsets(instruction_set: str, tmp_path: Path) -> None:
    # a file with holes: three rows of it are ever touched
    size = 2**31 + 64
    rows = torch.from_file(str(tmp_path / "rows"), shared=True, size=size, dtype=torch.bfloat16)
    far = rows.as_strided((1, 3, 16), (size, 2**30, 1))
    arguments = make_arguments(Sizes(batch=1, length=3, channels=16, dtype=torch.bfloat16))
    far.copy_(arguments.u)
    out, last, states = native.forward(arguments, save_states=True)
    moved = replace(arguments, u=far)
    assert torch.equal(native.forward(moved, save_states=False)[0], out)
    for near, found in zip(
        native.backward(arguments, states, out, last, ALL),
        native.backward(moved, states, out, last, ALL),
        strict=True,
    ):
        assert torch.equal(near, found)


@pytest.mark.parametrize("segment", [0, 1, 24, 32])
@pytest.mark.parametrize("length", [0, 1, 32, 33, 64, 65, 2**40])
def test_python_and_the_extension_agree_on_the_states(segment: int, length: int) -> None:
    u = torch.empty(1, 1, 1).expand(3, length, 40)
    B = torch.empty(1, 1, 1, 1).expand(3, length, 2, 18)
    A = torch.empty(40, 18)
    arguments = ScanArguments(u=u, delta=u, A=A, B=B, C=B, segment=segment)
    expected = native._native.states_shape(3, length, 40, 2, 18, segment)
    assert native.states_shape(arguments) == tuple(expected)


def test_refuses_an_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INSTRUCTION_SET_VARIABLE, "v9")
    with pytest.raises(KernelError, match="v9"):
        native.forward(make_arguments(Sizes()), save_states=False)
