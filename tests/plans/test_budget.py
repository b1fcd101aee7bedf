from dataclasses import replace
from math import prod

import pytest

from medmamba.networks.registry import NETWORKS
from medmamba.networks.spec import NetworkSpec
from medmamba.plans.budget import GIB, NetworkRules, Price, PriceList, registered_rules
from medmamba.plans.sizing import Request, size_by_memory

SPEC = NetworkSpec(
    name="lightm_unet_s",
    in_channels=1,
    out_channels=3,
    patch_size=(32, 32, 32),
    features=(8, 16, 32, 64),
    strides=((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
    kernel_sizes=((3, 3, 3),) * 4,
    encoder_blocks=(1, 2, 2, 4),
    decoder_blocks=(1, 1, 1),
)


def test_one_price_per_architecture_and_one_to_confirm() -> None:
    asked: list[tuple[int, ...]] = []

    def price(spec: NetworkSpec) -> Price:
        asked.append(spec.patch_size)
        # A little more than voxels say, so that estimates from a small patch are too low.
        return Price(fixed_bytes=1000, bytes_per_sample=int(prod(spec.patch_size) ** 1.02))

    rules = NetworkRules(
        dimensions=frozenset({3}),
        arrange=lambda spec: replace(spec, strides=SPEC.strides, features=SPEC.features),
        divisor=lambda spec: (8, 8, 8),
        price=price,
    )
    request = Request(
        spacing_mm=(1.0, 1.0, 1.0), median_shape=(200, 200, 200), dataset_voxels=1e9, spec=SPEC
    )
    for memory_gb in (0.001, 0.004):
        asked.clear()
        sizes = size_by_memory(
            request, rules, PriceList(rules), memory_gb=memory_gb, dataset_fraction=1, confirm=True
        )
        assert price(sizes.spec).of(2) <= memory_gb * GIB
        assert sizes.memory_bytes is not None
        assert sizes.memory_bytes <= memory_gb * GIB
        assert len(asked) < 12


def test_the_registrys_price_holds_weights_and_grows_with_the_patch() -> None:
    rules = registered_rules(SPEC.name, bf16=True, optimizer_states=2)
    assert rules.dimensions == NETWORKS[SPEC.name].dimensions
    small = rules.price(SPEC)
    large = rules.price(replace(SPEC, patch_size=(64, 32, 32)))
    assert small.fixed_bytes == large.fixed_bytes > 4 * 100_000
    assert large.bytes_per_sample == pytest.approx(2 * small.bytes_per_sample, rel=0.05)
