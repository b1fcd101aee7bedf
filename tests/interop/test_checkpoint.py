"""Official checkpoints become bundles whose networks give the same logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_checkpoints import CONFIGURATION, DATASET, PLANS, write_checkpoint, write_content

from medmamba.bundle import load_networks
from medmamba.errors import BundleError, PlanError
from medmamba.interop.checkpoint import import_checkpoints
from medmamba.interop.nnunet_network import PlannedNetwork
from medmamba.interop.official import build, official_state


def planned_2d() -> dict[str, Any]:
    """The same plans for slices, as nnU-Net's releases before 2.5 wrote them."""
    new = {"architecture", "batch_dice"}
    content = {key: value for key, value in CONFIGURATION.items() if key not in new}
    content |= {
        "patch_size": [64, 64],
        "spacing": [1.0, 1.0],
        "median_image_size_in_voxels": [64.0, 64.0],
        "batch_dice": True,
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 8,
        "unet_max_num_features": 32,
        "n_conv_per_stage_encoder": [2, 2, 2],
        "n_conv_per_stage_decoder": [2, 2],
        "num_pool_per_axis": [2, 2],
        "pool_op_kernel_sizes": [[1, 1], [2, 2], [2, 2]],
        "conv_kernel_sizes": [[3, 3]] * 3,
    }
    return {**PLANS, "configurations": {"2d": content}}


@pytest.mark.parametrize(
    "name",
    [
        "plain_unet",
        "resenc_unet",
        "umamba_bot",
        "umamba_bot_v1",
        "umamba_enc",
        "umamba_enc_v1",
        "mambaclinix",
        "lightm_unet_s",
    ],
)
def test_imported_network_gives_the_same_logits(tmp_path: Path, name: str) -> None:
    official = write_checkpoint(tmp_path / "checkpoint_final.pth", name)
    bundle = import_checkpoints([tmp_path / "checkpoint_final.pth"], tmp_path / "bundle")
    assert bundle.manifest.network == name
    assert bundle.folds == ("2",)
    assert bundle.configuration.training.mirror_axes == (0, 2)
    (network,) = load_networks(bundle)
    image = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(network.eval()(image), official(image))


SWIN = {
    "in_chans": 1,
    "out_chans": 2,
    "feat_size": [8, 16, 32],
    "hidden_size": 32,
    "encoder_dims": [16, 32],
    "encoder_depths": [1, 2],
}
SWIN_D = {
    "vss_args": {"in_chans": 1, "patch_size": 4, "depths": [1, 2, 1], "dims": 16},
    "decoder_args": {"num_classes": 2, "features_per_stage": [16, 32, 64], "d_state": 16},
}
LIGHTM = {"spatial_dims": 2, "init_filters": 24, "blocks_down": [1, 1, 2], "blocks_up": [1, 2]}


@pytest.mark.parametrize(
    ("official", "constructor", "name"),
    [
        ("SwinUMamba", SWIN, "swin_umamba"),
        ("SwinUMambaD", SWIN_D, "swin_umamba_d"),
        ("LightMUNet", LIGHTM, "lightm_unet"),
    ],
)
def test_sizes_that_the_plan_does_not_hold_are_read_off_the_tensors(
    tmp_path: Path, official: str, constructor: dict[str, Any], name: str
) -> None:
    theirs = build(official, constructor).eval()
    state = {f"module.{key}": value for key, value in official_state(theirs).items()}
    write_content(tmp_path / "c.pth", state, plans=planned_2d(), configuration="2d")
    bundle = import_checkpoints([tmp_path / "c.pth"], tmp_path / "bundle")
    assert bundle.manifest.network == name
    assert bundle.configuration.training.mirror_axes == (0,)  # axis 2 is none of a 2D network's
    (network,) = load_networks(bundle)
    image = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(network.eval()(image), theirs(image))


def test_network_of_ours_that_nnunet_trained(tmp_path: Path) -> None:
    keywords = {**CONFIGURATION["architecture"]["arch_kwargs"], "network": "mambaclinix_gated"}
    keywords |= {"patch_size": [16, 16, 16], "options": {"drop_path": 0.1}}
    architecture = {
        **CONFIGURATION["architecture"],
        "network_class_name": "medmamba.interop.nnunet_network.PlannedNetwork",
        "arch_kwargs": keywords,
    }
    plans = {
        **PLANS,
        "configurations": {"3d_fullres": {**CONFIGURATION, "architecture": architecture}},
    }
    theirs = PlannedNetwork(1, 2, **keywords).eval()
    write_content(tmp_path / "c.pth", theirs.state_dict(), plans=plans)
    bundle = import_checkpoints([tmp_path / "c.pth"], tmp_path / "bundle")
    assert bundle.manifest.network == "mambaclinix_gated"
    (network,) = load_networks(bundle)
    image = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(network.eval()(image), theirs(image))


def test_folds_of_one_model_become_one_bundle(tmp_path: Path) -> None:
    arguments = {"plans": PLANS, "dataset_json": DATASET, "configuration": "3d_fullres"}
    for fold in (0, 1):
        write_checkpoint(
            tmp_path / f"{fold}.pth", "plain_unet", init_args={**arguments, "fold": fold}
        )
    paths = [tmp_path / "0.pth", tmp_path / "1.pth"]
    assert import_checkpoints(paths, tmp_path / "bundle").folds == ("0", "1")
    with pytest.raises(BundleError, match="folds 0, 0"):
        import_checkpoints(paths[:1] * 2, tmp_path / "bundle")
    write_checkpoint(tmp_path / "1.pth", "resenc_unet", init_args={**arguments, "fold": 1})
    with pytest.raises(BundleError, match=r"1\.pth: its plans, network"):
        import_checkpoints(paths, tmp_path / "bundle")


def test_unknown_tensors_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c.pth", "plain_unet", network_weights={"vit.patch": torch.ones(1)})
    with pytest.raises(BundleError, match=r"vit\.patch"):
        import_checkpoints([tmp_path / "c.pth"], tmp_path / "bundle")


def test_file_that_is_no_trainers_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "c.pth")
    with pytest.raises(BundleError, match="no 'network_weights'"):
        import_checkpoints([tmp_path / "c.pth"], tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_tensors_of_another_plan_are_refused(tmp_path: Path) -> None:
    network = write_checkpoint(tmp_path / "c.pth", "plain_unet")
    state = official_state(network)
    state["decoder.seg_layers.1.weight"] = torch.zeros(5, 8, 1, 1, 1)
    write_checkpoint(tmp_path / "c.pth", "plain_unet", network_weights=state)
    with pytest.raises(BundleError, match=r"seg_layers\.1\.weight \[5, 8, 1, 1, 1\] instead"):
        import_checkpoints([tmp_path / "c.pth"], tmp_path / "bundle")


def test_missing_and_extra_tensors_are_named(tmp_path: Path) -> None:
    state = official_state(write_checkpoint(tmp_path / "c.pth", "umamba_bot"))
    state["head.bias"] = state.pop("mamba_layer.norm.bias")
    write_checkpoint(tmp_path / "c.pth", "umamba_bot", network_weights=state)
    with pytest.raises(BundleError, match=r"missing \(mamba_layer\.norm\.bias\).*\(head\.bias\)"):
        import_checkpoints([tmp_path / "c.pth"], tmp_path / "bundle")


def test_patch_that_the_network_cannot_take_is_refused(tmp_path: Path) -> None:
    network = build("LightMUNet", {"spatial_dims": 3, "init_filters": 8, "out_channels": 2})
    odd = {**CONFIGURATION, "patch_size": [16, 16, 20]}
    plans = {**PLANS, "configurations": {"3d_fullres": odd}}
    write_content(tmp_path / "c.pth", official_state(network), plans=plans)
    with pytest.raises(PlanError, match=r"\[16, 16, 20\] must be a multiple of \[8, 8, 8\]"):
        import_checkpoints([tmp_path / "c.pth"], tmp_path / "bundle")
