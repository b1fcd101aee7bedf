"""Losses: golden values and gradients, ignore label, regions, and what every loss must obey."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional

from medmamba.errors import UsageError
from medmamba.labels import LabelMap
from medmamba.training.losses import (
    LOSSES,
    DeepSupervision,
    LossSettings,
    SumLoss,
    build_loss,
    deep_supervision_weights,
    region_targets,
    region_tversky,
    resize_nearest_exact,
)

CLASS_LOSSES = sorted(set(LOSSES) - {"dice_bce"})
REGION_LOSSES = sorted(set(LOSSES) - {"region_tversky"})
GRID = {"grid": (2, 2, 2)}


def options_of(name: str) -> dict:
    return GRID if name == "region_tversky" else {}


def value_and_gradient(loss, logits, target):
    logits = logits.clone().requires_grad_(True)
    value = loss(logits, target)
    value.backward()
    return value.detach(), logits.grad


def test_compound_losses_equal_the_golden_values(fixtures_dir: Path) -> None:
    folder = fixtures_dir / "preprocess" / "rules"
    if not (folder / "losses.json").exists():
        pytest.skip("no golden losses in the fixtures folder")
    arrays = np.load(folder / "losses.npz")
    cases = json.loads((folder / "losses.json").read_text())["losses"]
    assert cases
    for case in cases:
        regions = "regions" in case["kind"]
        ignore = case["ignore"]
        loss_settings = LossSettings(
            regions=regions,
            ignore_value=None if regions else ignore,
            has_ignore=bool(ignore),
            batch_dice=case["batch_dice"],
        )
        loss = build_loss("dice_bce" if regions else "dice_ce", loss_settings)
        logits = torch.from_numpy(arrays[f"{case['arrays']}_logits"])
        target = torch.from_numpy(arrays[f"{case['arrays']}_target"])
        value, gradient = value_and_gradient(loss, logits, target)
        assert value.item() == pytest.approx(case["value"], rel=1e-5), case
        assert gradient.norm().item() == pytest.approx(case["grad_l2"], rel=1e-5), case


def test_deep_supervision_weights_equal_the_golden_ones(fixtures_dir: Path) -> None:
    path = fixtures_dir / "preprocess" / "rules" / "losses.json"
    if not path.exists():
        pytest.skip("no golden losses in the fixtures folder")
    for weights in json.loads(path.read_text())["deep_supervision_weights_by_outputs"]:
        assert deep_supervision_weights(len(weights)) == pytest.approx(weights, rel=1e-12)


def test_region_tversky_equals_the_golden_values_and_gradients(fixtures_dir: Path) -> None:
    cases = sorted(fixtures_dir.glob("losses/*/case.json"))
    if not cases:
        pytest.skip("no golden losses in the fixtures folder")
    for path in cases:
        case = json.loads(path.read_text())
        tensors = load_file(path.with_name("io.safetensors"))
        loss_settings = LossSettings(
            batch_dice=case["batch_dice"],
            ignore_value=case["ignore_label"],
            options={"grid": tuple(case["num_region_per_axis"])},
        )
        alone = SumLoss(loss_settings, [(1.0, region_tversky)])
        for loss, name in (
            (alone, "rs"),
            (build_loss("region_tversky", loss_settings), "compound"),
        ):
            value, gradient = value_and_gradient(loss, tensors["logits"], tensors["target"])
            assert value.item() == pytest.approx(case[f"{name}_loss"], rel=1e-8), path
            torch.testing.assert_close(gradient, tensors[f"{name}_grad"], rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("name", CLASS_LOSSES)
@pytest.mark.parametrize("batch_dice", [False, True])
def test_a_perfect_prediction_is_the_minimum(name: str, batch_dice: bool) -> None:
    target = torch.randint(0, 3, (2, 1, 6, 6, 6), generator=torch.Generator().manual_seed(1))
    perfect = functional.one_hot(target[:, 0], 3).movedim(-1, 1).float() * 60 - 30
    loss = build_loss(name, LossSettings(batch_dice=batch_dice, options=options_of(name)))
    best = loss(perfect, target)
    generator = torch.Generator().manual_seed(2)
    for strength in (1.0, 20.0, 60.0):
        other = perfect + strength * torch.randn(perfect.shape, generator=generator)
        assert best <= loss(other, target) + 1e-6


@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_ignored_voxels_have_no_gradient(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn((2, 3, 4, 6, 5), generator=generator)
    target = torch.randint(0, 4, (2, 1, 4, 6, 5), generator=generator)
    loss = build_loss(name, LossSettings(ignore_value=3, options=options_of(name)))
    value, gradient = value_and_gradient(loss, logits, target)
    ignored = (target == 3).expand_as(logits)
    assert gradient[ignored].abs().max() == 0
    assert gradient[~ignored].abs().min() > 0
    changed = torch.where(ignored, 7.0 * torch.randn(logits.shape, generator=generator), logits)
    assert loss(changed, target).item() == pytest.approx(value.item(), rel=1e-6)


@pytest.mark.parametrize("name", REGION_LOSSES)
def test_ignored_voxels_of_regions_have_no_gradient(name: str) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn((2, 2, 4, 6, 5), generator=generator)
    target = torch.randint(0, 2, (2, 3, 4, 6, 5), generator=generator)
    loss = build_loss(name, LossSettings(regions=True, has_ignore=True))
    _, gradient = value_and_gradient(loss, logits, target)
    assert gradient[(target[:, -1:] == 1).expand_as(logits)].abs().max() == 0


@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_nothing_annotated_and_empty_foreground_stay_finite(name: str) -> None:
    loss = build_loss(name, LossSettings(ignore_value=3, options=options_of(name)))
    logits = torch.randn((1, 3, 4, 4, 4), generator=torch.Generator().manual_seed(5))
    for value in (0, 3):
        target = torch.full((1, 1, 4, 4, 4), value)
        total, gradient = value_and_gradient(loss, logits, target)
        assert torch.isfinite(total)
        assert torch.isfinite(gradient).all()


def test_losses_compute_in_float32_under_autocast() -> None:
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn((1, 3, 8, 8, 8), generator=generator).bfloat16()
    target = torch.randint(0, 3, (1, 1, 8, 8, 8), generator=generator)
    loss = build_loss("dice_ce", LossSettings())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(logits, target)
    assert value.dtype == torch.float32
    assert value.item() == loss(logits.float(), target).item()


def test_the_official_region_loss_takes_ignored_voxels_as_background() -> None:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn((1, 3, 4, 4, 4), generator=generator)
    target = torch.randint(0, 4, (1, 1, 4, 4, 4), generator=generator)

    def term(ignore: int | None, labels, **options):
        loss_settings = LossSettings(ignore_value=ignore, options={**GRID, **options})
        return SumLoss(loss_settings, [(1.0, region_tversky)])(logits, labels).item()

    as_background = torch.where(target == 3, 0, target)
    assert term(3, target, official_ignore=True) == term(None, as_background)
    assert term(3, target) != term(None, as_background)


def test_deep_supervision_weighs_and_resizes() -> None:
    generator = torch.Generator().manual_seed(8)
    target = torch.randint(0, 3, (1, 1, 8, 8, 6), generator=generator)
    outputs = [
        torch.randn((1, 3, *s), generator=generator) for s in [(8, 8, 6), (4, 4, 3), (2, 2, 3)]
    ]
    loss = build_loss("dice_ce", LossSettings())
    half = target[:, :, 1::2, 1::2, 1::2]
    expected = (2 * loss(outputs[0], target) + loss(outputs[1], half)) / 3
    assert DeepSupervision(loss)(outputs, target).item() == pytest.approx(expected.item(), rel=1e-6)
    alone = DeepSupervision(loss)(outputs[:1], target)
    assert alone.item() == pytest.approx(loss(outputs[0], target).item(), rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 17), min_size=2, max_size=3), st.data())
def test_resizing_targets_is_nearest_exact(shape: list[int], data: st.DataObject) -> None:
    new = [data.draw(st.integers(1, size)) for size in shape]
    values = torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(1, 1, *shape)
    expected = functional.interpolate(values, size=new, mode="nearest-exact")
    assert torch.equal(resize_nearest_exact(values.to(torch.int16), new), expected.to(torch.int16))


def test_region_targets_are_memberships() -> None:
    label_map = LabelMap(
        values={"background": (0,), "whole": (1, 2), "core": (2,), "ignore": (3,)},
        region_order=(1, 2),
    )
    labels = torch.tensor([0, 1, 2, 3]).reshape(1, 1, 4)
    expected = [[0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert region_targets(labels, label_map)[0].int().tolist() == expected


def test_losses_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="'nothing' does not exist"):
        build_loss("nothing", LossSettings())
    with pytest.raises(UsageError, match="region_tversky"):
        build_loss("region_tversky", LossSettings(regions=True))
    with pytest.raises(UsageError, match="dice_bce"):
        build_loss("dice_bce", LossSettings())
    with pytest.raises(UsageError, match="unknown option 'gird'"):
        build_loss("region_tversky", LossSettings(options={"gird": (1, 1, 1)}))
    with pytest.raises(UsageError, match="'grid'"):
        build_loss("region_tversky", LossSettings(options={"grid": (1, 1)}))(
            torch.zeros(1, 2, 4, 4, 4), torch.zeros(1, 1, 4, 4, 4)
        )
