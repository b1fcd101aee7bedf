"""Tell which official network a state dict belongs to, and how large it is, from its tensors.

Forks of nnU-Net share class names and leave nnU-Net's network in their plans, so names of
tensors say more than a checkpoint's own words. Networks that take widths and depths from their
class instead of the plan are measured on their tensors.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from torch import Tensor

from medmamba.errors import BundleError
from medmamba.interop.official_keys import own_name, without_wrappers
from medmamba.networks import NETWORKS
from medmamba.networks.spec import NetworkSpec

LIGHTM_BY_FILTERS = {8: "lightm_unet_s", 16: "lightm_unet_m", 32: "lightm_unet"}
LIGHTM_FILTERS = "convInit.1.conv.weight"
SWIN_STEM = "stem.0.weight"
NAMES_SHOWN = 3

Tensors = Mapping[str, Tensor]


def recognize(state: Tensors, planned: NetworkSpec) -> NetworkSpec:
    """Return the network that an official state dict belongs to.

    Args:
        state: under any official names.
        planned: the network of the checkpoint's plans, which most forks leave at nnU-Net's; gives
            the topology of networks that follow the plan.

    Raises:
        BundleError: no network known here has such tensors.
        PlanError: the network does not exist in the dimension of the plan.
    """
    # LightM-UNet and the Swin-UMambas have no aliases, but also no names that look like one.
    tensors = {own_name(without_wrappers(name)): tensor for name, tensor in state.items()}
    name = _network_name(tensors)
    if name is None:
        raise BundleError(
            f"state dict: no network known here has tensors such as "
            f"{', '.join(list(tensors)[:NAMES_SHOWN]) or 'none at all'}. "
            f"Known networks: {', '.join(sorted(NETWORKS))}."
        )
    spec = replace(planned, name=name)
    measure = MEASURES.get(name)
    if measure is None:
        return spec
    try:
        return measure(tensors, NETWORKS[name].arrange(spec))
    except (KeyError, IndexError) as error:
        raise BundleError(
            f"state dict: it looks like {name}, but tensor {error.args[0]!r} is missing."
        ) from error


def _network_name(tensors: Tensors) -> str | None:
    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in tensors)

    first_release = has("encoder.stem.convs.")
    if has("vssm_encoder."):
        return "swin_umamba_d" if has("decoder.expand_layers.") else "swin_umamba"
    if LIGHTM_FILTERS in tensors:
        return LIGHTM_BY_FILTERS.get(tensors[LIGHTM_FILTERS].shape[0], "lightm_unet")
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


def _measure_lightm(tensors: Tensors, spec: NetworkSpec) -> NetworkSpec:
    stages = _count(tensors, r"down_layers\.(\d+)\.")
    filters = tensors[LIGHTM_FILTERS].shape[0]
    # Slot 0 of a stage is the way down to it.
    down = tuple(_count(tensors, rf"down_layers\.{stage}\.(\d+)\.") - 1 for stage in range(stages))
    up = tuple(_count(tensors, rf"up_layers\.{step}\.(\d+)\.") for step in range(stages - 1))
    return replace(
        spec,
        features=tuple(filters * 2**stage for stage in range(stages)),
        strides=_halving(spec, stages),
        kernel_sizes=spec.kernel_sizes[:1] * stages,
        encoder_blocks=down,
        decoder_blocks=up,
    )


def _measure_swin(tensors: Tensors, spec: NetworkSpec) -> NetworkSpec:
    widths, depths = _encoder_sizes(tensors)
    stages = len(widths) + 2
    return replace(
        spec,
        features=(tensors[SWIN_STEM].shape[0], *widths, widths[-1]),
        strides=_halving(spec, stages),
        kernel_sizes=spec.kernel_sizes[:1] * stages,
        encoder_blocks=(1, 1, *depths),
        decoder_blocks=(1,) * (stages - 1),
    )


def _measure_swin_d(tensors: Tensors, spec: NetworkSpec) -> NetworkSpec:
    widths, depths = _encoder_sizes(tensors)
    stages = len(widths) + 1
    patch = tuple(tensors["vssm_encoder.patch_embed.proj.weight"].shape[2:])
    steps = stages - 2
    blocks = [
        _count(tensors, rf"decoder\.stages\.{step}\.blocks\.(\d+)\.") for step in range(steps)
    ]
    return replace(
        spec,
        features=(widths[0], *widths),
        strides=(*_halving(spec, 1), patch, *_halving(spec, stages - 1)[1:]),
        kernel_sizes=spec.kernel_sizes[:1] * stages,
        encoder_blocks=(0, *depths),
        decoder_blocks=(*blocks, 0),
    )


def _encoder_sizes(tensors: Tensors) -> tuple[list[int], list[int]]:
    """Return widths and depths of a VSS encoder's stages."""
    prefix = "vssm_encoder.layers"
    stages = range(_count(tensors, rf"{re.escape(prefix)}\.(\d+)\."))
    widths = [tensors[f"{prefix}.{stage}.blocks.0.ln_1.weight"].shape[0] for stage in stages]
    depths = [
        _count(tensors, rf"{re.escape(prefix)}\.{stage}\.blocks\.(\d+)\.") for stage in stages
    ]
    return widths, depths


def _halving(spec: NetworkSpec, stages: int) -> tuple[tuple[int, ...], ...]:
    dimension = spec.dimension
    return ((1,) * dimension,) + ((2,) * dimension,) * (stages - 1)


def _count(tensors: Tensors, pattern: str) -> int:
    """Return one more than the highest index that names have at the group of ``pattern``."""
    found = [int(match[1]) for name in tensors if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1


MEASURES: Mapping[str, Callable[[Tensors, NetworkSpec], NetworkSpec]] = MappingProxyType(
    {
        **dict.fromkeys(LIGHTM_BY_FILTERS.values(), _measure_lightm),
        "swin_umamba": _measure_swin,
        "swin_umamba_d": _measure_swin_d,
    }
)
"""Networks whose sizes come from their class; all others take the plan's."""
