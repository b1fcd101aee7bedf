"""The PyTorch scan for machines without a compiled kernel, against the definition."""

import pytest
import torch
from scan_cases import Sizes, assert_agrees, make_arguments

from medmamba.kernels import chunked


@pytest.mark.parametrize("length", [1, 63, 64, 65, 150])
@pytest.mark.parametrize("groups", [1, 2])
def test_agrees_for_ragged_lengths(length: int, groups: int) -> None:
    assert_agrees(chunked, make_arguments(Sizes(length=length, groups=groups)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_agrees_for_narrow_types(dtype: torch.dtype) -> None:
    assert_agrees(chunked, make_arguments(Sizes(dtype=dtype)))


def test_agrees_without_optional_pieces() -> None:
    assert_agrees(chunked, make_arguments(Sizes(), bare=True))


@pytest.mark.parametrize("reset_every", [0, 1, 8, 50, 64])
@pytest.mark.parametrize("reverse", [False, True])
def test_agrees_for_orders_and_resets(reset_every: int, reverse: bool) -> None:
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1)).int()
    options = {"order": order, "reverse": reverse, "reset_every": reset_every}
    assert_agrees(chunked, make_arguments(Sizes(length=150), **options))


def test_empty_problems() -> None:
    arguments = make_arguments(Sizes(length=0))
    out, last, _ = chunked.forward(arguments, save_states=True)
    assert out.shape == arguments.u.shape
    assert torch.equal(last, arguments.h0)


def test_steep_decays_stay_finite() -> None:
    arguments = make_arguments(Sizes(length=100), bare=True, delta_softplus=False)
    arguments.delta.abs_().mul_(1000.0)
    out, last, _ = chunked.forward(arguments, save_states=False)
    assert out.isfinite().all()
    assert last.isfinite().all()
