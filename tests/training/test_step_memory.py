"""Memory of a training step: that of a real one, and what it depends on."""

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from medmamba.labels import LabelMap
from medmamba.networks import NETWORKS, build_network
from medmamba.networks.memory import count_parameters
from medmamba.networks.spec import NetworkSpec
from medmamba.training.losses import DeepSupervision, LossSettings, build_loss
from medmamba.training.recipe import TrainingRecipe
from medmamba.training.step_memory import StepConditions, step_memory

LABELS = LabelMap(values={"background": (0,), "organ": (1,)})
CONDITIONS = StepConditions(recipe=TrainingRecipe(batch_size=2), label_map=LABELS)


def planned(name: str, patch: tuple[int, ...] = (32, 32, 32)) -> NetworkSpec:
    spec = NetworkSpec(
        name=name,
        in_channels=1,
        out_channels=2,
        patch_size=patch,
        features=(8, 16, 32),
        strides=((1,) * 3, (2,) * 3, (2,) * 3),
        kernel_sizes=((3,) * 3,) * 3,
        encoder_blocks=(2,) * 3,
        decoder_blocks=(2,) * 2,
    )
    return NETWORKS[name].arrange(spec)


def peak_of_a_real_step(spec: NetworkSpec, batch: int) -> int:
    """Most bytes allocated at a time by forward, loss and backward, as the profiler saw them."""
    network = build_network(spec)
    network.deep_supervision = True  # type: ignore[assignment]
    settings = LossSettings.of(LABELS)
    loss = DeepSupervision(build_loss("dice_ce", settings))
    labels = torch.zeros(batch, 1, *spec.patch_size, dtype=torch.int16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        outputs = network(torch.zeros(batch, 1, *spec.patch_size))
        loss([outputs] if isinstance(outputs, torch.Tensor) else outputs, labels).backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    # Weights and labels were there before; the optimiser keeps one value per weight.
    return most + 8 * count_parameters(spec) + labels.nbytes


@pytest.mark.parametrize("name", ["plain_unet", "resenc_unet", "umamba_bot", "lightm_unet_s"])
def test_estimate_is_the_peak_of_a_real_step(name: str) -> None:
    spec = planned(name)
    estimate = step_memory(spec, 2, replace(CONDITIONS, on_gpu=False))
    assert estimate == pytest.approx(peak_of_a_real_step(spec, 2), rel=0.15)


def test_memory_grows_with_batch_patch_optimizer_and_mean_of_weights() -> None:
    spec = planned("plain_unet")
    one = step_memory(spec, 1, CONDITIONS)
    assert step_memory(spec, 2, CONDITIONS) > 1.5 * one
    assert step_memory(planned("plain_unet", (64, 32, 32)), 1, CONDITIONS) > 1.5 * one
    adam = replace(CONDITIONS, recipe=replace(CONDITIONS.recipe, optimizer="adam"))
    assert step_memory(spec, 1, adam) - one == 4 * count_parameters(spec)
    mean = replace(CONDITIONS, recipe=replace(CONDITIONS.recipe, weight_averaging=0.99))
    assert step_memory(spec, 1, mean) - one == 4 * count_parameters(spec)


def test_regions_and_ignored_voxels_can_be_priced() -> None:
    regions = LabelMap(
        values={"background": (0,), "whole": (1, 2), "core": (2,), "ignore": (3,)},
        region_order=(1, 2),
    )
    conditions = replace(CONDITIONS, label_map=regions)
    assert step_memory(planned("lightm_unet_s"), 2, conditions) > 0


def test_streaming_bounds_what_a_block_holds() -> None:
    """Below the size at which blocks are streamed a voxel costs several times more."""
    spec = planned("lightm_unet")
    whole = step_memory(replace(spec, patch_size=(48, 48, 48)), 2, CONDITIONS)
    streamed = step_memory(replace(spec, patch_size=(96, 96, 96)), 2, CONDITIONS)
    assert streamed < 0.7 * 8 * whole


def test_lightm_unet_at_128_cubed_fits_a_24_gb_card() -> None:
    spec = planned("lightm_unet", (128, 128, 128))
    assert step_memory(spec, 1, CONDITIONS) < 20 * 1024**3
