"""All networks by name. A new network is one line here; every test then runs over it."""

from torch import nn

from medmamba.errors import PlanError
from medmamba.networks.definition import NetworkDefinition, require
from medmamba.networks.lightm_unet import (
    LIGHTM_UNET,
    LIGHTM_UNET_M,
    LIGHTM_UNET_PLAN,
    LIGHTM_UNET_S,
)
from medmamba.networks.mambaclinix import MAMBACLINIX, MAMBACLINIX_GATED
from medmamba.networks.spec import NetworkSpec
from medmamba.networks.swin_umamba import SWIN_UMAMBA, SWIN_UMAMBA_D
from medmamba.networks.swin_umamba_3d import SWIN_UMAMBA_3D
from medmamba.networks.umamba import UMAMBA_BOT, UMAMBA_ENC
from medmamba.networks.umamba_v1 import UMAMBA_BOT_V1, UMAMBA_ENC_V1
from medmamba.networks.unet import PLAIN_UNET, RESENC_UNET

NETWORKS: dict[str, NetworkDefinition] = {
    "lightm_unet": LIGHTM_UNET,
    "lightm_unet_m": LIGHTM_UNET_M,
    "lightm_unet_plan": LIGHTM_UNET_PLAN,
    "lightm_unet_s": LIGHTM_UNET_S,
    "mambaclinix": MAMBACLINIX,
    "mambaclinix_gated": MAMBACLINIX_GATED,
    "plain_unet": PLAIN_UNET,
    "resenc_unet": RESENC_UNET,
    "swin_umamba": SWIN_UMAMBA,
    "swin_umamba_3d": SWIN_UMAMBA_3D,
    "swin_umamba_d": SWIN_UMAMBA_D,
    "umamba_bot": UMAMBA_BOT,
    "umamba_bot_v1": UMAMBA_BOT_V1,
    "umamba_enc": UMAMBA_ENC,
    "umamba_enc_v1": UMAMBA_ENC_V1,
}


def find_network(name: str) -> NetworkDefinition:
    """Return the definition of a network.

    Raises:
        PlanError: there is no network of that name; the message lists those there are.
    """
    if name not in NETWORKS:
        raise PlanError(
            f"network {name!r} does not exist. Choose one of: {', '.join(sorted(NETWORKS))}.",
            code="E_NETWORK_UNKNOWN",
        )
    return NETWORKS[name]


def build_network(spec: NetworkSpec) -> nn.Module:
    """Build a network with fresh weights.

    Raises:
        PlanError: unknown network, a dimension or patch size it cannot take, or a bad option.
    """
    definition = find_network(spec.name)
    check_patch(spec)
    return definition.build(spec)


def check_patch(spec: NetworkSpec) -> None:
    """Refuse a patch size that the network cannot take.

    Raises:
        PlanError: naming the required multiple per axis.
    """
    definition = find_network(spec.name)
    offered = " or ".join(f"{dimension}D" for dimension in sorted(definition.dimensions))
    require(
        spec.dimension in definition.dimensions,
        spec,
        f"it is {offered}, the patch {list(spec.patch_size)} is {spec.dimension}D.",
    )
    divisor = definition.divisor(spec)
    fits = all(
        size > 0 and size % multiple == 0
        for size, multiple in zip(spec.patch_size, divisor, strict=True)
    )
    nearest = [
        max(1, round(size / multiple)) * multiple
        for size, multiple in zip(spec.patch_size, divisor, strict=True)
    ]
    require(
        fits,
        spec,
        f"patch size {list(spec.patch_size)} must be a multiple of {list(divisor)} per axis. "
        f"The nearest that fits is {nearest}.",
    )
