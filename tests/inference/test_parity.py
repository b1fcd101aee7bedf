import dataclasses
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.stats import poisson
from torch import Tensor, nn

import medmamba
from medmamba.bundle import load_bundle, save_bundle
from medmamba.errors import BundleError, SecurityError
from medmamba.inference.parity import (
    CHANCE,
    compare_precisions,
    compare_with,
    most_by_chance,
)
from medmamba.inference.predictor import PredictionSettings, Predictor
from medmamba.inference.probe import pack, unpack
from medmamba.labels import LabelMap
from medmamba.networks import build_network
from medmamba.pipeline import predictors as predictors_module
from medmamba.pipeline.predictors import check_parity, make_predictor
from medmamba.preprocessing.recipe import ChannelRecipe, Normalization, PreprocessingRecipe
from medmamba.training.precision import has_native_bf16
from medmamba.volume import Geometry, Grid, Volume
from tests.test_bundle import tiny_plan

CLASSES = LabelMap(values={"background": (0,), "bright": (1,)})
REGIONS = LabelMap(values={"background": (0,), "whole": (1, 2), "core": (2,)}, region_order=(1, 2))
RECIPE = PreprocessingRecipe(
    channels=(ChannelRecipe(normalization=Normalization.ZSCORE),), transpose_forward=(0, 1, 2)
)


class Wavering(nn.Module):
    """Foreground above the mean; under autocast logits differ by ``error``."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            x = x + self.error
        return torch.cat([-x, x], dim=1)


class OneSided(Wavering):
    """As sure as can be of each half of a patch, for a reason that mirroring takes away."""

    def forward(self, x: Tensor) -> Tensor:
        sides = torch.sign(torch.arange(x.shape[-1]) - (x.shape[-1] - 1) / 2)
        return super().forward(x) + torch.stack([-100 * sides, 100 * sides])[:, None, None]


def predictors(
    network: nn.Module, label_map: LabelMap = CLASSES, mirror_axes: tuple[int, ...] = ()
) -> list[Predictor]:
    return [
        Predictor(
            [network],
            grid=Grid(spacing_mm=(1.0, 1.0, 1.0), patch_size=(16, 16, 16)),
            preprocessing=RECIPE,
            label_map=label_map,
            settings=PredictionSettings(precision=precision, mirror_axes=mirror_axes),
        )
        for precision in ("fp32", "bf16")
    ]


def image(size: int = 16) -> Volume:
    voxels = np.random.default_rng(0).normal(100, 5, (1, size, size, size)).astype(np.float32)
    return Volume(array=voxels, geometry=Geometry.from_spacing((size,) * 3, (1.0, 1.0, 1.0)))


@pytest.mark.parametrize("label_map", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_what_says_the_same_passes(label_map: LabelMap) -> None:
    found = compare_precisions(*predictors(Wavering(0.0), label_map), image())
    assert found.passed
    assert set(found.dice.values()) == {1.0}
    assert (found.changed, found.voxels, found.logits_error) == (0, 16**3, 0.0)


def test_a_small_error_that_moves_labels_fails() -> None:
    # A shift of 0.04 deviations changes 1.6 % of the voxels, though logits are nearly right.
    found = compare_precisions(*predictors(Wavering(0.04)), image())
    assert found.logits_error < 0.05
    assert not found.passed
    assert found.dice["bright"] < 0.99
    assert found.changed > 0.01 * found.voxels


def test_few_changes_of_a_small_probe_are_within_its_chance() -> None:
    found = compare_precisions(*predictors(Wavering(0.001)), image())
    assert found.passed
    assert 0 < found.changed < 10


def test_a_model_is_judged_with_the_flips_that_will_be_averaged(tmp_path, monkeypatch) -> None:
    network = OneSided(0.04)
    assert compare_precisions(*predictors(network), image()).passed
    assert not compare_precisions(*predictors(network, mirror_axes=(2,)), image()).passed

    seen: list[tuple[int, ...]] = []

    def spy(full: Predictor, reduced: Predictor, probe: Volume) -> Any:
        seen.extend(each.settings.mirror_axes for each in (full, reduced))
        return compare_precisions(full, reduced, probe)

    monkeypatch.setattr("medmamba.inference.parity.compare_precisions", spy)
    bundle = load_bundle(random_model(tmp_path / "model"))
    for mirror in (True, False):
        used = make_predictor(bundle, device="cpu", precision="bf16", mirror=mirror).settings
        assert seen == [used.mirror_axes, used.mirror_axes]
        assert bool(used.mirror_axes) is mirror
        seen.clear()


@pytest.mark.parametrize("usual", [0.5, 1.67, 20.0, 499.0, 501.0])
def test_counts_are_judged_as_counts(usual: float) -> None:
    assert abs(most_by_chance(usual) - poisson.ppf(1 - CHANCE, usual)) <= (usual > 500)


def test_logits_that_are_not_finite_fail() -> None:
    assert not compare_precisions(*predictors(Wavering(float("inf"))), image()).passed


def random_model(folder: Path) -> Path:
    """A model that guesses, so that rounding decides many of its labels."""
    torch.manual_seed(0)
    network = build_network(tiny_plan().configurations["3d_fullres"].network)
    weights = {name: torch.full_like(value, 0.01 if value.ndim == 1 else 0) + 0.02 * value
               for name, value in network.state_dict().items()}  # fmt: skip
    save_bundle(
        folder, plan=tiny_plan(), configuration="3d_fullres", weights=[weights],
        reference_case=False,
    )  # fmt: skip
    return folder


def test_a_model_that_fails_predicts_in_fp32_and_says_so(tmp_path: Path) -> None:
    model = random_model(tmp_path / "model")
    (gate,) = check_parity(model, "bf16", "cpu")
    assert not gate.passed
    (tmp_path / "in").mkdir()
    voxels = np.random.default_rng(1).normal(100, 5, (12, 12, 12)).astype(np.float32)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "in" / "a_0000.nii.gz")
    told: list[str] = []
    for precision in ("bf16", "fp32"):
        medmamba.predict(
            tmp_path / "in", tmp_path / precision, model, precision=precision, device="cpu",
            supervised=False, on_message=told.append,
        )  # fmt: skip
    assert "in fp32" in told[0]
    assert "parity gate of bf16 failed" in told[0]
    records = [
        json.loads((tmp_path / precision / "a.json").read_text()) for precision in ("bf16", "fp32")
    ]
    assert records[0]["parameters"] == records[1]["parameters"]
    assert records[0]["parameters"]["precision"] == "fp32"
    assert records[0]["numerics"]["parity"]["passed"] is False
    assert "parity" not in records[1]["numerics"]
    assert any("fp32 instead of bf16" in text for text in records[0]["warnings"])
    assert records[0]["output"]["sha256"] == records[1]["output"]["sha256"]


def test_a_free_choice_that_ends_in_fp32_is_told_but_no_fallback(tmp_path: Path) -> None:
    model = random_model(tmp_path / "model")
    bundle = dataclasses.replace(
        load_bundle(model), manifest=dataclasses.replace(load_bundle(model).manifest,
        precision="bf16"),
    )  # fmt: skip
    if not has_native_bf16(torch.device("cpu")):
        pytest.skip("no native bf16: auto never tries it")
    predictor = make_predictor(bundle, device="cpu")
    assert predictor.settings.precision == "fp32"
    assert not predictor.numerics()["parity"]["passed"]
    found = predictor.restore(predictor.infer(predictor.prepare(image())))
    assert found.fallbacks == ()
    asked = make_predictor(bundle, device="cpu", precision="bf16")
    assert asked.restore(asked.infer(asked.prepare(image()))).fallbacks


@pytest.mark.parametrize("label_map", [CLASSES, REGIONS], ids=["classes", "regions"])
@pytest.mark.parametrize("error", [0.0, 0.04])
def test_what_was_stored_is_judged_like_what_is_computed(label_map: LabelMap, error: float) -> None:
    full, reduced = predictors(Wavering(error), label_map)
    logits = full.logits(full.prepare(image(24))).numpy()
    probe = pack(logits, label_map, pattern_version=1, mirror_axes=(), folds=1)
    found = compare_with(unpack(probe, label_map), reduced, image(24))
    live = compare_precisions(full, reduced, image(24))
    assert found.logits_error == pytest.approx(live.logits_error, rel=0.05, abs=1e-5)
    assert dataclasses.replace(found, logits_error=live.logits_error) == live
    with pytest.raises(BundleError, match="sizes"):
        unpack(dataclasses.replace(probe, shape=(2, 8, 8, 8)), label_map)


def test_a_models_gate_takes_what_travels_with_it(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "model"
    torch.manual_seed(0)
    plan = tiny_plan()
    state = build_network(plan.configurations["3d_fullres"].network).state_dict()
    save_bundle(folder, plan=plan, configuration="3d_fullres", weights=[state])
    stored = [check_parity(folder, "bf16", "cpu", mirror=mirror) for mirror in (False, True)]
    monkeypatch.setattr(predictors_module, "load_expected", lambda *_, **__: None)
    computed = [check_parity(folder, "bf16", "cpu", mirror=mirror) for mirror in (False, True)]
    for (one,), (other,) in zip(stored, computed, strict=True):
        assert one.logits_error == pytest.approx(other.logits_error, rel=0.05)
        assert dataclasses.replace(one, logits_error=other.logits_error) == other
    (folder / "parity.json").write_text((folder / "parity.json").read_text().replace("1", "2"))
    with pytest.raises(SecurityError, match=r"parity\.json"):
        load_bundle(folder)
    (folder / "parity.json").unlink()
    monkeypatch.undo()
    assert check_parity(folder, "bf16", "cpu", mirror=True) == computed[1]
