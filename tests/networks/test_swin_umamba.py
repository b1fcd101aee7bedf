"""Swin-UMamba, its lighter form and its 3D form: sizes, rearrangements, heads, initial values."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

from medmamba.errors import PlanError
from medmamba.networks import NETWORKS, build_network
from medmamba.networks.spec import NetworkSpec
from medmamba.networks.swin_umamba import spread_neighbours
from medmamba.networks.vss import VSSEncoder, gather_neighbours


def planned(name: str, *, channels: int = 1, classes: int = 14, stages: int = 6) -> NetworkSpec:
    dimension = min(NETWORKS[name].dimensions)
    spec = NetworkSpec(
        name=name,
        in_channels=channels,
        out_channels=classes,
        patch_size=(64,) * dimension,
        features=(32,) * stages,
        strides=((1,) * dimension,) + ((2,) * dimension,) * (stages - 1),
        kernel_sizes=((3,) * dimension,) * stages,
        encoder_blocks=(1,) * stages,
        decoder_blocks=(1,) * (stages - 1),
    )
    return NETWORKS[name].arrange(spec)


NARROW = {
    "swin_umamba": {"features": (4, 8, 16, 16), "encoder_blocks": (1, 1, 1, 2)},
    "swin_umamba_d": {"features": (8, 8, 16), "encoder_blocks": (0, 1, 1)},
}


def narrow(name: str) -> NetworkSpec:
    spec, stages = planned(name, classes=3), len(NARROW[name]["features"])
    return replace(
        spec,
        **NARROW[name],  # type: ignore[arg-type]
        strides=spec.strides[:stages],
        kernel_sizes=spec.kernel_sizes[:stages],
        decoder_blocks=spec.decoder_blocks[: stages - 2] + spec.decoder_blocks[-1:],
        patch_size=(16, 24),
    )


@pytest.mark.parametrize(
    ("name", "channels", "classes", "count"),
    [
        ("swin_umamba", 1, 14, 59_889_368),
        ("swin_umamba", 3, 2, 59_886_344),
        ("swin_umamba_d", 1, 14, 27_497_720),
        ("swin_umamba_d", 3, 2, 27_491_528),
    ],
)
def test_sizes_are_the_official_codes(name: str, channels: int, classes: int, count: int) -> None:
    with torch.device("meta"):
        network = build_network(planned(name, channels=channels, classes=classes))
    assert sum(parameter.numel() for parameter in network.parameters()) == count


@pytest.mark.parametrize(("order", "count"), [("cross", 26_322_336), ("bidirectional", 21_496_224)])
def test_size_of_the_3d_encoder(order: str, count: int) -> None:
    spec = replace(planned("swin_umamba_3d"), options={"order": order})
    with torch.device("meta"):
        encoder = build_network(spec).vssm_encoder
    assert isinstance(encoder, VSSEncoder)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == count


@pytest.mark.parametrize(
    ("stages", "features", "blocks"),
    [
        (3, (48, 96, 96), (1, 1, 2)),
        (4, (48, 96, 192, 192), (1, 1, 2, 2)),
        (6, (48, 96, 192, 384, 768, 768), (1, 1, 2, 2, 9, 2)),
        (7, (48, 96, 192, 384, 768, 768, 768), (1, 1, 2, 2, 9, 2, 2)),
    ],
)
def test_3d_form_follows_the_number_of_stages(
    stages: int, features: tuple[int, ...], blocks: tuple[int, ...]
) -> None:
    spec = planned("swin_umamba_3d", stages=stages)
    assert spec.features == features
    assert spec.encoder_blocks == blocks
    assert spec.options["order"] == "bidirectional"


def test_3d_form_trains_with_an_anisotropic_first_stride() -> None:
    spec = replace(
        planned("swin_umamba_3d", stages=4, classes=2),
        features=(4, 8, 16, 16),
        encoder_blocks=(1, 1, 1, 1),
        strides=((1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 2, 2)),
        kernel_sizes=((1, 3, 3),) + ((3, 3, 3),) * 3,
        patch_size=(4, 16, 8),
    )
    assert spec.total_stride == (2, 8, 8)
    network = build_network(spec)
    network.deep_supervision = True
    outputs = network(torch.randn(2, 1, 4, 16, 8))
    assert [tuple(output.shape[2:]) for output in outputs] == [(4, 16, 8), (4, 8, 4)]
    sum(output.square().mean() for output in outputs).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("swin_umamba", [(16, 24), (8, 12)]),
        ("swin_umamba_d", [(16, 24), (4, 6)]),
    ],
)
def test_deep_supervision_scales(name: str, shapes: list[tuple[int, int]]) -> None:
    network = build_network(narrow(name))
    network.deep_supervision = True
    outputs = network(torch.randn(1, 1, 16, 24))
    assert [tuple(output.shape[2:]) for output in outputs] == shapes


def test_official_scales_of_the_lighter_form_skip_one_half() -> None:
    strides = planned("swin_umamba_d").strides
    assert strides == ((1, 1), (4, 4), (2, 2), (2, 2), (2, 2))


def test_neighbours_are_gathered_with_the_first_axis_fastest() -> None:
    x = torch.arange(4 * 6).reshape(1, 4, 6, 1)
    gathered = gather_neighbours(x, (2, 2))
    wanted = torch.cat([x[:, r::2, c::2] for c, r in product((0, 1), repeat=2)], dim=-1)
    assert torch.equal(gathered, wanted)
    volume = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6, 1)
    parts = [volume[:, :, r::2, c::2] for c, r in product((0, 1), repeat=2)]
    assert torch.equal(gather_neighbours(volume, (1, 2, 2)), torch.cat(parts, dim=-1))


def test_tokens_are_spread_with_rows_first_and_channels_fastest() -> None:
    x = torch.arange(2 * 3 * 8).reshape(1, 2, 3, 8)
    spread = spread_neighbours(x, (2, 2))
    assert spread.shape == (1, 4, 6, 2)
    for row, column in product(range(4), range(6)):
        part = 2 * (row % 2) + column % 2
        token = x[0, row // 2, column // 2, 2 * part : 2 * part + 2]
        assert torch.equal(spread[0, row, column], token)


def test_initial_values() -> None:
    torch.manual_seed(0)
    plain = build_network(narrow("swin_umamba"))
    light = build_network(narrow("swin_umamba_d"))
    for network in (plain, light):
        encoder = network.vssm_encoder
        linears = [part for part in encoder.modules() if isinstance(part, nn.Linear)]  # type: ignore[union-attr]
        values = torch.cat([part.weight.detach().flatten() for part in linears])
        assert values.std() == pytest.approx(0.02, rel=0.1)
    # He initialisation, which zeroes biases, reaches the lighter form's convolutions only.
    assert not any(
        bool(part.bias.any())
        for part in light.modules()
        if isinstance(part, nn.Conv2d) and part.bias is not None
    )
    assert plain.stem[0].bias.detach().any()  # type: ignore[index]


def test_stochastic_depth_grows_and_shrinks() -> None:
    light = build_network(planned("swin_umamba_d"))
    rates = [part.rate for part in light.modules() if type(part).__name__ == "DropPath"]
    assert rates[:15] == pytest.approx([0.2 * index / 14 for index in range(15)])
    assert rates[15:] == pytest.approx([0.2 - 0.2 * index / 5 for index in range(6)])


@pytest.mark.parametrize("merge", ["mean", "attention"])
@pytest.mark.parametrize("order", ["bidirectional", "local-bidirectional"])
def test_order_and_merge_are_options(order: str, merge: str) -> None:
    spec = replace(narrow("swin_umamba_d"), options={"order": order, "merge": merge})
    network = build_network(spec)
    assert torch.isfinite(network(torch.randn(1, 1, 16, 24))).all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"options": {"drop_path": -1}}, "drop_path is -1"),
        ({"options": {"depths": [2]}}, "no option 'depths'"),
        ({"options": {"order": "zigzag"}}, "scan order 'zigzag' does not exist"),
        ({"features": (4, 8, 16, 32)}, r"features end with \[16, 32\]"),
    ],
)
def test_bad_values_are_named(change: dict[str, object], match: str) -> None:
    with pytest.raises(PlanError, match=match):
        build_network(replace(narrow("swin_umamba"), **change))  # type: ignore[arg-type]
