from dataclasses import replace
from math import prod

import pytest

from medmamba.labels import LabelMap
from medmamba.networks.registry import NETWORKS
from medmamba.networks.spec import NetworkSpec
from medmamba.plans.budget import GIB, NetworkRules, PriceList, registered_rules
from medmamba.plans.sizing import Request, size_by_memory
from medmamba.training.recipe import TrainingRecipe

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

    def memory(spec: NetworkSpec, batch: int) -> int:
        asked.append(spec.patch_size)
        # A little more than voxels say, so that estimates from a small patch are too low.
        return 1000 + batch * int(prod(spec.patch_size) ** 1.02)

    rules = NetworkRules(
        dimensions=frozenset({3}),
        arrange=lambda spec: replace(spec, strides=SPEC.strides, features=SPEC.features),
        divisor=lambda spec: (8, 8, 8),
        memory=memory,
    )
    request = Request(
        spacing_mm=(1.0, 1.0, 1.0), median_shape=(200, 200, 200), dataset_voxels=1e9, spec=SPEC
    )
    for memory_gb in (0.001, 0.004):
        asked.clear()
        sizes = size_by_memory(
            request, rules, PriceList(rules), memory_gb=memory_gb, dataset_fraction=1, confirm=True
        )
        assert memory(sizes.spec, 2) <= memory_gb * GIB
        assert sizes.memory_bytes is not None
        assert sizes.memory_bytes <= memory_gb * GIB
        assert len(set(asked)) < 12


def test_a_batch_that_was_extrapolated_is_confirmed() -> None:
    def memory(spec: NetworkSpec, batch: int) -> int:
        # More than twice the samples need more than twice the memory.
        return int(prod(spec.patch_size) * 10_000 * batch**1.2)

    rules = NetworkRules(
        dimensions=frozenset({3}),
        arrange=lambda spec: replace(spec, strides=SPEC.strides, features=SPEC.features),
        divisor=lambda spec: (8, 8, 8),
        memory=memory,
    )
    request = Request(
        spacing_mm=(1.0, 1.0, 1.0), median_shape=(32, 32, 32), dataset_voxels=1e9, spec=SPEC
    )
    sizes = size_by_memory(
        request, rules, PriceList(rules), memory_gb=24, dataset_fraction=1, confirm=True
    )
    assert sizes.batch_size > 4
    assert sizes.memory_bytes == memory(sizes.spec, sizes.batch_size)
    assert sizes.memory_bytes <= 24 * GIB


def test_the_registrys_rules_price_a_training_step() -> None:
    labels = LabelMap(values={"background": (0,), "a": (1,), "b": (2,)})
    rules = registered_rules(SPEC.name, TrainingRecipe(batch_size=2), labels, on_gpu=True)
    assert rules.dimensions == NETWORKS[SPEC.name].dimensions
    prices = PriceList(rules)
    small = prices.exact(SPEC)
    large = prices.exact(replace(SPEC, patch_size=(64, 32, 32)))
    assert small.fixed_bytes > 4 * 100_000
    assert large.bytes_per_sample == pytest.approx(2 * small.bytes_per_sample, rel=0.1)
