"""Estimates of memory and operations: known sums, growth, and no trace left behind."""

from dataclasses import replace
from math import prod

import pytest
import torch

from medmamba.errors import PlanError
from medmamba.networks import NETWORKS, build_network
from medmamba.networks.describe import describe_networks, reference_spec
from medmamba.networks.memory import (
    activation_bytes_per_voxel,
    count_parameters,
    operations,
    saved_bytes,
)
from medmamba.networks.spec import NetworkSpec


def small(name: str, dimension: int = 3, **changes: object) -> NetworkSpec:
    spec = NetworkSpec(
        name=name,
        in_channels=1,
        out_channels=2,
        patch_size=(16,) * dimension,
        features=(8, 16),
        strides=((1,) * dimension, (2,) * dimension),
        kernel_sizes=((3,) * dimension,) * 2,
        encoder_blocks=(2, 2),
        decoder_blocks=(2,),
    )
    return replace(spec, **changes)  # type: ignore[arg-type]


def saved_bytes_of_a_real_step(spec: NetworkSpec, batch: int) -> int:
    network = build_network(spec)
    network.deep_supervision = True  # type: ignore[assignment]
    image = torch.zeros(batch, spec.in_channels, *spec.patch_size)
    known = {tensor.untyped_storage().data_ptr() for tensor in [*network.parameters(), image]}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(image)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("name", ["plain_unet", "umamba_bot", "lightm_unet_s"])
def test_estimate_counts_what_a_real_step_keeps(name: str) -> None:
    spec = NETWORKS[name].arrange(small(name))
    estimate = saved_bytes(spec, 2, on_gpu=False, bf16=False)
    assert estimate == pytest.approx(saved_bytes_of_a_real_step(spec, 2), rel=0.02)


def test_bf16_keeps_less_than_float32() -> None:
    spec = small("plain_unet", patch_size=(32, 32, 32))
    half = saved_bytes(spec, 1)
    full = saved_bytes(spec, 1, bf16=False)
    assert 0.4 < half / full < 0.8


def test_operations_of_convolutions_are_the_closed_form() -> None:
    spec = small("plain_unet")
    upper, lower = 16**3, 8**3
    layers = [
        (upper, 27 * 1 * 8),
        (upper, 27 * 8 * 8),
        (lower, 27 * 8 * 16),
        (lower, 27 * 16 * 16),
        (lower, 8 * 16 * 8),
        (upper, 27 * 16 * 8),
        (upper, 27 * 8 * 8),
        (upper, 8 * 2),
    ]
    assert operations(spec) == 2 * sum(voxels * work for voxels, work in layers)


def test_scan_adds_nine_operations_per_token_channel_and_state() -> None:
    spec = small("umamba_bot")
    tokens, width, state = 8**3, 16, 16
    inner, rank = 2 * width, 1
    matrices = width * 2 * inner + inner * (rank + 2 * state) + rank * inner + inner * width
    mixer = operations(spec) - operations(replace(spec, mixer="identity"))
    expected = tokens * (2 * matrices + 9 * inner * state)
    assert mixer == expected


def test_operations_grow_with_the_patch_beyond_what_is_computed_at_once() -> None:
    spec = reference_spec("lightm_unet", 3)
    small_patch = replace(spec, patch_size=(16, 16, 16))
    assert operations(spec) == 8**3 * operations(small_patch)


def test_activation_bytes_per_voxel_do_not_depend_on_the_patch() -> None:
    spec = small("plain_unet")
    larger = replace(spec, patch_size=(32, 32, 16))
    first, second = activation_bytes_per_voxel(spec), activation_bytes_per_voxel(larger)
    assert first == pytest.approx(second, rel=0.1)
    assert prod(larger.patch_size) == 4 * prod(spec.patch_size)


FAMILIES = {definition.build: name for name, definition in NETWORKS.items()}


@pytest.mark.parametrize("name", sorted(FAMILIES.values()))
def test_estimating_leaves_no_fake_tensor_behind(name: str) -> None:
    dimension = min(NETWORKS[name].dimensions)
    planned = small(
        name,
        dimension,
        patch_size=(32,) * dimension,
        features=(16, 32, 64),
        strides=((1,) * dimension, (2,) * dimension, (2,) * dimension),
        kernel_sizes=((3,) * dimension,) * 3,
        encoder_blocks=(2,) * 3,
        decoder_blocks=(2,) * 2,
    )
    spec = NETWORKS[name].arrange(planned)
    narrow = tuple(width * 8 // spec.features[0] for width in spec.features)
    blocks = tuple(min(count, 2) for count in spec.encoder_blocks)
    spec = replace(spec, features=narrow, encoder_blocks=blocks)
    assert saved_bytes(spec, 1) > 0
    network = build_network(spec).eval()
    with torch.no_grad():
        output = network(torch.zeros(1, 1, *spec.patch_size))
    assert type(output) is torch.Tensor
    assert torch.isfinite(output).all()


def test_options_are_part_of_the_estimate() -> None:
    spec = small("umamba_bot")
    wide = replace(spec, options={"expand": 4})
    assert saved_bytes(wide, 1) > saved_bytes(spec, 1)


def test_patch_that_does_not_fit_is_refused() -> None:
    with pytest.raises(PlanError, match=r"multiple of \[2, 2, 2\]"):
        saved_bytes(small("plain_unet", patch_size=(15, 16, 16)), 1)


def test_table_has_a_row_per_dimension() -> None:
    rows = describe_networks(["plain_unet"])
    assert [row.dimension for row in rows] == [2, 3]
    three = rows[1]
    assert three.parameters == count_parameters(reference_spec("plain_unet", 3))
    assert three.patch_multiple == (32, 32, 32)
    assert three.operations > 0
    assert three.activation_bytes_per_voxel > 0


def test_unknown_network_is_named() -> None:
    with pytest.raises(PlanError, match="'vnet' does not exist"):
        describe_networks(["vnet"])
