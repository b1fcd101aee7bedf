"""ImageNet start, and start from a trained model, from files as users have them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_checkpoints import write_checkpoint
from safetensors.torch import save_file
from torch import Tensor, nn

from medmamba.bundle import load_bundle, load_networks
from medmamba.errors import BundleError, SecurityError, UsageError
from medmamba.interop.checkpoint import import_checkpoints
from medmamba.labels import LabelMap
from medmamba.networks import build_network
from medmamba.networks.spec import NetworkSpec
from medmamba.pipeline.starting import Beginning, pretrained_start, read_tensors
from medmamba.plans.plan import Plan

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


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "checkpoint.pth", "plain_unet")
    return import_checkpoints([tmp_path / "checkpoint.pth"], tmp_path / "model").folder


def begin(decided: Plan, fold: int | str = 2, **options: Any) -> tuple[list[str], Any, nn.Module]:
    said: list[str] = []
    spec, start = Beginning(**options).start(decided, "3d_fullres", fold, said.append)
    assert start is not None
    network = build_network(spec)
    return said, start.fill(network), network


def test_a_trained_model_is_taken_over_where_labels_are_the_same(model: Path) -> None:
    bundle = load_bundle(model)
    said, record, network = begin(bundle.plan, init=model)
    given = load_networks(bundle)[0].state_dict()
    assert set(record["loaded"]) == set(given)
    assert all(torch.equal(network.state_dict()[name], given[name]) for name in given)
    assert said == [
        f"init Dataset001_Blocks plain_unet, fold 2 (plain_unet): {len(given)} tensors loaded, "
        "0 made anew, 0 skipped"
    ]


def test_heads_are_made_anew_for_other_labels_and_it_is_said(model: Path) -> None:
    decided = load_bundle(model).plan
    label_map = LabelMap(values={"background": (0,), "brick": (1,)})
    said, record, _ = begin(replace(decided, label_map=label_map), init=model)
    assert set(record["remade"].values()) == {"heads, for labels brick instead of block"}
    assert all("seg_layers" in name for name in record["remade"])
    assert "for labels brick instead of block" in said[1]


def test_what_a_reader_of_the_scores_must_know_is_said(model: Path) -> None:
    decided = load_bundle(model).plan
    said, _, _ = begin(replace(decided, channel_names=("CT",)), fold=0, init=model)
    assert "its image channels are MRI, those here CT" in said[1]
    assert "trained on fold 2 of this dataset" in said[2]


def test_another_form_is_refused_unless_it_is_asked_for(model: Path) -> None:
    decided = load_bundle(model).plan
    branch = decided.configurations["3d_fullres"]
    wide = replace(branch.network, features=(8, 16, 64))
    planned = replace(decided, configurations={"3d_fullres": replace(branch, network=wide)})
    with pytest.raises(BundleError, match=r"of another shape .*--init-form"):
        begin(planned, init=model)
    _, record, network = begin(planned, init=model, init_form=True)
    assert set(record["loaded"]) == set(network.state_dict())
    other = replace(wide, name="resenc_unet")
    planned = replace(decided, configurations={"3d_fullres": replace(branch, network=other)})
    with pytest.raises(BundleError, match="is a plain_unet, this run trains resenc_unet"):
        begin(planned, init=model, init_form=True)


def test_all_but_heads_and_first_layers_can_stay_fixed(model: Path) -> None:
    decided = load_bundle(model).plan
    spec, start = Beginning(init=model, freeze_epochs=3).start(decided, "3d_fullres", 2, None)
    assert start is not None
    network = build_network(spec)
    free = set(dict(network.named_parameters())) - set(start.frozen(network))
    assert start.epochs_frozen(1000) == 3
    assert {name.split(".")[1] for name in free} == {"stages", "seg_layers"}
    _, start = Beginning(init=model).start(decided, "3d_fullres", 2, None)
    assert start is not None and start.epochs_frozen(1000) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"init": Path("a"), "pretrained": Path("b")},
        {"init_form": True},
        {"freeze_epochs": 3},
    ],
)
def test_options_that_do_not_go_together(model: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Beginning(**options).start(load_bundle(model).plan, "3d_fullres", 0, None)
