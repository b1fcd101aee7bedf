from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmamba.plans.topology import (
    SMALLEST_FEATURE_EDGE,
    Topology,
    derive_topology,
    plain_unet_cost,
    residual_unet_cost,
    round_up,
)


@given(
    spacing=st.lists(st.floats(0.2, 10), min_size=2, max_size=3),
    edges=st.lists(st.integers(4, 300), min_size=3, max_size=3),
)
def test_every_axis_keeps_its_smallest_edge(spacing: list[float], edges: list[int]) -> None:
    patch = tuple(edges[: len(spacing)])
    found = derive_topology(tuple(spacing), patch)
    assert found.strides[0] == (1,) * len(spacing)
    assert found.kernel_sizes[-1] == (3,) * len(spacing)
    assert len(found.strides) == len(found.kernel_sizes) == len(found.features)
    for axis, edge in enumerate(found.patch_size):
        total = prod(stride[axis] for stride in found.strides)
        assert total == found.divisor[axis]
        assert edge % total == 0
        assert patch[axis] <= edge < patch[axis] + total
        assert edge // total >= min(SMALLEST_FEATURE_EDGE, patch[axis])


def test_a_coarse_axis_is_pooled_later_and_starts_flat() -> None:
    found = derive_topology((5.0, 1.0, 1.0), (20, 160, 160))
    assert found.strides[1:3] == ((1, 2, 2), (1, 2, 2))
    assert found.kernel_sizes[:2] == ((1, 3, 3), (1, 3, 3))
    assert found.kernel_sizes[2] == (3, 3, 3)


def test_isotropic_patch_of_128() -> None:
    found = derive_topology((1.0, 1.0, 1.0), (128, 128, 128))
    assert found.features == (32, 64, 128, 256, 320, 320)
    assert found.divisor == (32, 32, 32)
    # nnU-Net's reference network fills its reference budget with a batch of two.
    assert plain_unet_cost(found, classes=2) < 560e6 * 1.05


def test_costs_are_those_counted_by_hand() -> None:
    topology = Topology(
        strides=((1, 1), (2, 2)),
        kernel_sizes=((3, 3), (3, 3)),
        patch_size=(8, 8),
        divisor=(2, 2),
    )
    encoder = 2 * 32 * 64 + 2 * 64 * 16
    decoder = (2 + 1) * 32 * 64
    assert plain_unet_cost(topology, classes=3) == encoder + decoder + 3 * 64
    stem, first, second = 32 * 64, 2 * 1 * 32 * 64, 2 * 3 * 64 * 16 + 64 * 16
    expected = stem + first + second + 2 * 32 * 64 + 3 * 64
    assert residual_unet_cost(topology, classes=3, blocks=(1, 3)) == expected


@pytest.mark.parametrize(
    ("patch", "divisor", "expected"),
    [((77.5, 71.0), (16, 16), (80, 80)), ((64, 3), (32, 1), (64, 3)), ((1,), (8,), (8,))],
)
def test_rounding_up(
    patch: tuple[float, ...], divisor: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert round_up(patch, divisor) == expected
