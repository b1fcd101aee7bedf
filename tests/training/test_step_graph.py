"""Steps replayed from a CUDA graph are the steps that are launched one by one."""

import pytest
import torch

from medmamba.labels import LabelMap
from medmamba.networks import build_network
from medmamba.networks.spec import NetworkSpec
from medmamba.training.recipe import TrainingRecipe
from medmamba.training.sampling import Batch
from medmamba.training.step_graph import WARMUP, can_record
from medmamba.training.stepping import Stepper

CUDA = torch.device("cuda")
CLASSES = LabelMap(values={"background": (0,), "ball": (1,), "core": (2,)})
PATCH = (16, 16, 16)
ONES, TWOS = (1, 1, 1), (2, 2, 2)
STEPS = WARMUP + 5


def stepper_of(name: str, precision: str, *, graph: bool) -> Stepper:
    torch.manual_seed(0)
    spec = NetworkSpec(
        name=name, in_channels=1, out_channels=3, patch_size=PATCH, features=(8, 16, 16),
        strides=(ONES, TWOS, TWOS), kernel_sizes=((3, 3, 3),) * 3, encoder_blocks=(1, 1, 1),
        decoder_blocks=(1, 1), options={"drop_path": 0.3} if name == "mambaclinix" else {},
    )  # fmt: skip
    recipe = TrainingRecipe(batch_size=2, learning_rate=0.01)
    return Stepper(
        build_network(spec).to(CUDA), recipe, CLASSES, device=CUDA, precision=precision, graph=graph
    )


def batch_of(number: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(0, 3, (2, 1, *PATCH), generator=generator).to(torch.int16)
    data = labels.float() + 0.1 * torch.randn(labels.shape, generator=generator)
    return Batch(data=data, labels=labels, cases=("a", "b"), iteration=number)


def train_all(stepper: Stepper) -> None:
    stepper.network.train()
    for number in range(STEPS):
        stepper.train(batch_of(number), 0.01, number)


def test_only_one_process_on_a_gpu_records() -> None:
    assert can_record(CUDA, 1)
    assert not can_record(CUDA, 2)
    assert not can_record(torch.device("cpu"), 1)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plain_unet", "lightm_unet_s", "mambaclinix", "umamba_enc_v1"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_replayed_steps_are_launched_steps(name: str, precision: str) -> None:
    launched, replayed = (stepper_of(name, precision, graph=graph) for graph in (False, True))
    losses = []
    for number in range(STEPS):
        # Of the same weights: libraries may add up gradients in another order from run to run.
        launched.network.load_state_dict(replayed.network.state_dict())
        outcomes = []
        for stepper in (launched, replayed):
            stepper.network.train()
            torch.manual_seed(number)  # each step draws anew which paths are dropped
            outcomes.append(stepper.train(batch_of(number), 0.01, number))
        expected, found = outcomes
        assert found.loss == expected.loss
        assert found.applied == expected.applied
        if found.applied:
            assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-3)
        losses.append(found.loss)
    assert replayed.replays
    assert not launched.replays
    assert len(set(losses)) == STEPS


@pytest.mark.gpu
def test_frozen_layers_and_other_sizes_get_graphs_of_their_own() -> None:
    stepper = stepper_of("plain_unet", "fp32", graph=True)
    train_all(stepper)
    frozen = next(stepper.network.parameters())
    before = frozen.detach().clone()
    frozen.requires_grad_(False)
    train_all(stepper)
    assert stepper.replays
    assert torch.equal(frozen, before)
    half = batch_of(0)
    half = Batch(data=half.data[:1], labels=half.labels[:1], cases=("a",), iteration=0)
    assert stepper.train(half, 0.01, 0).applied
    assert not stepper.replays


@pytest.mark.gpu
def test_a_batch_that_is_not_finite_is_left_out_of_replays_too() -> None:
    stepper = stepper_of("plain_unet", "fp16", graph=True)
    train_all(stepper)
    weights = [p.detach().clone() for p in stepper.network.parameters()]
    bad = batch_of(0)
    bad.data[0, 0, 0, 0, 0] = float("nan")
    assert not stepper.train(bad, 0.01, STEPS).applied
    for before, now in zip(weights, stepper.network.parameters(), strict=True):
        assert torch.equal(before, now)
    assert stepper.train(batch_of(1), 0.01, STEPS + 1).applied
