"""Where weights lie in memory changes nothing but the time a step takes."""

import copy

import torch
from torch import nn

from medmamba.networks import build_network
from medmamba.networks.memory_format import is_dense_convolution, pack_weights
from tests.training.conftest import PATCH, tiny_network


def test_packed_weights_keep_names_values_and_results() -> None:
    torch.manual_seed(0)
    plain = build_network(tiny_network())
    packed = copy.deepcopy(plain)
    pack_weights(packed)
    pairs = zip(plain.state_dict().items(), packed.state_dict().items(), strict=True)
    for (name, before), (same, after) in pairs:
        assert name == same
        assert torch.equal(before, after)
    kernel = packed.get_parameter("encoder.stages.0.0.convs.0.conv.weight")
    assert kernel.is_contiguous(memory_format=torch.channels_last_3d)
    x = torch.randn(1, 1, *PATCH)
    for one, other in zip(plain(x), packed(x), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_single_input_channel_leads_to_channels_last_too() -> None:
    stem = nn.Conv3d(1, 8, 3, padding=1)
    x = torch.randn(2, 1, 6, 5, 4)  # one alone, so small, would not go through oneDNN
    expected = stem(x)
    pack_weights(stem)
    found = stem(x)
    assert found.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(found, expected)


def test_only_dense_spatial_convolutions_count() -> None:
    assert is_dense_convolution(nn.Conv3d(4, 4, 3))
    assert is_dense_convolution(nn.ConvTranspose2d(4, 4, 2, stride=2))
    assert not is_dense_convolution(nn.Conv3d(4, 4, 1))
    assert not is_dense_convolution(nn.Conv3d(4, 4, 3, groups=4))
    assert not is_dense_convolution(nn.Linear(4, 4))
