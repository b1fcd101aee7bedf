"""ImageNet start from files as users have them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from medmamba.errors import BundleError, SecurityError, UsageError
from medmamba.networks import build_network
from medmamba.networks.spec import NetworkSpec
from medmamba.pipeline.starting import pretrained_start, read_tensors

SPEC = NetworkSpec(
    name="swin_umamba",
    in_channels=1,
    out_channels=2,
    patch_size=(32, 32),
    features=(8, 16, 32, 32),
    strides=((1, 1), (2, 2), (2, 2), (2, 2)),
    kernel_sizes=((3, 3),) * 4,
    encoder_blocks=(1, 1, 2, 2),
    decoder_blocks=(1,) * 3,
)


def vmamba_state() -> dict[str, Tensor]:
    """Tensors under VMamba's own names, as wide as the network above."""
    encoder = build_network(SPEC).vssm_encoder.state_dict()
    state = {
        name.replace("downsamples.0.", "layers.0.downsample."): torch.randn_like(tensor)
        for name, tensor in encoder.items()
    }
    return {**state, "norm.weight": torch.ones(32), "head.bias": torch.zeros(1000)}


@pytest.mark.parametrize(("mode", "loads_bias"), [("exact", True), ("corrected", False)])
def test_weights_are_filled_in_and_every_tensor_reported(
    tmp_path: Path, mode: str, loads_bias: bool
) -> None:
    state = vmamba_state()
    torch.save({"model": state}, tmp_path / "vmamba.pth")
    said: list[str] = []
    start = pretrained_start(tmp_path / "vmamba.pth", mode=mode, on_message=said.append)
    network = build_network(SPEC)
    record = start.fill(network)
    filled = network.vssm_encoder.state_dict()
    assert torch.equal(
        filled["downsamples.0.reduction.weight"], state["layers.0.downsample.reduction.weight"]
    )
    found = filled["patch_embed.norm.bias"]
    assert torch.equal(found, state["patch_embed.norm.bias"]) == loads_bias
    assert {*record["loaded"], *record["inflated"], *record["skipped"]} == set(state)
    assert record["skipped"]["head.bias"] == "belongs to the classifier"
    assert "tensors loaded" in said[0]
    assert any("norm.weight" in line and "classifier" in line for line in said[1:])


def test_safetensors_and_bare_state_dicts_are_read_too(tmp_path: Path) -> None:
    state = vmamba_state()
    save_file(state, tmp_path / "v.safetensors")
    torch.save(state, tmp_path / "v.pth")
    for name in ("v.safetensors", "v.pth"):
        assert read_tensors(tmp_path / name).keys() == state.keys()


def test_another_file_or_mode_is_another_start(tmp_path: Path) -> None:
    for name in ("a.pth", "b.pth"):
        torch.save({"model": vmamba_state()}, tmp_path / name)
    keys = {
        pretrained_start(tmp_path / name, mode=mode).key
        for name in ("a.pth", "b.pth")
        for mode in ("exact", "corrected")
    }
    assert len(keys) == 4


def test_files_that_hold_no_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"model": {"epoch": 3}}, tmp_path / "c.pth")
    with pytest.raises(BundleError, match="'epoch', which is no tensor"):
        pretrained_start(tmp_path / "c.pth")
    torch.save([1, 2], tmp_path / "c.pth")
    with pytest.raises(BundleError, match="no tensors by name"):
        pretrained_start(tmp_path / "c.pth")
    with pytest.raises(BundleError, match="does not exist"):
        pretrained_start(tmp_path / "none.pth")


class Program:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


def test_program_among_the_weights_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": vmamba_state(), "config": Program()}, tmp_path / "c.pth")
    with pytest.raises(SecurityError, match="print"):
        pretrained_start(tmp_path / "c.pth")
    assert not capsys.readouterr().out


def test_unknown_mode_and_network_without_encoder(tmp_path: Path) -> None:
    torch.save({"model": vmamba_state()}, tmp_path / "c.pth")
    with pytest.raises(UsageError, match="exact, corrected"):
        pretrained_start(tmp_path / "c.pth", mode="fixed")
    other = build_network(
        NetworkSpec(
            name="plain_unet",
            in_channels=1,
            out_channels=2,
            patch_size=(8, 8),
            features=(4, 8),
            strides=((1, 1), (2, 2)),
            kernel_sizes=((3, 3),) * 2,
            encoder_blocks=(1, 1),
            decoder_blocks=(1,),
        )
    )
    with pytest.raises(BundleError, match="has no VMamba encoder"):
        pretrained_start(tmp_path / "c.pth").fill(other)
