"""The work folder: where each thing a run writes has its place, and how it is found again.

::

    work/
      dataset.json  verification.json  fingerprint.json  dataset_fingerprint.json  splits.json
      plans/<network>.json
      references/<case>          label images of the training cases
      preprocessed/<configuration>-<key>/<case>...
      previous/<network>/<configuration>/fold_<n>/<case>...   labels of a cascade's first stage
      runs/<network>/<configuration>/fold_<n>/   checkpoints, log.jsonl, curves.png, model/
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmamba.errors import PlanError, UsageError
from medmamba.files import hash_values, read_json

if TYPE_CHECKING:
    from medmamba.plans.plan import ConfigurationPlan, Plan

PREFERRED_CONFIGURATIONS = ("3d_fullres", "2d")
STORE_KEY_LENGTH = 8


@dataclass(frozen=True)
class Work:
    """Paths inside one work folder."""

    folder: Path

    @property
    def dataset_json(self) -> Path:
        """Description of the raw dataset, in nnU-Net's form."""
        return self.folder / "dataset.json"

    @property
    def verification(self) -> Path:
        """Every problem found in the raw dataset."""
        return self.folder / "verification.json"

    @property
    def fingerprint(self) -> Path:
        """What the data are."""
        return self.folder / "fingerprint.json"

    @property
    def nnunet_fingerprint(self) -> Path:
        """The same in nnU-Net's form."""
        return self.folder / "dataset_fingerprint.json"

    @property
    def cases(self) -> Path:
        """What was measured of single cases, so that a fingerprint can be continued."""
        return self.folder / "fingerprint"

    @property
    def plans(self) -> Path:
        """One plan per network."""
        return self.folder / "plans"

    @property
    def has_runs(self) -> bool:
        """Whether anything was trained here."""
        return any((self.folder / "runs").glob("*/*/*"))

    @property
    def splits(self) -> Path:
        """Training and validation cases of each fold."""
        return self.folder / "splits.json"

    @property
    def references(self) -> Path:
        """Label images of the training cases, for scoring whole cases."""
        return self.folder / "references"

    def plan(self, network: str) -> Path:
        """What will be done with one network."""
        return self.folder / "plans" / f"{network}.json"

    def store(self, configuration: str, plan: "ConfigurationPlan") -> Path:
        """Preprocessed cases; networks with equal spacing and recipe share them.

        The second stage of a cascade sees those of full resolution.
        """
        if plan.previous_stage is not None:
            configuration = configuration.replace("_cascade", "")
        key = hash_values([list(plan.grid.spacing_mm), plan.preprocessing])
        return self.folder / "preprocessed" / f"{configuration}-{key[:STORE_KEY_LENGTH]}"

    def previous(self, network: str, configuration: str, fold: int | str) -> Path:
        """Labels of a cascade's first stage that one run of the second is given."""
        return self.folder / "previous" / network / configuration / f"fold_{fold}"

    def run(self, network: str, configuration: str, fold: int | str) -> Path:
        """One training run."""
        return self.folder / "runs" / network / configuration / f"fold_{fold}"

    def planned_networks(self) -> tuple[str, ...]:
        """Networks this folder holds a plan for."""
        return tuple(sorted(path.stem for path in (self.folder / "plans").glob("*.json")))

    def load_plan(self, network: str) -> "Plan":
        """Read the plan of ``network``.

        Raises:
            UsageError: there is no such network.
            PlanError: it has not been planned here, or the plan is damaged or of another version.
        """
        from medmamba.plans.nnunet_schema import load_plan

        check_network_name(network)
        path = self.plan(network)
        if not path.is_file():
            planned = ", ".join(self.planned_networks()) or "none"
            raise PlanError(
                f"{self.folder}: no plan for network '{network}' (planned here: {planned}). "
                f"Run `medmamba plan DATASET -o {self.folder} --network {network}`."
            )
        return load_plan(path)

    def load_description(self) -> dict[str, Any]:
        """Read the dataset's description."""
        content = read_json(self.dataset_json, what="work folder", error=PlanError)
        if not isinstance(content, dict):
            raise PlanError(f"{self.dataset_json}: holds no object; run `medmamba plan` again.")
        return content


def open_work(folder: Path) -> Work:
    """Return an existing work folder.

    Raises:
        PlanError: the folder is not one.
    """
    work = Work(Path(folder))
    if not (work.folder / "plans").is_dir():
        raise PlanError(
            f"{folder}: no work folder (it has no 'plans' folder). "
            f"Make one with `medmamba plan DATASET -o {folder}`."
        )
    return work


def choose_configuration(plan: "Plan", wanted: str | None) -> str:
    """Return ``wanted``, or full-resolution 3D where it exists, else 2D.

    Raises:
        PlanError: the plan has no such configuration.
    """
    if wanted is None:
        return next(name for name in PREFERRED_CONFIGURATIONS if name in plan.configurations)
    if wanted not in plan.configurations:
        raise PlanError(
            f"plan of {plan.network}: no configuration '{wanted}'; "
            f"it has {', '.join(plan.configurations)}."
        )
    return wanted


def check_network_name(name: str) -> None:
    """Refuse a network that does not exist.

    Raises:
        UsageError: naming those that do.
    """
    from medmamba.plans.presets import preset_names

    if name not in preset_names():
        raise UsageError(
            f"network '{name}' does not exist; choose one of {', '.join(preset_names())}."
        )
