"""Which recipe a run is trained by: the plan's, or another one by name, with single changes."""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from medmamba.errors import UsageError
from medmamba.plans.presets import load_preset, load_recipe, preset_names

if TYPE_CHECKING:
    from medmamba.training.recipe import TrainingRecipe

Mirror = str
"""``all``, ``none``, ``in-plane``, or axis numbers such as ``0,2``."""

SHORT_BUDGET_S = 3600.0
"""Up to this budget a CPU makes a few thousand steps, where nnU-Net plans 250,000."""

DUMMY_2D = {"auto": None, "on": True, "off": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeChanges:
    """What a user wants otherwise than planned; None keeps the plan's.

    Args:
        recipe: name of another recipe, or a ``.toml`` file; the rest changes that one then.
        epochs, iterations: length of a run without a time budget.
        batch_size: patches per step.
        loss: key of ``medmamba.training.losses.LOSSES``.
        augmentation: ``default``, ``strong`` or ``none``.
        mirror: axes that may be flipped: ``all``, ``none``, ``in-plane`` or numbers.
        dummy_2d: whether the first axis is augmented apart: ``auto``, ``on`` or ``off``.
    """

    recipe: str | None = None
    epochs: int | None = None
    iterations: int | None = None
    batch_size: int | None = None
    loss: str | None = None
    augmentation: Literal["default", "strong", "none"] | str | None = None
    mirror: Mirror | None = None
    dummy_2d: Literal["auto", "on", "off"] | str | None = None


def short_recipe(network: str, max_time_s: float | None, *, on_cpu: bool) -> str | None:
    """Name the recipe that a short run on a CPU is trained by instead of the plan's.

    Args:
        network: name of the plan, which is that of its preset.
        max_time_s: time budget; None means a counted schedule, which keeps the plan's recipe.
        on_cpu: whether it trains on a CPU.
    """
    short = max_time_s is not None and max_time_s <= SHORT_BUDGET_S
    if not short or not on_cpu or network not in preset_names():
        return None
    return load_preset(network).short_recipe


def choose_recipe(
    planned: "TrainingRecipe", changes: RecipeChanges, *, dimension: int
) -> "TrainingRecipe":
    """Return the recipe to train by.

    Args:
        planned: the plan's; batch size and batch Dice stay its own under another recipe.
        changes: what is to be otherwise.
        dimension: of the patch.

    Raises:
        UsageError: a name or value that does not exist.
    """
    recipe = planned
    if changes.recipe is not None:
        recipe = load_recipe(changes.recipe).recipe(
            batch_size=planned.batch_size, batch_dice=planned.batch_dice, dimension=dimension
        )
        recipe = dataclasses.replace(recipe, cpu_batch_size=planned.cpu_batch_size)
    return dataclasses.replace(recipe, **_changed_values(changes, dimension))


def _changed_values(changes: RecipeChanges, dimension: int) -> dict[str, Any]:
    from medmamba.training.draws import preset_of
    from medmamba.training.losses import require_loss

    names = ("epochs", "iterations", "batch_size", "loss", "augmentation")
    wanted = {name: getattr(changes, name) for name in names}
    values = {name: value for name, value in wanted.items() if value is not None}
    if "loss" in values:
        require_loss(values["loss"])
    if "augmentation" in values:
        preset_of(values["augmentation"])
    if "batch_size" in values:
        values["cpu_batch_size"] = None
    if changes.mirror is not None:
        values["mirror_axes"] = mirror_axes(changes.mirror, dimension)
    if changes.dummy_2d is not None:
        values["dummy_2d"] = _dummy_2d(changes.dummy_2d)
    return values


def mirror_axes(text: Mirror, dimension: int) -> tuple[int, ...]:
    """Read which spatial axes may be flipped.

    Raises:
        UsageError: it is neither a word that is known nor numbers of axes.
    """
    words = {
        "all": tuple(range(dimension)),
        "none": (),
        "in-plane": tuple(range(dimension - 2, dimension)),
    }
    if text in words:
        return words[text]
    numbers = text.split(",")
    if all(number.strip().isdecimal() and int(number) < dimension for number in numbers):
        return tuple(sorted({int(number) for number in numbers}))
    raise UsageError(
        f"mirror '{text}': all, none, in-plane, or axes from 0 to {dimension - 1} such as "
        f"0,{dimension - 1}."
    )


def _dummy_2d(text: str) -> bool | None:
    if text not in DUMMY_2D:
        raise UsageError(f"dummy-2d '{text}': one of {', '.join(DUMMY_2D)}.")
    return DUMMY_2D[text]
