"""Samples computed side by side give the gradients of the whole batch."""

import pytest
import torch
from torch import nn

from medmamba.networks import build_network
from medmamba.networks.drop_path import DropPath
from medmamba.training.sample_threads import SampleThreads, suits

from .conftest import tiny_network

CPU = torch.device("cpu")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def pointwise_network() -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, 4, 1), nn.GELU(), nn.Conv3d(4, 3, 1))


def test_gradients_are_those_of_the_batch(two_threads) -> None:
    torch.manual_seed(0)
    network = pointwise_network()
    data = torch.randn(3, 1, 4, 5, 6)

    def loss(outputs: list[torch.Tensor]) -> torch.Tensor:
        return outputs[0].softmax(1).sum(0).pow(2).mean()

    expected = loss([network(data)])
    expected.backward()
    gradients = [p.grad.clone() for p in network.parameters()]
    threads = SampleThreads(network, precision="fp32")
    values = []
    for _ in range(3):
        network.zero_grad()
        values.append(threads.gradients(data, loss))
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
    torch.testing.assert_close(values[0], expected)
    assert values[0] == values[1] == values[2]


def test_it_is_for_small_operations_without_random_numbers(two_threads) -> None:
    assert suits(pointwise_network(), CPU, 2)
    assert not suits(pointwise_network(), CPU, 1)
    assert not suits(build_network(tiny_network()), CPU, 2)
    assert not suits(nn.Sequential(pointwise_network(), DropPath(0.5)), CPU, 2)
    torch.set_num_threads(1)
    assert not suits(pointwise_network(), CPU, 2)
