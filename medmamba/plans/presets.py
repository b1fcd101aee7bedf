"""Shipped presets: one TOML file per network, with the recipe it is trained by.

The files live in the folder ``plans`` of the repository and are installed into
``medmamba/plans/presets``. Reading them needs no torch.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from medmamba.errors import PlanError, UsageError
from medmamba.files import RECORD_CONFIG, from_plain
from medmamba.networks.spec import Mixer, OptionValue
from medmamba.training.recipe import TrainingRecipe

DECIDED_BY_PLANNER = frozenset({"batch_size", "batch_dice", "mirror_axes"})
"""Training keys that depend on the dataset; a preset cannot set them."""


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
    """

    __pydantic_config__ = RECORD_CONFIG

    name: str
    network: str
    planner: str = "ExperimentPlanner"
    memory_gb: float | None = None
    mixer: Mixer = "mamba"
    mirror: bool = True
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    def recipe(self, *, batch_size: int, batch_dice: bool, dimension: int) -> TrainingRecipe:
        """Fill in what the planner decided.

        Raises:
            PlanError: the preset has a training key that does not exist, or a wrong value.
        """
        decided = {
            "batch_size": batch_size,
            "batch_dice": batch_dice,
            "mirror_axes": tuple(range(dimension)) if self.mirror else (),
        }
        what = f"preset {self.name}, table [training]"
        return from_plain(TrainingRecipe, {**self.training, **decided}, what=what, error=PlanError)


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
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise PlanError(f"preset {path}: cannot be read ({problem}).") from problem
    content.setdefault("name", path.stem)
    preset = from_plain(Preset, content, what=f"preset {path}", error=PlanError)
    known = {entry.name for entry in fields(TrainingRecipe)} - DECIDED_BY_PLANNER
    unknown = sorted(set(preset.training) - known)
    if unknown:
        raise PlanError(
            f"preset {path}: table [training] has '{unknown[0]}', which cannot be set. "
            f"Keys are {', '.join(sorted(known))}."
        )
    return preset
