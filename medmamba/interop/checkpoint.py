"""Turn official nnU-Net-style checkpoints into a bundle, with the plan the checkpoints hold."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from medmamba.bundle import Bundle, save_bundle
from medmamba.errors import BundleError
from medmamba.interop.official import load_official_state
from medmamba.interop.official_keys import without_wrappers
from medmamba.interop.official_recognition import recognize
from medmamba.interop.pickle_reader import read_foreign_pickle
from medmamba.networks import build_network
from medmamba.networks.spec import NetworkSpec
from medmamba.plans.nnunet_schema import UNET_CLASSES, plan_from_nnunet
from medmamba.plans.plan import Plan, Reason

logger = logging.getLogger(__name__)

OUR_PREFIX = "network."
"""Put before every name when nnU-Net has trained one of our networks (``nnunet_network.py``)."""


@dataclass(frozen=True, kw_only=True)
class ImportedFold:
    """What one checkpoint holds, read and checked.

    Args:
        plan: the checkpoint's plans, with the network found in it.
        configuration: the branch of the plan it was trained at.
        state: tensors under our own names.
    """

    plan: Plan
    configuration: str
    fold: str
    trainer: str
    state: Mapping[str, Tensor]


REORIENTING_READERS = ("NibabelIOWithReorient", "SimpleITKIOWithReorient")
"""Of nnU-Net: networks see their images turned to RAS."""


def import_checkpoints(
    paths: Sequence[Path],
    folder: Path,
    *,
    name: str | None = None,
    plans: Mapping[str, Any] | None = None,
    dataset_json: Mapping[str, Any] | None = None,
    scores: Mapping[str, Any] | None = None,
) -> Bundle:
    """Read checkpoints of nnU-Net or of one of the official forks and write one bundle.

    Which network they hold is read off the names of their tensors, since forks share class names.

    Args:
        paths: ``.pth`` files, one per fold of one model.
        folder: of the bundle.
        name: of the bundle, for people.
        plans: instead of those inside the checkpoints.
        dataset_json: likewise.
        scores: JSON values for the bundle.

    Raises:
        SecurityError: a file holds more than data; nothing of it was run.
        BundleError: parts are missing, tensors do not fit the network of the plan, or the files
            are not folds of one model.
        PlanError: the checkpoint's plans cannot be used.
    """
    folds = [read_checkpoint(path, plans=plans, dataset_json=dataset_json) for path in paths]
    first = folds[0]
    for path, fold in zip(paths[1:], folds[1:], strict=True):
        if (fold.plan, fold.configuration) != (first.plan, first.configuration):
            raise BundleError(
                f"checkpoint {path}: its plans, network or configuration differ from those of "
                f"{paths[0]}; folds of one model are needed. Import it on its own."
            )
    names = [fold.fold for fold in folds]
    if len(set(names)) != len(names):
        raise BundleError(f"checkpoints: they are of folds {', '.join(names)}; give each once.")
    return save_bundle(
        folder,
        plan=first.plan,
        configuration=first.configuration,
        weights=[fold.state for fold in folds],
        folds=names,
        name=name,
        training={"imported_from": [path.name for path in paths], "trainer": first.trainer},
        scores=scores,
        # Its other readers take images as they are stored.
        orientation="RAS" if first.plan.reader in REORIENTING_READERS else "",
    )


def read_checkpoint(
    path: Path,
    *,
    plans: Mapping[str, Any] | None = None,
    dataset_json: Mapping[str, Any] | None = None,
) -> ImportedFold:
    """Read one checkpoint and fit its tensors to the network of its plans, or of those given.

    Raises:
        SecurityError: the file holds more than data; nothing of it was run.
        BundleError: parts are missing, or tensors do not fit the network of the plan.
        PlanError: the checkpoint's plans cannot be used.
    """
    return fit_checkpoint(
        read_foreign_pickle(path), f"checkpoint {path}", plans=plans, dataset_json=dataset_json
    )


def fit_checkpoint(
    content: Any,
    what: str,
    *,
    plans: Mapping[str, Any] | None = None,
    dataset_json: Mapping[str, Any] | None = None,
) -> ImportedFold:
    """Do the same with what has been read of a checkpoint; ``what`` names it in messages."""
    state = _part(content, "network_weights", Mapping, what)
    arguments = _part(content, "init_args", Mapping, what)
    configuration = str(_part(arguments, "configuration", str, what))
    plan = plan_from_nnunet(
        _part(arguments, "plans", Mapping, what) if plans is None else plans,
        _part(arguments, "dataset_json", Mapping, what) if dataset_json is None else dataset_json,
        what=what,
    )
    if configuration not in plan.configurations:
        raise BundleError(
            f"{what}: its plans hold no configuration {configuration!r}, only "
            f"{', '.join(plan.configurations)}."
        )
    state = _tensors(state, what)
    planned = plan.configurations[configuration].network
    spec, state = _identify(state, planned, what)
    network = build_network(spec)
    load_official_state(network, state, what=f"{what}, read as {spec.name}")
    return ImportedFold(
        plan=_planned_for(plan, configuration, spec, content),
        configuration=configuration,
        fold=str(arguments.get("fold", 0)),
        trainer=str(content.get("trainer_name")),
        state=network.state_dict(),
    )


def _tensors(state: Mapping[str, Any], what: str) -> dict[str, Tensor]:
    wrong = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if wrong:
        raise BundleError(
            f"{what}: 'network_weights' holds {wrong[0]!r}, of type "
            f"{type(state[wrong[0]]).__name__}; only tensors belong there."
        )
    return {without_wrappers(str(name)): tensor for name, tensor in state.items()}


def _identify(
    state: Mapping[str, Tensor], planned: NetworkSpec, what: str
) -> tuple[NetworkSpec, Mapping[str, Tensor]]:
    """Return the network that tensors belong to, and the tensors under its own names."""
    if planned.name not in UNET_CLASSES:
        return planned, {name.removeprefix(OUR_PREFIX): tensor for name, tensor in state.items()}
    try:
        return recognize(state, planned), state
    except BundleError as error:
        raise BundleError(f"{what}: {error.message}", code=error.code) from error


def _planned_for(
    plan: Plan, configuration: str, spec: NetworkSpec, content: Mapping[str, Any]
) -> Plan:
    """Return the plan with the network found, and the flips it was trained with."""
    branch = plan.configurations[configuration]
    stated = tuple(content.get("inference_allowed_mirroring_axes") or ())
    axes = tuple(axis for axis in stated if axis < spec.dimension)
    if axes != stated:
        logger.warning(
            "the checkpoint allows mirroring along axes %s; a network of %d dimensions keeps %s",
            stated, spec.dimension, axes,
        )  # fmt: skip
    branch = replace(branch, network=spec, training=replace(branch.training, mirror_axes=axes))
    reason = Reason(
        topic="network",
        value=spec.name,
        why="names and shapes of the tensors of an imported checkpoint; its plans hold the rest",
    )
    return replace(
        plan,
        network=spec.name,
        configurations={**plan.configurations, configuration: branch},
        reasons=(*plan.reasons, reason),
    )


def _part(content: Any, key: str, kind: type, what: str) -> Any:
    if not isinstance(content, Mapping) or key not in content:
        raise BundleError(
            f"{what} has no {key!r}; it is not one that nnU-Net's trainers write. "
            "Give checkpoint_final.pth or checkpoint_best.pth of a fold."
        )
    if not isinstance(content[key], kind):
        raise BundleError(
            f"{what}: {key!r} is of type {type(content[key]).__name__}, "
            f"{kind.__name__.lower()} needed. The file is damaged or not of nnU-Net's trainers."
        )
    return content[key]
