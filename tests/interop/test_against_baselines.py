"""Our baselines against the classes nnU-Net builds: one state dict, the same logits."""

from typing import Any

import pytest
import torch
from torch import nn

from medmamba.interop.official import build, load_official_state, official_state

architectures = pytest.importorskip("dynamic_network_architectures.architectures.unet")

ISOTROPIC_2D = {
    "input_channels": 3,
    "n_stages": 4,
    "features_per_stage": [4, 8, 8, 16],
    "kernel_sizes": 3,
    "strides": [1, 2, 2, 2],
    "n_conv_per_stage": [1, 2, 3, 1],
    "num_classes": 2,
    "n_conv_per_stage_decoder": 2,
}
ANISOTROPIC_3D = {
    "input_channels": 2,
    "n_stages": 4,
    "features_per_stage": [4, 8, 8, 16],
    "kernel_sizes": [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 2]],
    "n_conv_per_stage": [2, 2, 1, 2],
    "num_classes": 4,
    "n_conv_per_stage_decoder": [1, 2, 1],
}
FIRST_STAGE_STRIDED = {
    **ANISOTROPIC_3D,
    "n_stages": 2,
    "features_per_stage": [6, 6],
    "kernel_sizes": [[3, 3, 3], [5, 3, 1]],
    "strides": [[1, 1, 1], [2, 1, 1]],
    "n_conv_per_stage": 1,
    "n_conv_per_stage_decoder": 1,
}


def theirs(name: str, constructor: dict[str, Any], dimension: int) -> nn.Module:
    arguments = dict(constructor)
    if name == "ResidualEncoderUNet":
        arguments["n_blocks_per_stage"] = arguments.pop("n_conv_per_stage")
    return getattr(architectures, name)(
        **arguments,
        conv_op={2: nn.Conv2d, 3: nn.Conv3d}[dimension],
        conv_bias=True,
        norm_op={2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dimension],
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )


@pytest.mark.parametrize("name", ["PlainConvUNet", "ResidualEncoderUNet"])
@pytest.mark.parametrize(
    ("constructor", "shape"),
    [
        (ISOTROPIC_2D, (16, 24)),
        (ANISOTROPIC_3D, (6, 16, 24)),
        (FIRST_STAGE_STRIDED, (6, 5, 7)),
    ],
)
def test_logits_and_state_dicts_are_theirs(
    name: str, constructor: dict[str, Any], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    official = theirs(name, constructor, len(shape)).double().eval()
    for parameter in official.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = build(name, {**constructor, "conv_op": f"Conv{len(shape)}d"}).double().eval()
    load_official_state(ours, official.state_dict())
    ours.deep_supervision = True
    image = torch.randn(2, constructor["input_channels"], *shape, dtype=torch.float64)
    with torch.no_grad():
        pairs = list(zip(ours(image), official(image), strict=True))
    assert len(pairs) == constructor["n_stages"] - 1
    for found, expected in pairs:
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-10
    written = official_state(ours)
    assert list(written) and set(written) == set(official.state_dict())
    official.load_state_dict(written)
