"""The recipe a run gets is the one that was asked for, and nothing else changes with it."""

import dataclasses

import pytest

from medmamba.errors import UsageError
from medmamba.pipeline.recipes import (
    SHORT_BUDGET_S,
    RecipeChanges,
    choose_recipe,
    mirror_axes,
    short_recipe,
)
from medmamba.plans.presets import load_preset, preset_names, recipe_names
from medmamba.training.losses import LOSSES
from medmamba.training.recipe import TrainingRecipe

PLANNED = load_preset("lightm_unet_s").recipe(batch_size=5, batch_dice=True, dimension=3)


def test_without_changes_the_plan_is_kept() -> None:
    assert choose_recipe(PLANNED, RecipeChanges(), dimension=3) == PLANNED


def test_nnunets_recipe_is_nnunets() -> None:
    found = choose_recipe(PLANNED, RecipeChanges(recipe="nnunet"), dimension=3)
    # The defaults of the recipe are nnU-Net's; what the planner decided stays.
    expected = TrainingRecipe(batch_size=5, batch_dice=True, cpu_batch_size=PLANNED.cpu_batch_size)
    assert found == expected


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_fits_every_network(name: str) -> None:
    found = choose_recipe(PLANNED, RecipeChanges(recipe=name), dimension=2)
    assert found.loss in LOSSES
    assert found.batch_size == 5
    assert found.batch_dice
    assert max(found.mirror_axes, default=0) < 2


def test_single_changes_change_the_named_recipe() -> None:
    changes = RecipeChanges(
        recipe="common",
        augmentation="strong",
        mirror="in-plane",
        dummy_2d="on",
        loss="region_tversky",
        epochs=3,
        batch_size=4,
    )
    found = choose_recipe(PLANNED, changes, dimension=3)
    assert (found.augmentation, found.mirror_axes, found.dummy_2d) == ("strong", (1, 2), True)
    assert (found.loss, found.epochs, found.batch_size) == ("region_tversky", 3, 4)
    assert found.cpu_batch_size is None
    assert found.optimizer == "adamw"


def test_a_file_can_be_the_recipe(tmp_path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('mirror = false\n[training]\noptimizer = "sgd"\nmomentum = 0.9\n')
    found = choose_recipe(PLANNED, RecipeChanges(recipe=str(path)), dimension=3)
    assert (found.optimizer, found.momentum, found.mirror_axes) == ("sgd", 0.9, ())
    path.write_text("[training]\nspeed = 3\n")
    with pytest.raises(UsageError, match=r"mine\.toml.*'speed'"):
        choose_recipe(PLANNED, RecipeChanges(recipe=str(path)), dimension=3)
    with pytest.raises(UsageError, match=r"absent\.toml.*cannot be read"):
        choose_recipe(PLANNED, RecipeChanges(recipe=str(tmp_path / "absent.toml")), dimension=3)


@pytest.mark.parametrize(
    ("text", "dimension", "axes"),
    [("all", 3, (0, 1, 2)), ("none", 3, ()), ("in-plane", 3, (1, 2)), ("in-plane", 2, (0, 1)),
     ("2,0", 3, (0, 2)), ("1", 2, (1,))],
)  # fmt: skip
def test_mirror_axes(text: str, dimension: int, axes: tuple[int, ...]) -> None:
    assert mirror_axes(text, dimension) == axes


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"recipe": "sota"}, "'sota' does not exist.*common.*nnunet.*plain_unet"),
        ({"loss": "hinge"}, "'hinge'.*dice_ce"),
        ({"augmentation": "wild"}, "'wild'.*strong"),
        ({"mirror": "3"}, "'3'.*in-plane"),
        ({"mirror": "up"}, "'up'.*in-plane"),
        ({"dummy_2d": "maybe"}, "'maybe'.*auto"),
    ],
)
def test_what_does_not_exist_is_named_with_what_does(changes: dict, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        choose_recipe(PLANNED, RecipeChanges(**changes), dimension=3)


def test_a_recipe_is_a_value() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLANNED.epochs = 1


def test_a_short_run_on_a_cpu_takes_the_presets_short_recipe() -> None:
    assert short_recipe("plain_unet", SHORT_BUDGET_S, on_cpu=True) == "short"
    assert short_recipe("plain_unet", SHORT_BUDGET_S + 1, on_cpu=True) is None
    assert short_recipe("plain_unet", None, on_cpu=True) is None
    assert short_recipe("plain_unet", 60.0, on_cpu=False) is None
    assert short_recipe("lightm_unet_s", 60.0, on_cpu=True) is None
    assert short_recipe("an imported plan", 60.0, on_cpu=True) is None


def test_short_recipes_of_presets_exist() -> None:
    named = {load_preset(name).short_recipe for name in preset_names()}
    assert named <= {None, *recipe_names()}
