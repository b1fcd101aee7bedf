"""Instance norm gives one result by whatever kernel; He initialisation reaches what it should."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from medmamba.networks.blocks import (
    InstanceNorm,
    ResidualBlock,
    initialize_he,
    zero_last_norms,
)

FORMATS = {
    (2, "contiguous"): torch.contiguous_format,
    (2, "channels last"): torch.channels_last,
    (3, "contiguous"): torch.contiguous_format,
    (3, "channels last"): torch.channels_last_3d,
}
each_format = pytest.mark.parametrize(
    ("dimension", "memory_format"),
    [(dimension, value) for (dimension, _), value in FORMATS.items()],
    ids=[f"{dimension}d {name}" for dimension, name in FORMATS],
)


def norm_for(channels: int) -> InstanceNorm:
    norm = InstanceNorm(channels)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(channels, generator=generator))
    return norm


@each_format
@pytest.mark.parametrize("batch", [1, 3])
def test_value_and_gradients_are_those_of_torch(
    dimension: int, memory_format: torch.memory_format, batch: int
) -> None:
    norm = norm_for(5).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 5, *(4, 6, 3)[:dimension], generator=generator, dtype=torch.float64)
    weight = torch.randn_like(x)
    results = []
    for forward in (
        norm,
        lambda t: functional.instance_norm(t, weight=norm.weight, bias=norm.bias, eps=1e-5),
    ):
        image = x.clone(memory_format=memory_format).requires_grad_()
        norm.zero_grad()
        output = forward(image)
        (output * weight).sum().backward()
        assert norm.weight is not None
        assert norm.bias is not None
        results.append((output.detach(), image.grad, norm.weight.grad, norm.bias.grad))
    for ours, torchs in zip(*results, strict=True):
        assert ours is not None
        assert torch.allclose(ours, torchs, rtol=1e-10, atol=1e-10)


@each_format
def test_memory_format_is_kept(dimension: int, memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 4, *(4,) * dimension).contiguous(memory_format=memory_format)
    assert norm_for(4)(x).is_contiguous(memory_format=memory_format)


@each_format
def test_float32_survives_a_large_mean(dimension: int, memory_format: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(3)
    x = 100 + torch.randn(2, 4, *(32,) * dimension, generator=generator)
    x = x.contiguous(memory_format=memory_format)
    expected = functional.instance_norm(x.double(), eps=1e-5)
    # Plain float32 sums over 32 768 voxels know the mean to about one part in 100 000.
    assert float((InstanceNorm(4, affine=False)(x) - expected).abs().max()) < 1e-3


@each_format
def test_one_voxel_is_normalised_to_the_bias(
    dimension: int, memory_format: torch.memory_format
) -> None:
    norm = norm_for(3)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 3, *(1,) * dimension, generator=generator)
    x = x.contiguous(memory_format=memory_format)
    assert norm.bias is not None
    expected = norm.bias.view(1, 3, *(1,) * dimension).expand_as(x)
    # Without variance the scale is eps^-1/2 = 316, and so is the rounding of the mean enlarged.
    rounding = 2 * torch.finfo(torch.float32).eps * float(x.abs().max()) * 316
    assert float((norm(x) - expected).detach().abs().max()) < rounding


def test_bf16_keeps_its_type_and_statistics() -> None:
    x = 5 + torch.randn(2, 4, 16, 16, 16)
    for memory_format in (torch.contiguous_format, torch.channels_last_3d):
        half = x.bfloat16().contiguous(memory_format=memory_format)
        y = norm_for(4)(half)
        assert y.dtype == torch.bfloat16
        expected = norm_for(4)(half.float())
        # Rounding of the output alone: eight bits of mantissa.
        assert torch.allclose(y.float(), expected, rtol=2**-8, atol=2**-8)


def test_he_reaches_maps_and_leaves_sequences() -> None:
    torch.manual_seed(0)
    network = nn.ModuleList([nn.Conv3d(64, 64, 3), nn.Conv1d(8, 8, 4), nn.ConvTranspose3d(8, 4, 2)])
    before = network[1].weight.detach().clone()
    initialize_he(network)
    assert torch.equal(network[1].weight, before)
    assert not network[0].bias.any()
    assert not network[2].bias.any()
    deviation = (2 / (1 + 0.01**2) / (64 * 27)) ** 0.5
    assert float(network[0].weight.detach().std()) == pytest.approx(deviation, rel=0.02)


def test_zeroed_residual_block_is_its_shortcut() -> None:
    block = ResidualBlock(4, 4, (3, 3, 3))
    zero_last_norms(block)
    x = torch.randn(1, 4, 4, 4, 4)
    assert torch.allclose(block(x), functional.leaky_relu(x, 0.01))


@pytest.mark.parametrize(
    ("stride", "channels", "keys"),
    [
        ((2, 2, 2), 8, {"skip.1.conv.weight", "skip.1.norm.weight", "skip.1.norm.bias"}),
        ((1, 1, 1), 8, {"skip.0.conv.weight", "skip.0.norm.weight", "skip.0.norm.bias"}),
        ((2, 1, 2), 4, set()),
    ],
)
def test_shortcut_has_its_official_place(
    stride: tuple[int, ...], channels: int, keys: set[str]
) -> None:
    block = ResidualBlock(4, channels, (3, 3, 3), stride)
    assert {name for name in block.state_dict() if name.startswith("skip")} == keys
    shape = block(torch.randn(1, 4, 8, 8, 8)).shape
    assert shape == (1, channels, *(8 // step for step in stride))
