"""Turn an official nnU-Net-style checkpoint into a bundle, with the plan the checkpoint holds."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from medmamba.bundle import Bundle, save_bundle
from medmamba.errors import BundleError
from medmamba.interop.official import load_official_state
from medmamba.interop.official_keys import own_name, without_wrappers
from medmamba.interop.pickle_reader import read_foreign_pickle
from medmamba.networks import NETWORKS, build_network
from medmamba.networks.spec import NetworkSpec
from medmamba.plans.nnunet_schema import plan_from_nnunet

LIGHTM_BY_FILTERS = {8: "lightm_unet_s", 16: "lightm_unet_m", 32: "lightm_unet"}
LIGHTM_FILTERS = "convInit.1.conv.weight"


def import_checkpoint(path: Path, folder: Path) -> Bundle:
    """Read a checkpoint of nnU-Net or of one of the official forks and write a bundle.

    Which network it holds is read off the names of its tensors, since forks share class names.

    Args:
        path: the ``.pth`` file.
        folder: of the bundle.

    Raises:
        SecurityError: the file holds more than data; nothing of it was run.
        BundleError: parts are missing, or tensors do not fit the network of the plan.
        PlanError: the checkpoint's plans cannot be used.
    """
    content = read_foreign_pickle(path)
    state = _part(content, "network_weights", path)
    arguments = _part(content, "init_args", path)
    configuration = str(_part(arguments, "configuration", path))
    what = f"checkpoint {path}"
    plan = plan_from_nnunet(
        _part(arguments, "plans", path), _part(arguments, "dataset_json", path), what=what
    )
    if configuration not in plan.configurations:
        raise BundleError(f"{what}: its plans hold no configuration {configuration!r}.")
    branch = plan.configurations[configuration]
    spec = recognize(state, branch.network)
    network = build_network(spec)
    load_official_state(network, state)
    axes = content.get("inference_allowed_mirroring_axes")
    training = replace(branch.training, mirror_axes=tuple(axes or ()))
    branch = replace(branch, network=spec, training=training)
    plan = replace(
        plan,
        network=spec.name,
        configurations={**plan.configurations, configuration: branch},
    )
    return save_bundle(
        folder,
        plan=plan,
        configuration=configuration,
        weights=[network.state_dict()],
        folds=[arguments.get("fold", 0)],
        training={"imported_from": path.name, "trainer": str(content.get("trainer_name"))},
    )


def recognize(state: Mapping[str, Tensor], planned: NetworkSpec) -> NetworkSpec:
    """Return the network that an official state dict belongs to, sized by the plan.

    Args:
        state: under any official names.
        planned: the network of the checkpoint's plans, which most forks leave at nnU-Net's.

    Raises:
        BundleError: no network known here has such tensors.
    """
    # LightM-UNet and the Swin-UMambas have no aliases, but also no names that look like one.
    tensors = {own_name(without_wrappers(name)): tensor for name, tensor in state.items()}
    name = _network_name(tensors)
    if name is None:
        raise BundleError(
            f"state dict: no network known here has tensors such as {next(iter(tensors), '')!r}."
        )
    spec = replace(planned, name=name)
    fixed = name.startswith(("lightm", "swin"))
    return NETWORKS[name].arrange(spec) if fixed else spec


def _network_name(tensors: Mapping[str, Tensor]) -> str | None:
    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in tensors)

    first_release = has("encoder.stem.convs.")
    if has("vssm_encoder."):
        return "swin_umamba_d" if has("decoder.expand_layers.") else "swin_umamba"
    if LIGHTM_FILTERS in tensors:
        return LIGHTM_BY_FILTERS.get(tensors[LIGHTM_FILTERS].shape[0])
    if has("encoder.encoder_layers."):
        return "mambaclinix"
    if has("encoder.mamba_layers."):
        return "umamba_enc_v1" if first_release else "umamba_enc"
    if has("mamba_layer."):
        return "umamba_bot"
    if has("mamba.A_log"):
        return "umamba_bot_v1"
    if first_release:
        return "resenc_unet"
    return "plain_unet" if has("encoder.stages.0.0.convs.") else None


def _part(content: Any, key: str, path: Path) -> Any:
    if not isinstance(content, Mapping) or key not in content:
        raise BundleError(
            f"checkpoint {path} has no {key!r}; it is not one that nnU-Net's trainers write."
        )
    return content[key]
