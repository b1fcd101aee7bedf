"""Networks are planned with other options, or as their twins, and the plan holds that."""

from pathlib import Path

import pytest

from medmamba.cli.plan import parse_options
from medmamba.errors import PlanError, UsageError
from medmamba.pipeline.planning import plan
from medmamba.plans.nnunet_schema import load_plan


def test_options_and_mixer_reach_the_plan(ellipsoids: Path, tmp_path: Path) -> None:
    options = parse_options(["order=bidirectional", "merge=mean", "d_state=8"])
    plan(ellipsoids, tmp_path / "work", options=options, mixer="dwconv", until="plan")
    stored = load_plan(tmp_path / "work" / "plans" / "lightm_unet_s.json")
    spec = stored.configurations["3d_fullres"].network
    assert spec.mixer == "dwconv"
    assert {key: spec.options[key] for key in options} == {
        "order": "bidirectional",
        "merge": "mean",
        "d_state": 8,
    }


@pytest.mark.parametrize(
    ("network", "option", "message"),
    [
        ("plain_unet", "order=cross", "no option 'order'"),
        ("lightm_unet_s", "order=zigzag", "'zigzag' does not exist"),
    ],
)
def test_options_a_network_does_not_have_are_refused_when_planning(
    ellipsoids: Path, tmp_path: Path, network: str, option: str, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        plan(
            ellipsoids, tmp_path / "w", network=network, options=parse_options([option]),
            until="plan",
        )  # fmt: skip
    assert not list((tmp_path / "w").glob("plans/*.json"))


@pytest.mark.parametrize("text", ["order", "=cross", "order="])
def test_options_without_key_or_value_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="KEY=VALUE"):
        parse_options([text])


def test_values_are_read_as_toml_and_words_as_text() -> None:
    assert parse_options(["a=1", "b=0.5", "c=true", "d=cross", 'e="x y"', "f=[1, 2]"]) == {
        "a": 1, "b": 0.5, "c": True, "d": "cross", "e": "x y", "f": [1, 2],
    }  # fmt: skip
