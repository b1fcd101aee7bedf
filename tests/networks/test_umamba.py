"""U-Mamba: official parameter counts, channel tokens, and scan orders."""

from dataclasses import replace

import pytest
import torch

from medmamba.errors import PlanError
from medmamba.networks import build_network
from medmamba.networks.memory import count_parameters
from medmamba.networks.spec import NetworkSpec
from medmamba.networks.umamba import has_layer, reduce_blocks


def planned(name: str, stages: int, edge: int, classes: int, *, dimension: int) -> NetworkSpec:
    widest = {2: 512, 3: 320}[dimension]
    return NetworkSpec(
        name=name,
        in_channels=1,
        out_channels=classes,
        patch_size=(edge,) * dimension,
        features=tuple(min(32 * 2**stage, widest) for stage in range(stages)),
        strides=((1,) * dimension,) + ((2,) * dimension,) * (stages - 1),
        kernel_sizes=((3,) * dimension,) * stages,
        encoder_blocks=(2,) * stages,
        decoder_blocks=(2,) * (stages - 1),
    )


def tiny(name: str, **changes: object) -> NetworkSpec:
    spec = replace(
        planned(name, 3, 16, 2, dimension=3), features=(4, 8, 80), kernel_sizes=((3, 3, 3),) * 3
    )
    return replace(spec, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "dimension", "stages", "edge", "classes", "count"),
    [
        ("umamba_enc", 3, 6, 128, 14, 42_760_582),
        ("umamba_bot", 3, 6, 128, 14, 42_130_054),
        ("umamba_enc", 2, 7, 320, 14, 47_015_538),
        ("umamba_enc", 2, 8, 512, 2, 64_011_598),
        ("umamba_bot", 2, 7, 320, 14, 47_533_012),
        ("umamba_bot", 2, 8, 512, 2, 64_794_638),
    ],
)
def test_counts_are_those_of_the_official_code(
    name: str, dimension: int, stages: int, edge: int, classes: int, count: int
) -> None:
    spec = planned(name, stages, edge, classes, dimension=dimension)
    assert count_parameters(spec) == count


@pytest.mark.parametrize(
    ("name", "dimension", "stages", "edge", "classes", "millions"),
    [
        ("umamba_enc_v1", 2, 7, 320, 14, 67.33),
        ("umamba_enc_v1", 2, 8, 512, 14, 91.86),
        ("umamba_bot_v1", 2, 7, 320, 14, 63.34),
        ("umamba_bot_v1", 2, 8, 512, 14, 86.17),
        ("umamba_enc_v1", 3, 6, 128, 2, 59.68),
        ("umamba_bot_v1", 3, 6, 128, 2, 58.41),
    ],
)
def test_counts_of_the_first_release_are_the_published_ones(
    name: str, dimension: int, stages: int, edge: int, classes: int, millions: float
) -> None:
    spec = planned(name, stages, edge, classes, dimension=dimension)
    assert round(count_parameters(spec) / 1e6, 2) == millions


def test_reduced_blocks_follow_the_official_rule() -> None:
    spec = reduce_blocks(planned("umamba_enc", 6, 128, 2, dimension=3))
    assert spec.encoder_blocks == (2, 2, 2, 1, 1, 1)
    assert spec.decoder_blocks == (2, 2, 2, 1, 1)
    assert reduce_blocks(spec) == spec


def test_layers_in_2d_are_every_second_from_the_last() -> None:
    for stages in (4, 5, 6, 7, 8):
        spec = planned("umamba_enc", stages, 512, 2, dimension=2)
        found = [stage for stage in range(stages) if has_layer(spec, stage)]
        assert found == sorted(range(stages - 1, -1, -2))


def test_channel_tokens_bind_the_patch_and_can_be_switched_off() -> None:
    # The last map has 4 x 4 x 4 voxels and 80 channels: channels are the tokens.
    bound = build_network(tiny("umamba_enc")).eval()
    free = build_network(tiny("umamba_enc", options={"channel_tokens": False})).eval()
    assert bound.get_parameter("encoder.mamba_layers.2.norm.weight").shape == (64,)
    assert free.get_parameter("encoder.mamba_layers.2.norm.weight").shape == (80,)
    larger = torch.zeros(1, 1, 16, 16, 32)
    with torch.no_grad():
        assert free(larger).shape == (1, 2, 16, 16, 32)
        with pytest.raises(RuntimeError):
            bound(larger)


@pytest.mark.parametrize("name", ["umamba_bot", "umamba_bot_v1", "umamba_enc", "umamba_enc_v1"])
@pytest.mark.parametrize("order", ["bidirectional", "local-bidirectional"])
def test_scan_order_is_an_option(name: str, order: str) -> None:
    torch.manual_seed(0)
    network = build_network(tiny(name, options={"order": order})).eval()
    with torch.no_grad():
        assert torch.isfinite(network(torch.randn(1, 1, 16, 16, 16))).all()


def test_unknown_order_is_refused() -> None:
    with pytest.raises(PlanError, match="'zigzag' does not exist"):
        build_network(tiny("umamba_bot", options={"order": "zigzag"}))
