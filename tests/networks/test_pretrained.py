"""ImageNet start: every tensor of a VMamba-T file is loaded, inflated, or skipped with a reason."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from medmamba.errors import BundleError
from medmamba.networks.channels_last import depthwise_conv
from medmamba.networks.pretrained import (
    PretrainedReport,
    frozen_parameters,
    inflate_merging,
    pick_directions,
    start_from_vmamba,
)
from medmamba.networks.registry import NETWORKS
from medmamba.networks.spec import NetworkSpec
from medmamba.networks.ssm import DirectionalScan
from medmamba.networks.vss import PatchMerging


def spec(name: str, *, channels: int = 1, stages: int = 6) -> NetworkSpec:
    """The network as it is planned, full size."""
    dimension = min(NETWORKS[name].dimensions)
    planned = NetworkSpec(
        name=name,
        in_channels=channels,
        out_channels=2,
        patch_size=(64,) * dimension,
        features=(32,) * stages,
        strides=((1,) * dimension, *((2,) * dimension,) * (stages - 1)),
        kernel_sizes=((3,) * dimension,) * stages,
        encoder_blocks=(1,) * stages,
        decoder_blocks=(1,) * (stages - 1),
    )
    return NETWORKS[name].arrange(planned)


def build(wanted: NetworkSpec) -> nn.Module:
    return NETWORKS[wanted.name].build(wanted)


@pytest.fixture(scope="module")
def shapes(fixtures_dir: Path) -> dict[str, list[int]]:
    path = fixtures_dir / "networks" / "vmamba_tiny_v0_keys.json"
    if not path.is_file():
        pytest.skip(f"no {path.name} among the fixtures")
    return dict(json.loads(path.read_text()))


@pytest.fixture(scope="module")
def state(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """A file with the names and shapes of the released one and values of our own."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def own_tensor(network: nn.Module, name: str) -> Tensor:
    name = name.replace("layers.0.downsample.", "downsamples.0.")
    return network.state_dict()["vssm_encoder." + name]


@pytest.mark.parametrize(
    ("name", "channels", "mode", "loaded"),
    [
        ("swin_umamba", 1, "exact", 205),
        ("swin_umamba", 1, "corrected", 204),
        ("swin_umamba_d", 3, "exact", 208),
        ("swin_umamba_d", 1, "exact", 204),
    ],
)
def test_counts_are_those_of_the_official_loader(
    state: dict[str, Tensor], name: str, channels: int, mode: str, loaded: int
) -> None:
    network = build(spec(name, channels=channels))
    report = start_from_vmamba(network, state, mode=mode)  # type: ignore[arg-type]
    assert len(report.loaded) == loaded
    assert not report.inflated
    assert len(report.loaded) + len(report.skipped) == len(state)
    for key in ("layers.2.blocks.8.self_attention.x_proj_weight", "layers.0.downsample.norm.bias"):
        assert torch.equal(own_tensor(network, key), state[key])
    assert {"norm.weight", "head.bias"} <= set(report.skipped)
    assert len(report.fresh) == len(network.vssm_encoder.state_dict()) - loaded  # type: ignore[union-attr]


def test_only_the_exact_mode_repeats_the_typo_of_the_official_loader(
    state: dict[str, Tensor],
) -> None:
    bias = "patch_embed.norm.bias"
    exact, corrected = build(spec("swin_umamba")), build(spec("swin_umamba"))
    start_from_vmamba(exact, state, mode="exact")
    report = start_from_vmamba(corrected, state, mode="corrected")
    assert torch.equal(own_tensor(exact, bias), state[bias])
    assert torch.equal(own_tensor(corrected, bias), torch.zeros(96))
    assert "stem" in report.skipped[bias]


def test_names_of_later_code_fit(state: dict[str, Tensor]) -> None:
    later = {
        name.replace("patch_embed.proj", "patch_embed.0")
        .replace("patch_embed.norm", "patch_embed.2")
        .replace(".ln_1.", ".norm.")
        .replace(".self_attention.", ".op."): tensor
        for name, tensor in state.items()
    }
    network = build(spec("swin_umamba_d", channels=3))
    assert len(start_from_vmamba(network, later).loaded) == 208


def inflate(state: dict[str, Tensor], order: str) -> tuple[nn.Module, PretrainedReport]:
    wanted = replace(spec("swin_umamba_3d"), options={"order": order})
    network = build(wanted)
    return network, start_from_vmamba(network, state, mode="corrected")


def test_every_encoder_tensor_but_the_embedding_is_filled_in_3d(state: dict[str, Tensor]) -> None:
    network, report = inflate(state, "cross")
    assert all(name.startswith("patch_embed.") for name in report.fresh)
    assert not set(report.loaded) & set(report.inflated)
    block = network.vssm_encoder.layers[0].blocks[0].self_attention  # type: ignore[union-attr,index]
    source = state["layers.0.blocks.0.self_attention.x_proj_weight"]
    wanted = source[[0, 1, 1, 2, 3, 3]]
    assert torch.equal(block.x_proj_weight, wanted)
    decay = state["layers.0.blocks.0.self_attention.A_logs"].reshape(4, 192, 16)
    assert torch.equal(block.A_logs.reshape(6, 192, 16)[4], decay[3])


def test_a_plan_with_fewer_stages_takes_what_it_has(state: dict[str, Tensor]) -> None:
    network = build(spec("swin_umamba_3d", stages=4))
    report = start_from_vmamba(network, state)
    assert report.skipped["layers.3.blocks.0.ln_1.weight"] == "the network has 2 layers"
    assert all(name.startswith("patch_embed.") for name in report.fresh)


def test_a_twin_takes_everything_but_the_scan(state: dict[str, Tensor]) -> None:
    network = build(replace(spec("swin_umamba_d"), mixer="identity"))
    report = start_from_vmamba(network, state)
    assert report.skipped["layers.0.blocks.0.self_attention.Ds"] == (
        "a twin stands in place of the scan"
    )
    assert "layers.0.blocks.0.ln_1.weight" in report.loaded


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"layers.1.blocks.0.mlp.fc1.weight": torch.zeros(2)}, "mlp.fc1.weight' is unknown"),
        ({"layers.1.blocks.0.ln_1.weight": torch.zeros(7)}, r"ln_1.weight has shape \[7\]"),
        ({"layers.1.blocks.0.ln_1.weight": None}, "1 tensors are missing, first layers.1.blocks.0"),
    ],
)
def test_files_that_do_not_fit_are_refused_and_change_nothing(
    state: dict[str, Tensor], change: dict[str, Tensor | None], match: str
) -> None:
    network = build(spec("swin_umamba_d", channels=3))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    broken = {k: v for k, v in {**state, **change}.items() if v is not None}
    with pytest.raises(BundleError, match=match):
        start_from_vmamba(network, broken)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_encoder_but_its_embedding_stays_fixed_at_first() -> None:
    network = build(spec("swin_umamba_d"))
    names = set(frozen_parameters(network))
    every = {name for name, _ in network.named_parameters()}
    assert names < every
    assert all(name.startswith(("decoder.", "vssm_encoder.patch_embed.")) for name in every - names)


def test_other_networks_are_refused(state: dict[str, Tensor]) -> None:
    with pytest.raises(BundleError, match="no VMamba encoder"):
        start_from_vmamba(nn.Linear(1, 1), state)


def test_equal_slices_give_the_2d_response_of_the_convolution() -> None:
    flat, kernel = torch.randn(1, 8, 6, 4, dtype=torch.float64), torch.randn(4, 1, 3, 3).double()
    inflated = (kernel / 3).unsqueeze(2).expand(-1, -1, 3, -1, -1)
    volume = flat.unsqueeze(1).expand(-1, 5, -1, -1, -1)
    found = depthwise_conv(volume, inflated)[:, 1:-1]
    wanted = depthwise_conv(flat, kernel).unsqueeze(1).expand_as(found)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("depth_stride", [1, 2, 4])
def test_equal_slices_give_the_2d_response_of_merging(depth_stride: int) -> None:
    flat_layer = PatchMerging(4, 6, (2, 2)).double()
    nn.init.normal_(flat_layer.norm.weight)
    nn.init.normal_(flat_layer.norm.bias)
    layer = PatchMerging(4, 6, (depth_stride, 2, 2)).double()
    parts = flat_layer.state_dict()
    layer.load_state_dict(
        {
            name: inflate_merging(layer, tensor, divide=name.startswith("reduction"))
            for name, tensor in parts.items()
        }
    )
    flat = torch.randn(1, 8, 6, 4, dtype=torch.float64)
    volume = flat.unsqueeze(1).expand(-1, 2 * depth_stride, -1, -1, -1)
    found, wanted = layer(volume), flat_layer(flat)
    # The norm's eps is weighed against the same variance, so the answers agree to rounding.
    torch.testing.assert_close(found, wanted.unsqueeze(1).expand_as(found), rtol=0, atol=1e-12)


def test_directions_keep_their_own_scan() -> None:
    """One 3D scan with picked tensors answers one slice as the 2D scan of those directions does."""
    flat = DirectionalScan(8, 2, order="cross").double()
    deep = DirectionalScan(8, 3, order="bidirectional").double()
    tensors = flat.state_dict()
    picked = {
        name: pick_directions(deep, tensors[name], flattened=name in ("A_logs", "Ds"))
        for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")
    }
    rows = DirectionalScan(8, 2, order="bidirectional").double()
    rest = {name: tensors[name] for name in tensors if name not in picked}
    rows.load_state_dict({**rest, **picked})
    kernel = functional.pad(tensors["conv2d.weight"].unsqueeze(2), (0, 0, 0, 0, 1, 1))
    own = {name: rest[name] for name in rest if not name.startswith("conv2d")}
    conv = {"conv3d.weight": kernel, "conv3d.bias": tensors["conv2d.bias"]}
    deep.load_state_dict({**own, **picked, **conv})
    tokens = torch.randn(2, 30, 8, dtype=torch.float64)
    torch.testing.assert_close(deep(tokens, (1, 5, 6)), rows(tokens, (5, 6)), rtol=0, atol=1e-12)
