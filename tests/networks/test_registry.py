"""Promises every registered network keeps; a new network is tested by being registered."""

from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medmamba.errors import PlanError
from medmamba.networks import NETWORKS, build_network, check_patch
from medmamba.networks.spec import Mixer, NetworkSpec
from medmamba.networks.transfer import heads_of, transfer
from medmamba.networks.weights import load_exactly

STAGES = 3
CLASSES = 3
CHANNELS = 2
NARROWEST = 8
"""Channels of the first stage in these tests; group norms need 8."""
LARGE_MULTIPLE = 16
"""Patches of networks with at least this multiple are kept small."""
TWIN_TOLERANCE = 0.02
"""A dwconv twin has the parameter count of its network within 2 %."""

VARIANTS = [
    (name, dimension)
    for name, definition in sorted(NETWORKS.items())
    for dimension in sorted(definition.dimensions)
]
each_variant = pytest.mark.parametrize(("name", "dimension"), VARIANTS)


def _families() -> list[Any]:
    """Every code path once; names that only differ in widths are left to the slow tier."""
    seen = set()
    rows = []
    for name, dimension in VARIANTS:
        path = (NETWORKS[name].build, dimension)
        rows.append(pytest.param(name, dimension, marks=[pytest.mark.slow] if path in seen else []))
        seen.add(path)
    return rows


each_network = pytest.mark.parametrize(("name", "dimension"), _families())


def plan(name: str, dimension: int, *, stages: int = STAGES) -> NetworkSpec:
    """A small plan, arranged for the network and then made narrow."""
    return fit_patch(
        NetworkSpec(
            name=name,
            in_channels=CHANNELS,
            out_channels=CLASSES,
            patch_size=(1,) * dimension,
            features=tuple(16 * 2**stage for stage in range(stages)),
            strides=((1,) * dimension,) + ((2,) * dimension,) * (stages - 1),
            kernel_sizes=((3,) * dimension,) * stages,
            encoder_blocks=(2,) * stages,
            decoder_blocks=(2,) * (stages - 1),
        )
    )


def fit_patch(planned: NetworkSpec) -> NetworkSpec:
    """Arrange, narrow, and take the smallest patch with unequal edges that the network accepts."""
    definition = NETWORKS[planned.name]
    spec = definition.arrange(planned)
    divisor = definition.divisor(spec)
    # Unequal edges, odd multiples too: a swapped axis or an assumed power of two shows.
    edges = tuple(
        size * ((3 if axis == 0 else 2) if size < LARGE_MULTIPLE else 1 + (axis == 0))
        for axis, size in enumerate(divisor)
    )
    spec = definition.arrange(replace(planned, patch_size=edges))
    narrow = tuple(width * NARROWEST // spec.features[0] for width in spec.features)
    blocks = tuple(min(count, 2) for count in spec.encoder_blocks)
    return replace(spec, features=narrow, encoder_blocks=blocks)


def image_for(spec: NetworkSpec, *, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, spec.in_channels, *spec.patch_size, generator=generator)


def seeded(spec: NetworkSpec) -> nn.Module:
    torch.manual_seed(0)
    return build_network(spec)


def train_step(network: nn.Module, image: Tensor) -> Tensor:
    network.deep_supervision = True  # type: ignore[assignment]
    loss = torch.zeros(())
    for output in network(image):
        target = torch.zeros(output.shape[0], *output.shape[2:], dtype=torch.long)
        target[..., ::2] = 1
        loss = loss + nn.functional.cross_entropy(output.float(), target)
    loss.backward()
    return loss.detach()


@each_network
def test_logits_have_the_shape_of_the_image(name: str, dimension: int) -> None:
    spec = plan(name, dimension)
    network = seeded(spec).eval()
    image = image_for(spec)
    keys = list(network.state_dict())
    with torch.no_grad():
        single = network(image)
        network.deep_supervision = True
        several = network(image)
    assert list(network.state_dict()) == keys
    assert single.shape == (1, CLASSES, *spec.patch_size)
    assert torch.isfinite(single).all()
    assert isinstance(several, list)
    assert torch.equal(several[0], single)
    sizes = [prod(output.shape[2:]) for output in several]
    assert sizes == sorted(sizes, reverse=True)
    assert all(output.shape[:2] == (1, CLASSES) for output in several)


@each_network
def test_every_parameter_gets_a_gradient_in_bf16_too(name: str, dimension: int) -> None:
    spec = plan(name, dimension)
    # Evaluation mode keeps branches that training drops at random.
    network = seeded(spec).eval()
    image = image_for(spec)
    reference = train_step(network, image)
    check_gradients(network)
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = train_step(network, image)
    check_gradients(network)
    assert float(loss) == pytest.approx(float(reference), rel=0.1)


def check_gradients(network: nn.Module) -> None:
    for key, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.dtype == torch.float32, key
            assert torch.isfinite(parameter.grad).all(), key


@each_network
def test_state_dict_round_trips_without_duplicates(name: str, dimension: int) -> None:
    spec = plan(name, dimension)
    first, second = seeded(spec).eval(), build_network(spec).eval()
    state = first.state_dict()
    storages = [tensor.data_ptr() for tensor in state.values()]
    assert len(set(storages)) == len(storages)
    load_exactly(second, state)
    image = image_for(spec)
    with torch.no_grad():
        assert torch.equal(first(image), second(image))


@each_variant
def test_patch_that_does_not_fit_is_refused_with_the_multiple(name: str, dimension: int) -> None:
    spec = plan(name, dimension)
    divisor = NETWORKS[name].divisor(spec)
    wrong = (spec.patch_size[0] + 1, *spec.patch_size[1:])
    with pytest.raises(PlanError, match=rf"multiple of \[{divisor[0]}, ") as caught:
        build_network(replace(spec, patch_size=wrong))
    assert str(list(wrong)) in str(caught.value)


@each_network
def test_anisotropic_strides_are_taken_or_replaced(name: str, dimension: int) -> None:
    first = (1,) + (2,) * (dimension - 1)
    spec = fit_patch(
        replace(
            plan("plain_unet", dimension),
            name=name,
            features=(16, 32, 64),
            strides=((1,) * dimension, first, (2,) * dimension),
            kernel_sizes=((1, *(3,) * (dimension - 1)),) + ((3,) * dimension,) * 2,
        )
    )
    network = seeded(spec).eval()
    with torch.no_grad():
        assert network(image_for(spec)).shape == (1, CLASSES, *spec.patch_size)


@each_network
@pytest.mark.parametrize("mixer", ["identity", "dwconv"])
def test_twin_trains_and_dwconv_matches_the_count(name: str, dimension: int, mixer: Mixer) -> None:
    spec = replace(plan(name, dimension), mixer=mixer)
    network = seeded(spec)
    assert torch.isfinite(train_step(network, image_for(spec)))
    original = _count(build_network(replace(spec, mixer="mamba")))
    if mixer == "dwconv":
        assert _count(network) == pytest.approx(original, rel=TWIN_TOLERANCE)
    else:
        assert _count(network) <= original


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@each_variant
def test_arranging_twice_changes_nothing(name: str, dimension: int) -> None:
    planned = replace(
        plan("plain_unet", dimension, stages=5), name=name, patch_size=(64,) * dimension
    )
    once = NETWORKS[name].arrange(planned)
    assert NETWORKS[name].arrange(once) == once
    check_patch(once)


@pytest.mark.slow
# Importing torch's compiler meets a function that torch itself has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@each_variant
def test_compiled_output_is_the_same(name: str, dimension: int) -> None:
    spec = plan(name, dimension)
    network = seeded(spec).double().eval()
    image = image_for(spec).double()
    # Networks share code; without this the compiler would take another's patch for a variable size.
    torch.compiler.reset()
    with torch.no_grad():
        expected = network(image)
        compiled = torch.compile(network, dynamic=False)(image)
    assert float((compiled - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@each_network
def test_network_compiles_as_one_graph(name: str, dimension: int) -> None:
    spec = plan(name, dimension)
    torch.compiler.reset()
    found = torch._dynamo.explain(seeded(spec).eval())(image_for(spec))
    assert found.graph_count == 1, [str(reason.reason) for reason in found.break_reasons]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "vnet"}, "'vnet' does not exist. Choose one of: .*plain_unet"),
        ({"options": {"depth": 3}}, "no option 'depth'"),
        ({"strides": ((1, 1, 1),)}, "strides has 1 entries, 3 needed"),
        ({"kernel_sizes": ((3, 3),) * 3}, r"kernel_sizes holds \[3, 3\]"),
        ({"patch_size": (8, 8)}, "strides holds"),
    ],
)
def test_bad_specs_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        build_network(replace(plan("plain_unet", 3), **change))


def test_dimension_that_does_not_exist_is_refused() -> None:
    only_3d = [name for name, row in NETWORKS.items() if row.dimensions == {3}]
    for name in only_3d:
        spec = replace(plan("plain_unet", 2), name=name)
        with pytest.raises(PlanError, match=r"it is 3D, the patch .* is 2D"):
            check_patch(spec)


@each_network
def test_a_network_begins_with_one_for_other_labels_and_channels(name: str, dimension: int) -> None:
    spec = plan(name, dimension)
    other = replace(spec, in_channels=CHANNELS + 1, out_channels=CLASSES + 2)
    torch.manual_seed(1)
    given, network = build_network(other).state_dict(), seeded(spec)
    report = transfer(network, spec, given, new_heads="other labels")
    filled = network.state_dict()
    assert {*report.loaded, *report.inflated, *report.remade} == set(filled)
    assert set(report.remade) == heads_of(spec) != set()
    assert all(torch.equal(filled[key], given[key]) for key in report.loaded)
    assert len(report.loaded) > len(filled) / 2
    assert report.inflated
