import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmamba.errors import PlanError
from medmamba.networks.spec import NetworkSpec
from medmamba.plans.budget import GIB, Budget, NetworkRules
from medmamba.plans.fingerprint import Fingerprint, fingerprint_from_nnunet
from medmamba.plans.nnunet_schema import BLOCK, plan_from_nnunet, plan_to_nnunet
from medmamba.plans.plan import Plan
from medmamba.plans.planner import make_plan
from medmamba.plans.presets import Preset
from medmamba.plans.sizing import NNUNET_PLANNERS
from medmamba.preprocessing.recipe import ChannelStatistics

FLOAT_TOLERANCE = 1e-9
DESCRIPTION = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "organ": 1, "tumour": 2},
    "numTraining": 20,
    "file_ending": ".nii.gz",
}


def golden_cases(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every golden plan with the fingerprint and description it was made from."""
    cases = [
        (path.stem, json.loads(path.read_text())) for path in sorted(folder.glob("sweep/*.json"))
    ]
    for path in sorted(folder.glob("*/nnUNet*Plans*.json")):
        content = {
            "fingerprint": json.loads((path.parent / "dataset_fingerprint.json").read_text()),
            "dataset_json": json.loads((path.parent / "dataset.json").read_text()),
            "plans": json.loads(path.read_text()),
        }
        cases.append((f"{path.parent.name}/{path.stem}", content))
    if not cases:
        pytest.skip(f"no golden plans under {folder}")
    return cases


def plan_golden(content: dict[str, Any]) -> Plan:
    plans = content["plans"]
    planner = plans["experiment_planner_used"]
    network = "resenc_unet" if NNUNET_PLANNERS[planner].residual else "plain_unet"
    return make_plan(
        fingerprint_from_nnunet(content["fingerprint"], plans["dataset_name"]),
        content["dataset_json"],
        Preset(name=network, network=network),
        Budget(
            planner=planner,
            spacing_mm=forced_spacing(content),
            memory_gb=content.get("options", {}).get("gpu_memory_target_in_gb"),
        ),
        plans_name=plans["plans_name"],
    )


def forced_spacing(content: dict[str, Any]) -> tuple[float, ...] | None:
    """The spacing a golden plan was made with, where the user chose one."""
    if "options" in content:
        asked = content["options"].get("overwrite_target_spacing")
        return None if asked is None else tuple(asked)
    plans = content["plans"]
    usual = NNUNET_PLANNERS[plans["experiment_planner_used"]].plans_name
    if plans["plans_name"] == usual or "3d_fullres" not in plans["configurations"]:
        return None
    turned = plans["configurations"]["3d_fullres"]["spacing"]
    return tuple(turned[axis] for axis in plans["transpose_backward"])


def differences(found: Any, golden: Any, where: str = "") -> list[str]:
    if isinstance(golden, dict):
        if not isinstance(found, dict) or list(found) != list(golden):
            return [f"{where}: keys {list(found)} instead of {list(golden)}"]
        return [d for key in golden for d in differences(found[key], golden[key], f"{where}/{key}")]
    if isinstance(golden, list):
        if not isinstance(found, list) or len(found) != len(golden):
            return [f"{where}: {found} instead of {golden}"]
        pairs = enumerate(zip(found, golden, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{where}[{i}]")]
    if isinstance(golden, float):
        same = type(found) is float and found == pytest.approx(golden, rel=FLOAT_TOLERANCE)
    else:
        same = type(found) is type(golden) and found == golden
    return [] if same else [f"{where}: {found!r} instead of {golden!r}"]


def test_plans_equal_nnunets_key_for_key(fixtures_dir: Path) -> None:
    for name, content in golden_cases(fixtures_dir / "plans"):
        found = json.loads(json.dumps(plan_to_nnunet(plan_golden(content))))
        del found[BLOCK]
        assert differences(found, content["plans"]) == [], name


def test_nnunets_own_plans_are_read_as_the_same_plan(fixtures_dir: Path) -> None:
    for name, content in golden_cases(fixtures_dir / "plans"):
        ours = plan_golden(content)
        theirs = plan_from_nnunet(content["plans"], content["dataset_json"])
        for key, configuration in ours.configurations.items():
            assert replace(theirs.configurations[key], training=configuration.training) == (
                configuration
            ), name
            assert theirs.configurations[key].training == configuration.training
        assert theirs.label_map == ours.label_map
        assert theirs.channel_names == ours.channel_names


def test_every_decision_has_a_reason(fixtures_dir: Path) -> None:
    for name, content in golden_cases(fixtures_dir / "plans"):
        plan = plan_golden(content)
        topics = [reason.topic for reason in plan.reasons]
        assert len(set(topics)) == len(topics), name
        expected = {"spacing", "axis order"}
        expected |= {f"normalisation of channel {i}" for i in range(len(plan.channel_names))}
        for key in plan.configurations:
            expected |= {f"{key}: {what}" for what in ("patch", "batch", "strides", "memory")}
        assert expected <= set(topics), name
        assert all(reason.value and reason.why for reason in plan.reasons)


def fingerprint_of(
    spacing: tuple[float, float, float], shape: tuple[int, int, int], *, cases: int = 20
) -> Fingerprint:
    statistics = ChannelStatistics(
        mean=1.0, median=1.0, std=1.0, min=0.0, max=2.0, percentile_00_5=0.0, percentile_99_5=2.0
    )
    return Fingerprint(
        dataset_name="Dataset001_Made",
        spacings_mm=(spacing,) * cases,
        shapes_after_crop=(shape,) * cases,
        intensities=(statistics,),
        median_relative_size_after_cropping=1.0,
    )


PLAIN = Preset(name="plain_unet", network="plain_unet")
SPACINGS = st.tuples(*[st.floats(0.3, 6.0)] * 3)
SHAPES = st.tuples(*[st.integers(9, 400)] * 3)


@settings(max_examples=15, deadline=None)
@given(spacing=SPACINGS, shape=SHAPES, more=st.floats(1.0, 8.0))
def test_invariants_of_plans(
    spacing: tuple[float, float, float], shape: tuple[int, int, int], more: float
) -> None:
    fingerprint = fingerprint_of(spacing, shape)
    plan = make_plan(fingerprint, DESCRIPTION, PLAIN, Budget())
    larger = make_plan(fingerprint, DESCRIPTION, PLAIN, Budget(memory_gb=8 * more))
    for name, configuration in plan.configurations.items():
        network, patch = configuration.network, configuration.grid.patch_size
        assert all(p % s == 0 for p, s in zip(patch, network.total_stride, strict=True))
        assert network.patch_size == patch
        assert configuration.training.batch_size >= 2
        if name in ("2d", "3d_fullres"):
            assert prod(larger.configurations[name].grid.patch_size) >= prod(patch)
    assert plan_from_nnunet(json.loads(json.dumps(plan_to_nnunet(plan)))) == plan
    assert make_plan(fingerprint, DESCRIPTION, PLAIN, Budget()) == plan


def rules(bytes_per_voxel: int, *, multiple: int = 8, only: set[int] | None = None) -> NetworkRules:
    """A network with fixed strides of 2, priced by voxels."""

    def arrange(spec: NetworkSpec) -> NetworkSpec:
        dimension = spec.dimension
        return replace(
            spec,
            features=(8, 16, 32, 64),
            strides=((1,) * dimension, *[(2,) * dimension] * 3),
            kernel_sizes=((3,) * dimension,) * 4,
            encoder_blocks=(1,) * 4,
            decoder_blocks=(1,) * 3,
        )

    return NetworkRules(
        dimensions=frozenset(only or {2, 3}),
        arrange=arrange,
        divisor=lambda spec: (multiple,) * spec.dimension,
        memory=lambda spec, batch: 10**8 + batch * bytes_per_voxel * prod(spec.patch_size),
    )


OURS = Preset(name="lightm_unet_s", network="lightm_unet_s", training={"optimizer": "adamw"})


def test_other_networks_are_sized_by_their_own_price_and_divisor() -> None:
    fingerprint = fingerprint_of((1.0, 1.0, 1.0), (300, 300, 300))
    plans = {
        gb: make_plan(fingerprint, DESCRIPTION, OURS, Budget(memory_gb=gb), rules=rules(2000))
        for gb in (8, 24)
    }
    sizes = {}
    for gb, plan in plans.items():
        full = plan.configurations["3d_fullres"]
        assert full.memory_bytes is not None
        assert full.memory_bytes <= gb * GIB
        assert all(edge % 8 == 0 for edge in full.grid.patch_size)
        assert full.network.features == (8, 16, 32, 64)
        assert full.training.optimizer == "adamw"
        sizes[gb] = prod(full.grid.patch_size)
        one_step_more = prod(edge + 8 for edge in full.grid.patch_size)
        assert 10**8 + 2 * 2000 * one_step_more > gb * GIB
    assert sizes[24] > 2 * sizes[8]


def test_layouts_with_too_few_resolutions_are_never_priced() -> None:
    def memory(spec: NetworkSpec, batch: int) -> int:
        if spec.stages < 4:
            raise AssertionError(f"priced {spec.stages} stages")
        return batch * 2 * GIB

    def follows_the_plan(fewest: int) -> NetworkRules:
        return NetworkRules(
            dimensions=frozenset({3}),
            arrange=lambda spec: spec,
            divisor=lambda spec: spec.total_stride,
            memory=memory,
            fewest_stages=fewest,
        )

    fingerprint = fingerprint_of((1.0, 1.0, 1.0), (40, 56, 40))
    plan = make_plan(fingerprint, DESCRIPTION, OURS, Budget(), rules=follows_the_plan(4))
    assert plan.configurations["3d_fullres"].grid.patch_size == (40, 56, 40)
    with pytest.raises(PlanError, match=r"needs 6 resolutions, but a patch of \[40, 56, 40\]"):
        make_plan(fingerprint, DESCRIPTION, OURS, Budget(), rules=follows_the_plan(6))


def test_anisotropic_data_keep_their_proportions_under_another_price() -> None:
    fingerprint = fingerprint_of((5.0, 0.8, 0.8), (40, 400, 400))
    plan = make_plan(fingerprint, DESCRIPTION, OURS, Budget(memory_gb=8), rules=rules(3000))
    depth, height, width = plan.configurations["3d_fullres"].grid.patch_size
    assert height == width
    assert depth < height


def test_no_patch_fits_the_memory() -> None:
    fingerprint = fingerprint_of((1.0, 1.0, 1.0), (64, 64, 64))
    with pytest.raises(PlanError, match=r"smallest patch .* needs .* GB, the budget is 8 GB"):
        make_plan(fingerprint, DESCRIPTION, OURS, Budget(), rules=rules(10**8))


def test_a_network_without_the_datasets_dimension() -> None:
    flat = fingerprint_of((999.0, 1.0, 1.0), (1, 256, 256))
    with pytest.raises(PlanError, match="3D only"):
        make_plan(flat, DESCRIPTION, OURS, Budget(), rules=rules(100, only={3}))
    deep = fingerprint_of((1.0, 1.0, 1.0), (64, 64, 64))
    plan = make_plan(deep, DESCRIPTION, OURS, Budget(), rules=rules(100, only={2}))
    assert list(plan.configurations) == ["2d"]


def test_on_a_cpu_the_patch_is_bounded() -> None:
    fingerprint = fingerprint_of((1.0, 1.0, 1.0), (300, 300, 300))
    for preset, own in ((PLAIN, None), (OURS, rules(100))):
        gpu = make_plan(fingerprint, DESCRIPTION, preset, Budget(memory_gb=24), rules=own)
        cpu = make_plan(
            fingerprint, DESCRIPTION, preset, Budget(memory_gb=24, device="cpu"), rules=own
        )
        assert prod(cpu.configurations["3d_fullres"].grid.patch_size) <= 80**3
        assert prod(gpu.configurations["3d_fullres"].grid.patch_size) > 80**3


def test_residual_planner_follows_the_memory() -> None:
    fingerprint = fingerprint_of((1.0, 1.0, 1.0), (200, 200, 200))
    preset = Preset(name="resenc_unet", network="resenc_unet", planner="nnUNetPlannerResEncM")
    for memory, planner in ((8, "M"), (24, "L"), (40, "XL"), (80, "XL")):
        plan = make_plan(fingerprint, DESCRIPTION, preset, Budget(memory_gb=memory))
        assert plan.planner == f"nnUNetPlannerResEnc{planner}"


def test_cascade_takes_the_labels_of_the_lower_resolution() -> None:
    fingerprint = fingerprint_of((1.0, 1.0, 1.0), (500, 500, 500))
    plan = make_plan(fingerprint, DESCRIPTION, PLAIN, Budget())
    assert list(plan.configurations) == ["2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres"]
    cascade = plan.configurations["3d_cascade_fullres"]
    assert cascade.network.in_channels == 1 + 2
    assert cascade.previous_stage == "3d_lowres"
    assert plan.configurations["3d_lowres"].next_stage == "3d_cascade_fullres"


def test_channels_that_do_not_fit_the_fingerprint() -> None:
    description = {**DESCRIPTION, "channel_names": {"0": "CT", "1": "PET"}}
    with pytest.raises(PlanError, match="fingerprint has 1 channels"):
        make_plan(fingerprint_of((1, 1, 1), (50, 50, 50)), description, PLAIN, Budget())
