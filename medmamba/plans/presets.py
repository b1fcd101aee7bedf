"""Shipped presets: one TOML file per network, with the recipe it is trained by.

The files live in the folder ``plans`` of the repository and are installed into
``medmamba/plans/presets``. Recipes that fit any network lie in ``recipes`` beside them.
Reading them needs no torch.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from medmamba.errors import MedMambaError, PlanError, UsageError
from medmamba.files import RECORD_CONFIG, from_plain
from medmamba.networks.spec import Mixer, OptionValue
from medmamba.training.recipe import TrainingRecipe

DECIDED_BY_PLANNER = frozenset({"batch_size", "batch_dice", "mirror_axes"})
"""Training keys that depend on the dataset; a preset cannot set them."""


RECIPES_FOLDER = "recipes"


@dataclass(frozen=True, kw_only=True)
class NamedRecipe:
    """How to train, whatever the network.

    Args:
        name: of the file, or of the preset it belongs to.
        training: keys of `TrainingRecipe` that differ from its defaults.
        mirror: whether flips are allowed, in training and in prediction.
    """

    __pydantic_config__ = RECORD_CONFIG

    name: str
    mirror: bool = True
    training: Mapping[str, Any] = field(default_factory=dict)

    def recipe(self, *, batch_size: int, batch_dice: bool, dimension: int) -> TrainingRecipe:
        """Fill in what the planner decided.

        Raises:
            PlanError: a training key has a wrong value.
        """
        decided = {
            "batch_size": batch_size,
            "batch_dice": batch_dice,
            "mirror_axes": tuple(range(dimension)) if self.mirror else (),
        }
        what = f"recipe {self.name}, table [training]"
        return from_plain(TrainingRecipe, {**self.training, **decided}, what=what, error=PlanError)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How a network is planned and trained unless the user says otherwise.

    Args:
        name: of the file, and what ``--network`` takes.
        network: key of ``medmamba.networks.NETWORKS``.
        planner: nnU-Net planner whose rules and memory target are used.
        memory_gb: memory to plan for; the planner's reference when None.
        mixer: what stands where the Mamba layers are.
        options: the network's own options.
        training: keys of `TrainingRecipe` that differ from its defaults.
        mirror: whether flips are allowed, in training and in prediction.
        short_recipe: recipe that replaces ``training`` where a CPU is given an hour or less;
            None where the own recipe suits short runs.
    """

    __pydantic_config__ = RECORD_CONFIG

    name: str
    network: str
    planner: str = "ExperimentPlanner"
    memory_gb: float | None = None
    mixer: Mixer = "mamba"
    mirror: bool = True
    short_recipe: str | None = None
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def named_recipe(self) -> NamedRecipe:
        """The recipe alone, which other networks may be trained by."""
        return NamedRecipe(name=self.name, mirror=self.mirror, training=self.training)

    def recipe(self, *, batch_size: int, batch_dice: bool, dimension: int) -> TrainingRecipe:
        """Fill in what the planner decided.

        Raises:
            PlanError: the preset has a training key that does not exist, or a wrong value.
        """
        return self.named_recipe.recipe(
            batch_size=batch_size, batch_dice=batch_dice, dimension=dimension
        )


def presets_folder() -> Path:
    """Return the folder of the preset files: the source tree's, else the installed copy."""
    package = Path(__file__).resolve().parent
    source = package.parent.parent / "plans"
    if any(source.glob("*.toml")) and (source.parent / "pyproject.toml").is_file():
        return source
    return package / "presets"


def preset_names() -> tuple[str, ...]:
    """List the shipped presets, sorted."""
    return tuple(sorted(path.stem for path in presets_folder().glob("*.toml")))


def load_preset(name: str) -> Preset:
    """Read a shipped preset.

    Raises:
        UsageError: there is none of that name.
        PlanError: the file is damaged.
    """
    if name not in preset_names():
        raise UsageError(
            f"network '{name}' does not exist; choose one of {', '.join(preset_names())}."
        )
    return read_preset(presets_folder() / f"{name}.toml")


def read_preset(path: Path) -> Preset:
    """Read any preset file.

    Raises:
        PlanError: it is missing, is not TOML, or has a key that does not exist.
    """
    content = _read_toml(path, f"preset {path}", PlanError)
    preset = from_plain(Preset, content, what=f"preset {path}", error=PlanError)
    _check_keys(preset.training, f"preset {path}", PlanError)
    return preset


def recipe_names() -> tuple[str, ...]:
    """List recipes that fit any network, and after them the presets, whose recipe may be lent."""
    own = sorted(path.stem for path in (presets_folder() / RECIPES_FOLDER).glob("*.toml"))
    return (*own, *preset_names())


def load_recipe(name: str) -> NamedRecipe:
    """Read a shipped recipe, the recipe of a preset, or a file.

    Args:
        name: one of ``recipe_names()``, or the path of a ``.toml`` file.

    Raises:
        UsageError: there is none of that name, or the file cannot be used.
    """
    if name in preset_names():
        return load_preset(name).named_recipe
    path = presets_folder() / RECIPES_FOLDER / f"{name}.toml"
    if name.endswith(".toml"):
        path = Path(name)
    elif name not in recipe_names():
        raise UsageError(
            f"recipe '{name}' does not exist; choose one of {', '.join(recipe_names())}, or name "
            "a .toml file."
        )
    what = f"recipe {path}"
    recipe = from_plain(
        NamedRecipe, _read_toml(path, what, UsageError), what=what, error=UsageError
    )
    _check_keys(recipe.training, what, UsageError)
    return recipe


def _read_toml(path: Path, what: str, error: type[MedMambaError]) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise error(f"{what}: cannot be read ({problem}).") from problem
    return {"name": path.stem, **content}


def _check_keys(training: Mapping[str, Any], what: str, error: type[MedMambaError]) -> None:
    known = {entry.name for entry in fields(TrainingRecipe)} - DECIDED_BY_PLANNER
    unknown = sorted(set(training) - known)
    if unknown:
        raise error(
            f"{what}: table [training] has '{unknown[0]}', which cannot be set. "
            f"Keys are {', '.join(sorted(known))}."
        )
