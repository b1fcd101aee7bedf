"""Parameter groups, clipping, mean of weights."""

import pytest
import torch
from torch import nn

from medmamba.training.optimization import (
    WeightAverage,
    clip_gradients,
    is_ssm_parameter,
    make_optimizer,
    parameter_groups,
)
from medmamba.training.recipe import TrainingRecipe


class Scan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(3, 2))
        self.D = nn.Parameter(torch.ones(3))
        self.dt_proj = nn.Linear(2, 3)


def recipe_of(**changes) -> TrainingRecipe:
    return TrainingRecipe(**{"batch_size": 1, **changes})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder.0.mamba.A_log", True),
        ("mamba.D", True),
        ("D", True),
        ("x.dt_proj.bias", True),
        ("x.A_logs", True),
        ("x.Ds", True),
        ("x.dt_projs_bias", True),
        ("x.dt_proj.weight", False),
        ("convD.weight", False),
        ("x.in_proj.weight", False),
    ],
)
def test_parameters_of_the_scan_are_told_by_name(name: str, expected: bool) -> None:
    assert is_ssm_parameter(name) is expected


def test_the_scan_is_left_out_of_decay_where_asked_for() -> None:
    network = nn.ModuleDict({"mamba": Scan(), "conv": nn.Conv3d(1, 2, 3)})
    with_decay = parameter_groups(network, recipe_of(weight_decay=0.1))
    assert [group["weight_decay"] for group in with_decay] == [0.1]
    decayed, free = parameter_groups(network, recipe_of(weight_decay=0.1, decay_ssm=False))
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in free["params"]} == {
        id(p) for p in (network["mamba"].A_log, network["mamba"].D, network["mamba"].dt_proj.bias)
    }
    assert len(decayed["params"]) + 3 == len(list(network.parameters()))


def test_optimisers_follow_the_recipe() -> None:
    network = nn.Linear(2, 2)
    sgd = make_optimizer(network, recipe_of()).param_groups[0]
    assert (sgd["momentum"], sgd["nesterov"], sgd["weight_decay"]) == (0.99, True, 3e-5)
    adam = make_optimizer(network, recipe_of(optimizer="adam", adam_eps=1e-5))
    assert type(adam) is torch.optim.Adam
    assert adam.param_groups[0]["eps"] == 1e-5
    assert type(make_optimizer(network, recipe_of(optimizer="adamw"))) is torch.optim.AdamW


@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_clipping_equals_torchs(scale: float) -> None:
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        p.grad = torch.randn(p.shape) * scale
        q.grad = p.grad.clone()
    norm = clip_gradients(one.parameters(), 1.0)
    expected = torch.nn.utils.clip_grad_norm_(two.parameters(), 1.0)
    assert norm.item() == pytest.approx(expected.item())
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0)


def test_the_mean_of_weights_follows_slowly_later_on() -> None:
    network = nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(0.0)
    average = WeightAverage(network, 0.99)
    network.weight.data.fill_(1.0)
    average.update(network, 0)
    assert average.tensors["weight"].item() == pytest.approx(0.9)
    network.weight.data.fill_(0.0)
    average.update(network, 10**6)
    assert average.tensors["weight"].item() == pytest.approx(0.9 * 0.99)
