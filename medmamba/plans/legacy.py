"""Configurations written before nnU-Net described architectures: brought to today's keys."""

from collections.abc import Mapping
from typing import Any

from medmamba.errors import PlanError

CLASSES = {
    "PlainConvUNet": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "ResidualEncoderUNet": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
}


def modernize(content: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return the configuration with an ``architecture``, made from the old keys where need be.

    Raises:
        PlanError: the old network class is not known, or a key is missing.
    """
    if "architecture" in content:
        return dict(content)
    name = content.get("UNet_class_name")
    if name not in CLASSES:
        raise PlanError(
            f"{what}: no 'architecture', and 'UNet_class_name' is {name!r}; "
            f"one of {', '.join(CLASSES)} is needed."
        )
    kernels = content["conv_kernel_sizes"]
    stages = len(kernels)
    base, largest = content["UNet_base_num_features"], content["unet_max_num_features"]
    residual = name == "ResidualEncoderUNet"
    architecture = {
        "network_class_name": CLASSES[name],
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": [min(base * 2**stage, largest) for stage in range(stages)],
            "kernel_sizes": kernels,
            "strides": content["pool_op_kernel_sizes"],
            "n_blocks_per_stage" if residual else "n_conv_per_stage": content[
                "n_conv_per_stage_encoder"
            ],
            "n_conv_per_stage_decoder": content["n_conv_per_stage_decoder"],
        },
    }
    return {**content, "architecture": architecture}
