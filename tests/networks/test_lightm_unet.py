"""LightM-UNet: sizes of the family, strides of the plan, options."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from medmamba.errors import PlanError
from medmamba.kernels import mamba_block
from medmamba.networks import NETWORKS, build_network
from medmamba.networks.group_norm import GroupNormReLU
from medmamba.networks.lightm_unet import Conv, LightMUNet, MambaLayer
from medmamba.networks.mixer import IdentityMixer
from medmamba.networks.spec import NetworkSpec
from medmamba.networks.ssm import Mamba


def planned(name: str, dimension: int = 3, *, stages: int = 4) -> NetworkSpec:
    spec = NetworkSpec(
        name=name,
        in_channels=1,
        out_channels=2,
        patch_size=(2 ** (stages - 1),) * dimension,
        features=(32,) * stages,
        strides=((1,) * dimension,) + ((2,) * dimension,) * (stages - 1),
        kernel_sizes=((3,) * dimension,) * stages,
        encoder_blocks=(2,) * stages,
        decoder_blocks=(2,) * (stages - 1),
    )
    return NETWORKS[name].arrange(spec)


@pytest.mark.parametrize(
    ("name", "dimension", "count"),
    [
        ("lightm_unet", 3, 5_015_733),
        ("lightm_unet", 2, 5_011_683),
        ("lightm_unet_m", 3, 1_344_949),
        ("lightm_unet_s", 3, 381_813),
        ("lightm_unet_s", 2, 380_787),
    ],
)
def test_sizes_are_the_official_codes(name: str, dimension: int, count: int) -> None:
    with torch.device("meta"):
        network = build_network(planned(name, dimension))
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def test_fixed_forms_ignore_the_plans_topology() -> None:
    spec = planned("lightm_unet_s", stages=6)
    assert spec.strides == ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    assert spec.features == (8, 16, 32, 64)
    assert spec.encoder_blocks == (1, 2, 2, 4)


def test_planned_form_takes_strides_kernels_and_stages() -> None:
    base = planned("lightm_unet_plan", stages=6)
    assert base.features == (16, 32, 64, 128, 256, 256)
    assert base.encoder_blocks == (1, 2, 2, 4, 4, 4)
    anisotropic = replace(
        planned("lightm_unet_plan", stages=3),
        strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
        kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
        patch_size=(4, 8, 12),
    )
    network = build_network(anisotropic)
    assert network(torch.randn(1, 1, 4, 8, 12)).shape == (1, 2, 4, 8, 12)
    stem = network.convInit[0]  # type: ignore[index]
    assert isinstance(stem, Conv)
    assert stem.conv.weight.shape == (1, 1, 1, 3, 3)


def test_coarser_stem_is_an_option_with_its_own_multiple() -> None:
    spec = replace(planned("lightm_unet_s"), options={"stem_stride": 2}, patch_size=(16, 16, 32))
    network = build_network(spec)
    assert network(torch.randn(1, 1, 16, 16, 32)).shape == (1, 2, 16, 16, 32)
    with pytest.raises(PlanError, match=r"multiple of \[16, 16, 16\]"):
        build_network(replace(spec, patch_size=(8, 16, 32)))


@pytest.mark.parametrize("value", [0, "two", 1.5])
def test_stem_stride_is_checked(value: object) -> None:
    spec = replace(planned("lightm_unet_s"), options={"stem_stride": value})  # type: ignore[dict-item]
    with pytest.raises(PlanError, match="stem_stride is"):
        build_network(spec)


def test_widths_must_suit_the_group_norm() -> None:
    with pytest.raises(PlanError, match=r"features \[12, 20\] must be multiples of 8"):
        build_network(replace(planned("lightm_unet_s"), features=(8, 12, 16, 20)))


@pytest.mark.parametrize("order", ["bidirectional", "local-bidirectional", "snake", "cross"])
def test_scan_order_is_an_option(order: str) -> None:
    torch.manual_seed(0)
    raster = build_network(planned("lightm_unet_s")).eval()
    other = build_network(replace(planned("lightm_unet_s"), options={"order": order})).eval()
    state = other.state_dict()
    state.update(raster.state_dict())
    other.load_state_dict(state)
    image = torch.randn(1, 1, 16, 8, 8)
    assert not torch.allclose(raster(image), other(image))


def test_layer_norms_twice_and_scales_its_shortcut() -> None:
    layer = MambaLayer(8, 4, IdentityMixer()).double()
    nn.init.constant_(layer.skip_scale, 0.5)
    nn.init.normal_(layer.norm.weight)
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    wanted = layer.proj(layer.norm(layer.norm(x) + 0.5 * x))
    torch.testing.assert_close(layer(x), wanted)


def test_train_and_eval_agree_and_no_lower_heads_exist() -> None:
    network = build_network(planned("lightm_unet_s"))
    assert isinstance(network, LightMUNet)
    image = torch.randn(1, 1, 8, 8, 16)
    assert torch.equal(network.train()(image), network.eval()(image))
    network.deep_supervision = True
    assert [output.shape for output in network(image)] == [(1, 2, 8, 8, 16)]


@pytest.mark.parametrize("batch", [1, 2])
def test_inference_in_chunks_gives_what_training_computes(
    monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(mamba_block, "CPU_CHUNK_VALUES", 1 << 12)
    torch.manual_seed(0)
    mixer = Mamba(8, 3)
    layer = MambaLayer(8, 16, mixer).double()
    # 693 tokens: chunks of 256 and a rest that is none
    x = torch.randn(batch, 7, 9, 11, 8, dtype=torch.float64)
    entry = GroupNormReLU(8, 8).double()
    expected = layer(x, entry).detach()
    with torch.no_grad():
        assert mamba_block.layer_chunk(x.flatten(1, -2), mixer.weights(mixer)) == 256
        torch.testing.assert_close(layer(x, entry), expected, rtol=0, atol=1e-12)
        with torch.autocast("cpu", torch.bfloat16):
            reduced = layer.float()(x.float(), entry.float())
    assert reduced.dtype is torch.bfloat16
    assert float((reduced - expected).abs().max()) < 0.05 * float(expected.abs().max())
