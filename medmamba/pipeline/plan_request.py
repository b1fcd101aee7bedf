"""What planning is asked, what it answers, and the decision itself, whatever the data come from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from medmamba.dataset import VerificationReport
from medmamba.files import to_json, to_plain, write_atomic
from medmamba.networks.spec import Mixer, OptionValue
from medmamba.pipeline.work import Work, choose_configuration
from medmamba.plans.budget import Budget
from medmamba.plans.fingerprint import Fingerprint, Sampling
from medmamba.plans.nnunet_schema import save_plan
from medmamba.plans.plan import Plan
from medmamba.plans.planner import make_plan
from medmamba.plans.presets import Preset, load_preset
from medmamba.plans.replanning import with_kept_configurations

Step = Literal["verify", "fingerprint", "plan", "preprocess"]
Progress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all)."""


@dataclass(frozen=True, kw_only=True)
class PlanOutcome:
    """What plan() decided and where it put things."""

    report: VerificationReport
    plan: Plan | None = None
    plan_path: Path | None = None
    stores: tuple[Path, ...] = ()
    nnunet_folder: Path | None = None

    def summary(self) -> dict[str, Any]:
        """The same as JSON values."""
        found: dict[str, Any] = {
            "dataset": self.report.dataset,
            "cases": self.report.cases,
            "problems": [to_plain(problem) for problem in self.report.problems],
            "orientations": self.report.orientations,
        }
        if self.plan is not None:
            found |= {
                "network": self.plan.network,
                "plan": str(self.plan_path),
                "preprocessed": [str(store) for store in self.stores],
                "reasons": [to_plain(reason) for reason in self.plan.reasons],
            }
        if self.nnunet_folder is not None:
            found["nnunet"] = str(self.nnunet_folder)
        return found


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What a user asks of `plan`, apart from where things lie.

    Args:
        network: key of the shipped presets.
        budget: memory, device, spacing and planner to plan for.
        plans_name: name of the plan in nnU-Net's folders.
        configurations: what to preprocess; the preferred one when empty.
        sampling: ``compatible`` draws nnU-Net's random samples for intensity statistics.
        until: last step to do.
        workers: cases worked on at once; one a core, at most 8, when None.
        device: PyTorch device that resamples; NumPy on the CPU when None.
        mixer: what stands where the Mamba layers are, instead of the preset's.
        options: of the network, over the preset's.
    """

    network: str
    budget: Budget
    plans_name: str | None = None
    configurations: tuple[str, ...] = ()
    sampling: Sampling = "exact"
    until: Step = "preprocess"
    workers: int | None = None
    device: str | None = None
    mixer: Mixer | None = None
    options: Mapping[str, OptionValue] = field(default_factory=dict)

    @property
    def preset(self) -> Preset:
        """The network's preset, with what is asked otherwise."""
        shipped = load_preset(self.network)
        options = {**shipped.options, **self.options}
        return replace(shipped, mixer=self.mixer or shipped.mixer, options=options)


def decide(
    fingerprint: Fingerprint, description: Mapping[str, Any], work: Work, request: PlanRequest
) -> Plan:
    """Plan, and write the plan with what it was made from into the work folder."""
    decided = make_plan(
        fingerprint,
        description,
        request.preset,
        request.budget,
        plans_name=request.plans_name,
    )
    if request.options or request.mixer is not None:
        _check_networks(decided)
    decided = with_kept_configurations(decided, work.plan(request.network))
    write_atomic(work.dataset_json, to_json(description))
    write_atomic(work.fingerprint, to_json(fingerprint))
    save_plan(work.plan(request.network), decided)
    return decided


def _check_networks(decided: Plan) -> None:
    """Refuse options that the network cannot be built with, before anything is written."""
    from medmamba.networks.memory import count_parameters

    for configuration in decided.configurations.values():
        count_parameters(configuration.network)


def wanted_configurations(decided: Plan, request: PlanRequest) -> tuple[str, ...]:
    """Return the configurations to preprocess, each of which exists."""
    wanted = request.configurations or (choose_configuration(decided, None),)
    return with_previous_stages(decided, [choose_configuration(decided, name) for name in wanted])


def with_previous_stages(decided: Plan, configurations: Sequence[str]) -> tuple[str, ...]:
    """Return configurations to preprocess, a cascade's first stage before its second."""
    names: dict[str, None] = {}
    for name in configurations:
        previous = decided.configurations[name].previous_stage
        if previous is not None:
            names[previous] = None
        names[name] = None
    return tuple(names)


def stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    """Name a step's progress."""
    if progress is None:
        return None
    return lambda done, total: progress(name, done, total)
