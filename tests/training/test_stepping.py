"""One step: precision, skipping, and validation by the same network."""

import pytest
import torch

from medmamba.errors import EnvironmentFault, UsageError
from medmamba.labels import LabelMap
from medmamba.networks import build_network
from medmamba.networks.spec import NetworkSpec
from medmamba.training.precision import (
    choose_precision,
    deterministic_algorithms,
    has_native_bf16,
    resolve_device,
)
from medmamba.training.recipe import TrainingRecipe
from medmamba.training.sampling import Batch
from medmamba.training.stepping import Stepper
from medmamba.training.validation import count_overlap, validate

CPU = torch.device("cpu")
CLASSES = LabelMap(values={"background": (0,), "ball": (1,), "core": (2,)})
REGIONS = LabelMap(
    values={"background": (0,), "whole": (1, 2), "core": (2,), "ignore": (3,)}, region_order=(1, 2)
)


def spec_of(out_channels: int, patch=(8, 8, 8)) -> NetworkSpec:
    ones = (1,) * len(patch)
    return NetworkSpec(
        name="plain_unet",
        in_channels=1,
        out_channels=out_channels,
        patch_size=patch,
        features=(4, 8, 8),
        strides=(ones, tuple(2 * one for one in ones), tuple(2 * one for one in ones)),
        kernel_sizes=(tuple(3 * one for one in ones),) * 3,
        encoder_blocks=(1, 1, 1),
        decoder_blocks=(1, 1),
    )


def stepper_of(label_map: LabelMap, precision: str = "fp32", patch=(8, 8, 8), **recipe) -> Stepper:
    torch.manual_seed(0)
    network = build_network(spec_of(label_map.output_channels, patch))
    values = {"batch_size": 2, "learning_rate": 0.01, **recipe}
    return Stepper(network, TrainingRecipe(**values), label_map, device=CPU, precision=precision)


def batch_of(highest: int, patch=(8, 8, 8)) -> Batch:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, highest + 1, (2, 1, *patch), generator=generator).to(torch.int16)
    data = labels.float() + 0.1 * torch.randn(labels.shape, generator=generator)
    return Batch(data=data, labels=labels, cases=("a", "b"), iteration=0)


@pytest.mark.parametrize("label_map", [CLASSES, REGIONS])
@pytest.mark.parametrize("patch", [(8, 8, 8), (16, 16)])
@pytest.mark.parametrize("deep_supervision", [True, False])
def test_steps_lower_the_loss(label_map, patch, deep_supervision) -> None:
    stepper = stepper_of(label_map, patch=patch, deep_supervision=deep_supervision)
    batch = batch_of(max(label_map.all_values), patch)
    stepper.network.train()
    outcomes = [stepper.train(batch, 0.01, i) for i in range(25)]
    assert all(outcome.applied for outcome in outcomes)
    assert outcomes[-1].loss < outcomes[0].loss - 0.1
    _, logits = stepper.evaluate(batch)
    assert logits.shape == (2, label_map.output_channels, *patch)


def test_bf16_follows_fp32() -> None:
    batch = batch_of(2)
    curves = {}
    for precision in ("fp32", "bf16"):
        stepper = stepper_of(CLASSES, precision)
        curves[precision] = [stepper.train(batch, 0.01, i).loss for i in range(15)]
        assert all(p.dtype == torch.float32 for p in stepper.network.parameters())
    mean = {k: sum(v[-5:]) / 5 for k, v in curves.items()}
    assert abs(mean["bf16"] - mean["fp32"]) < 0.05 * abs(mean["fp32"]) + 0.02
    assert curves["bf16"] != curves["fp32"]


def test_a_step_that_is_not_finite_changes_no_weight() -> None:
    stepper = stepper_of(CLASSES)
    stepper.train(batch_of(2), 0.01, 0)
    before = {k: v.clone() for k, v in stepper.network.state_dict().items()}
    bad = batch_of(2)
    outcome = stepper.train(
        Batch(data=bad.data * torch.inf, labels=bad.labels, cases=bad.cases, iteration=1), 0.01, 1
    )
    assert not outcome.applied
    for name, tensor in stepper.network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert stepper.bad_parameters()


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_first_step_that_overflows_leaves_no_unset_memory_behind(optimizer) -> None:
    plain, scaled = (stepper_of(CLASSES, optimizer=optimizer) for _ in range(2))
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    batch = batch_of(2)
    with deterministic_algorithms(True):  # torch then fills unset memory with NaN
        overflow = next(scaled.network.parameters()).register_hook(lambda grad: grad * torch.inf)
        assert not scaled.train(batch, 0.01, 0).applied
        assert scaled.scaler.get_scale() == 512.0
        overflow.remove()
        for step in range(3):
            plain.train(batch, 0.01, step)
            assert scaled.train(batch, 0.01, step).applied
    for expected, found in zip(
        plain.network.parameters(), scaled.network.parameters(), strict=True
    ):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_overlap_is_counted_per_class_and_region_without_ignored_voxels() -> None:
    labels = torch.tensor([0, 1, 2, 3, 2]).reshape(1, 1, 5)
    logits = torch.tensor([[[-1.0, 1, 1, 1, 1], [1, -1, 1, 1, -1]]])
    assert count_overlap(logits, labels, REGIONS).tolist() == [[3, 1], [0, 1], [0, 1]]
    classes = torch.nn.functional.one_hot(torch.tensor([0, 2, 2, 1, 0]), 3).T[None].float()
    truth = torch.tensor([0, 1, 2, 1, 0]).reshape(1, 1, 5)
    assert count_overlap(classes, truth, CLASSES).tolist() == [[1, 1], [0, 1], [1, 0]]


def test_validation_sums_over_batches_and_leaves_out_absent_classes() -> None:
    labels = torch.tensor([0, 1, 1, 0]).reshape(1, 1, 4)
    logits = torch.nn.functional.one_hot(torch.tensor([0, 1, 0, 1]), 3).T[None].float()
    batch = Batch(data=labels.float(), labels=labels, cases=("a",), iteration=0)
    found = validate(
        lambda: batch, lambda _: (torch.tensor(0.25), logits), CLASSES, lambda done: done < 3
    )
    assert found.batches == 3
    assert found.loss == 0.25
    assert found.dice_per_class["ball"] == 0.5
    assert found.dice_per_class["core"] != found.dice_per_class["core"]
    assert found.dice == 0.5


def test_devices_and_precisions_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UsageError, match="device 'gpu9'"):
        resolve_device("gpu9")
    with pytest.raises(EnvironmentFault, match="cuda:99"):
        resolve_device("cuda:99")
    with pytest.raises(UsageError, match="precision 'int8'"):
        choose_precision(CPU, "int8")
    with pytest.raises(UsageError, match="fp16"):
        choose_precision(CPU, "fp16")
    assert choose_precision(CPU, "auto") == ("bf16" if has_native_bf16(CPU) else "fp32")
    assert choose_precision(CPU, "fp32") == "fp32"
