"""MambaClinix: sizes, which stage has which block, adding against multiplying."""

from dataclasses import replace

import pytest
import torch

from medmamba.errors import PlanError
from medmamba.networks import NETWORKS, build_network
from medmamba.networks.mambaclinix import Encoder, MambaLayer, RecursiveBlock, RecursiveConv
from medmamba.networks.spec import NetworkSpec


def planned(stages: int, name: str = "mambaclinix", *, first: int = 32) -> NetworkSpec:
    spec = NetworkSpec(
        name=name,
        in_channels=1,
        out_channels=2,
        patch_size=(2 ** (stages - 1),) * 3,
        features=tuple(min(first * 2**stage, 320) for stage in range(stages)),
        strides=((1, 1, 1),) + ((2, 2, 2),) * (stages - 1),
        kernel_sizes=((3, 3, 3),) * stages,
        encoder_blocks=(2,) * stages,
        decoder_blocks=(2,) * (stages - 1),
    )
    return NETWORKS[name].arrange(spec)


@pytest.mark.parametrize(("stages", "count"), [(5, 28_427_786), (6, 48_874_189), (7, 71_572_639)])
def test_sizes_are_the_official_codes(stages: int, count: int) -> None:
    for name in ("mambaclinix", "mambaclinix_gated"):
        with torch.device("meta"):
            network = build_network(planned(stages, name))
        assert sum(parameter.numel() for parameter in network.parameters()) == count


@pytest.mark.parametrize(("stages", "recursive"), [(2, 1), (3, 2), (5, 3), (6, 3)])
def test_blocks_follow_the_stage_and_not_the_plans_counts(stages: int, recursive: int) -> None:
    spec = replace(planned(stages, first=16), encoder_blocks=(1,) * stages)
    with torch.device("meta"):
        encoder = build_network(spec).encoder
    assert isinstance(encoder, Encoder)
    kinds = [type(layer) for layer in encoder.encoder_layers]
    assert kinds == [RecursiveBlock] * recursive + [MambaLayer] * (stages - recursive)
    assert encoder.LayerNorm.gamma.shape == (spec.features[recursive - 1],)


@pytest.mark.parametrize(
    ("order", "widths"), [(2, [8, 16]), (3, [8, 16, 32]), (4, [8, 16, 32, 64])]
)
def test_widths_of_the_recursive_convolution_double(order: int, widths: list[int]) -> None:
    assert RecursiveConv(widths[-1], order, (3, 3, 3)).widths == widths


def test_adding_is_linear_and_gating_is_not() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 8, 3, 4, 5)
    defects = []
    for gated in (False, True):
        layer = RecursiveConv(8, 3, (3, 3, 3), gated=gated)
        zero = layer(torch.zeros_like(x))
        defect = layer(2 * x) - zero - 2 * (layer(x) - zero)
        defects.append(float(defect.detach().abs().max()))
    assert defects[0] < 1e-5
    assert defects[1] > 1e-3


def test_gates_multiply_step_by_step() -> None:
    layer = RecursiveConv(4, 2, (1, 1, 1), gated=True).double()
    x = torch.randn(1, 4, 2, 2, 2, dtype=torch.float64)
    first, rest = layer.proj_in(x).split([2, 6], dim=1)
    parts = layer.dwconv(rest).split([2, 4], dim=1)
    wanted = layer.proj_out(layer.reconv[0](first * parts[0]) * parts[1])
    torch.testing.assert_close(layer(x), wanted)


def test_unused_scalar_is_kept_but_never_trained() -> None:
    network = build_network(planned(2, first=8))
    frozen = [key for key, value in network.named_parameters() if not value.requires_grad]
    assert frozen == ["encoder.encoder_layers.1.skip_scale"]


def test_stochastic_depth_differs_between_training_steps_only() -> None:
    spec = replace(planned(3, first=8), options={"drop_path": 0.9})
    torch.manual_seed(0)
    network = build_network(spec)
    image = torch.randn(4, 1, 4, 4, 8)
    network.train()
    assert not torch.equal(network(image), network(image))
    network.eval()
    assert torch.equal(network(image), network(image))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"options": {"drop_path": 1.5}}, r"drop_path is 1\.5"),
        ({"options": {"gate": "mul"}}, "no option 'gate'"),
        ({"features": (8, 12)}, "stage 0 has 6 features"),
    ],
)
def test_bad_values_are_named(change: dict[str, object], match: str) -> None:
    spec = planned(2, first=8)
    if "features" in change:
        change = {"features": (6, 12)}
    with pytest.raises(PlanError, match=match):
        build_network(replace(spec, **change))  # type: ignore[arg-type]


def test_two_dimensions_are_refused() -> None:
    flat = replace(
        planned(2),
        patch_size=(8, 8),
        strides=((1, 1), (2, 2)),
        kernel_sizes=((3, 3), (3, 3)),
    )
    with pytest.raises(PlanError, match="it is 3D"):
        build_network(flat)
