"""Scan orders: permutations of any grid, with the steps their definitions promise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medmamba.errors import KernelError
from medmamba.kernels import SCAN_ORDERS, ScanOrder
from medmamba.kernels.scan_order import local_window, local_window_reset, scan_orders

GRIDS = st.lists(st.integers(1, 11), min_size=2, max_size=3).map(tuple)
AWKWARD = [(1, 1, 1), (7, 9, 10), (5, 1, 16), (16, 16, 16), (3, 8), (1, 5)]


def coordinates(order: ScanOrder, shape: tuple[int, ...]) -> torch.Tensor:
    """(length, axes): where the walk is at each position."""
    tokens = order.tokens(math.prod(shape))
    return torch.stack(torch.unravel_index(tokens, shape), dim=1)


@settings(max_examples=40, deadline=None)
@given(shape=GRIDS)
@pytest.mark.parametrize("name", SCAN_ORDERS)
def test_every_order_is_a_permutation(name: str, shape: tuple[int, ...]) -> None:
    length = math.prod(shape)
    for order in scan_orders(name, shape):
        tokens = order.tokens(length)
        assert torch.equal(tokens.sort().values, torch.arange(length))
        restored = torch.empty(length, dtype=torch.int64)
        restored[tokens] = torch.arange(length)
        assert torch.equal(tokens[restored], torch.arange(length))


@pytest.mark.parametrize("shape", AWKWARD)
@pytest.mark.parametrize("name", SCAN_ORDERS)
def test_tables_fit_the_kernels(name: str, shape: tuple[int, ...]) -> None:
    for order in scan_orders(name, shape):
        if order.index is not None:
            assert order.index.dtype is torch.int32
            assert order.index.is_contiguous()


@settings(max_examples=40, deadline=None)
@given(shape=GRIDS)
def test_snake_steps_to_a_neighbour(shape: tuple[int, ...]) -> None:
    (order,) = scan_orders("snake", shape)
    steps = coordinates(order, shape).diff(dim=0).abs().sum(dim=1)
    assert (steps == 1).all()


def test_cross_has_a_raster_for_every_fastest_axis() -> None:
    shape = (3, 4, 5)
    orders = scan_orders("cross", shape)
    assert len(orders) == 6
    fastest = {coordinates(order, shape).diff(dim=0)[0].abs().argmax().item() for order in orders}
    assert fastest == {0, 1, 2}
    for forward, backward in zip(orders[:3], orders[3:], strict=True):
        assert torch.equal(forward.tokens(60).flip(0), backward.tokens(60))
    assert len(scan_orders("cross", (3, 4))) == 4
    columns = scan_orders("cross", (3, 4))[1].tokens(12)
    assert columns[:4].tolist() == [0, 4, 8, 1]


def test_tri_ends_with_the_slice_order() -> None:
    shape = (3, 4, 5)
    last = scan_orders("tri", shape)[2].tokens(60)
    expected = torch.arange(60).reshape(shape).permute(1, 2, 0).reshape(-1)
    assert torch.equal(last, expected)


def test_bidirectional_swaps_when_the_volume_is_reversed() -> None:
    first, second = scan_orders("bidirectional", (2, 3, 4))
    assert torch.equal(23 - first.tokens(24), second.tokens(24))


@settings(max_examples=40, deadline=None)
@given(shape=GRIDS, window=st.integers(1, 5))
def test_windows_are_visited_one_after_the_other(shape: tuple[int, ...], window: int) -> None:
    (order,) = local_window(shape, window)
    windows = coordinates(order, shape) // window
    changes = (windows.diff(dim=0) != 0).any(dim=1).sum().item()
    assert changes == math.prod(-(-size // window) for size in shape) - 1


@pytest.mark.parametrize(
    ("shape", "sides"),
    [((8, 16), (8, 8)), ((12, 3), (6, 3)), ((16, 20, 7), (8, 5, 7)), ((11, 4), (1, 4))],
)
def test_separate_windows_divide_every_grid(shape: tuple[int, ...], sides: tuple[int, ...]) -> None:
    (order,) = local_window_reset(shape)
    assert order.reset_every == math.prod(sides)
    windows = coordinates(order, shape) // torch.tensor(sides)
    assert all(len(part.unique(dim=0)) == 1 for part in windows.split(order.reset_every))


def test_unknown_orders_are_refused() -> None:
    with pytest.raises(KernelError, match="give one of raster"):
        scan_orders("spiral", (2, 2))
