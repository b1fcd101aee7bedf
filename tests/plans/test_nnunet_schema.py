import json
from pathlib import Path
from typing import Any

import pytest

from medmamba.errors import PlanError
from medmamba.plans.budget import Budget, NetworkRules
from medmamba.plans.fingerprint import Fingerprint
from medmamba.plans.nnunet_schema import (
    BLOCK,
    load_plan,
    plan_from_nnunet,
    plan_to_nnunet,
    save_plan,
)
from medmamba.plans.plan import PLAN_VERSION, Plan
from medmamba.plans.planner import make_plan
from medmamba.plans.presets import Preset
from medmamba.plans.schema import plan_schema
from medmamba.preprocessing.recipe import ChannelStatistics

DESCRIPTION = {
    "channel_names": {"0": "CT", "1": "T1"},
    "labels": {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3},
    "regions_class_order": [1, 2],
    "numTraining": 20,
    "file_ending": ".nii.gz",
}


def made_plan(network: str = "plain_unet", **options: Any) -> Plan:
    statistics = ChannelStatistics(
        mean=1.5, median=1.0, std=1.0, min=0.0, max=2.0, percentile_00_5=0.1, percentile_99_5=1.9
    )
    fingerprint = Fingerprint(
        dataset_name="Dataset001_Made",
        spacings_mm=((0.9, 0.8, 3.0),) * 20,
        shapes_after_crop=((300, 280, 90),) * 20,
        intensities=(statistics, statistics),
        median_relative_size_after_cropping=0.5,
    )
    rules = NetworkRules(
        dimensions=frozenset({2, 3}),
        arrange=lambda spec: spec,
        divisor=lambda spec: spec.total_stride,
        memory=lambda spec, batch: 10**8 + batch * 10**9,
    )
    preset = Preset(name=network, network=network, **options)
    return make_plan(fingerprint, DESCRIPTION, preset, Budget(), rules=rules)


@pytest.fixture
def ours() -> Plan:
    return made_plan(
        "lightm_unet_plan",
        mixer="dwconv",
        mirror=False,
        options={"d_state": 8, "order": "raster"},
        training={"optimizer": "adamw", "learning_rate": 0.002, "loss": "tversky"},
    )


def test_a_plan_survives_the_disk(tmp_path: Path, ours: Plan) -> None:
    for plan in (ours, made_plan()):
        save_plan(tmp_path / "plan.json", plan)
        assert load_plan(tmp_path / "plan.json") == plan


def test_the_same_plan_has_the_same_bytes(tmp_path: Path, ours: Plan) -> None:
    save_plan(tmp_path / "one.json", ours)
    save_plan(tmp_path / "two.json", load_plan(tmp_path / "one.json"))
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


def test_another_version_names_both_and_the_command(tmp_path: Path, ours: Plan) -> None:
    content = plan_to_nnunet(ours)
    content[BLOCK]["version"] = PLAN_VERSION + 1
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    expected = (
        rf"version {PLAN_VERSION + 1}, .* version {PLAN_VERSION}\. .*"
        r"medmamba plan .* --network lightm_unet_plan"
    )
    with pytest.raises(PlanError, match=expected) as caught:
        load_plan(path)
    assert caught.value.exit_code == 3


def test_nnunets_own_plans_need_their_description(tmp_path: Path) -> None:
    content = plan_to_nnunet(made_plan())
    del content[BLOCK]
    path = tmp_path / "nnUNetPlans.json"
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=r"dataset\.json is needed"):
        load_plan(path)
    (tmp_path / "dataset.json").write_text(json.dumps(DESCRIPTION))
    found = load_plan(path)
    assert found.network == "plain_unet"
    assert found.label_map == made_plan().label_map
    assert found.configurations["3d_fullres"].training.optimizer == "sgd"


def test_plans_from_before_architectures_are_read() -> None:
    content = plan_to_nnunet(made_plan())
    del content[BLOCK]
    expected = plan_from_nnunet(content, DESCRIPTION)
    for configuration in content["configurations"].values():
        if "architecture" not in configuration:
            continue
        kwargs = configuration.pop("architecture")["arch_kwargs"]
        configuration |= {
            "UNet_class_name": "PlainConvUNet",
            "UNet_base_num_features": 32,
            "unet_max_num_features": max(kwargs["features_per_stage"]),
            "n_conv_per_stage_encoder": kwargs["n_conv_per_stage"],
            "n_conv_per_stage_decoder": kwargs["n_conv_per_stage_decoder"],
            "num_pool_per_axis": [],
            "pool_op_kernel_sizes": kwargs["strides"],
            "conv_kernel_sizes": kwargs["kernel_sizes"],
        }
    assert plan_from_nnunet(content, DESCRIPTION) == expected


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda plan: plan.pop("transpose_forward"), "'transpose_forward' is missing"),
        (
            lambda plan: plan["configurations"]["2d"].update(inherits_from="2d"),
            "inherits from itself",
        ),
        (
            lambda plan: plan["configurations"]["2d"].update(inherits_from="4d"),
            "'4d' does not exist",
        ),
        (
            lambda plan: plan["configurations"]["2d"].update(normalization_schemes=["X", "Y"]),
            "normalisation 'X'",
        ),
        (
            lambda plan: plan["configurations"]["2d"].update(resampling_fn_seg="magic"),
            "resampling 'magic'",
        ),
        (
            lambda plan: plan["configurations"]["2d"]["architecture"].update(
                network_class_name="os.system"
            ),
            "network class 'os.system' is not known",
        ),
        (
            lambda plan: plan[BLOCK]["configurations"]["2d"]["training"].update(momentun=0.9),
            "momentun",
        ),
    ],
)
def test_unusable_plans_name_the_key(change: Any, complaint: str, ours: Plan) -> None:
    content = json.loads(json.dumps(plan_to_nnunet(ours)))
    change(content)
    with pytest.raises(PlanError, match=complaint):
        plan_from_nnunet(content)


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="does not exist"):
        load_plan(tmp_path / "none.json")
    path = tmp_path / "plan.json"
    for text in ("{", "[]"):
        path.write_text(text)
        with pytest.raises(PlanError):
            load_plan(path)


def test_the_committed_schema_is_that_of_the_code() -> None:
    path = Path(__file__).resolve().parents[2] / "plans" / "plan.schema.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(plan_schema()))


def test_the_schema_names_every_key_of_a_plan(ours: Plan) -> None:
    for plan in (ours, made_plan()):
        content = json.loads(json.dumps(plan_to_nnunet(plan)))
        assert missing(content, plan_schema()) == []


def missing(content: Any, schema: dict[str, Any], where: str = "") -> list[str]:
    """Keys of ``content`` that a closed object of ``schema`` does not have."""
    if not isinstance(content, dict):
        return []
    if "anyOf" in schema:
        return min((missing(content, option, where) for option in schema["anyOf"]), key=len)
    known, other = schema.get("properties", {}), schema.get("additionalProperties", True)
    found = []
    for key, value in content.items():
        if key in known:
            found += missing(value, known[key], f"{where}/{key}")
        elif other is False:
            found.append(f"{where}/{key}")
        elif isinstance(other, dict):
            found += missing(value, other, f"{where}/{key}")
    return found
