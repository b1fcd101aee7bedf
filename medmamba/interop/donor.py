"""Weights to begin a training with, from whatever holds them: ours, nnU-Net's, an official file.

A donor says, as far as its file does, which network the weights are of and what its outputs and
channels mean. What of it fits a new network is ``networks/transfer.py``'s.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from medmamba.bundle import load_bundle
from medmamba.bundling.manifest import MANIFEST_FILE, MODEL_FOLDER
from medmamba.bundling.reading import Bundle
from medmamba.errors import BundleError
from medmamba.files import hash_file
from medmamba.interop.checkpoint import ImportedFold, fit_checkpoint
from medmamba.interop.nnunet_results import find_results, read_results_fold
from medmamba.interop.official_keys import has_aliases, merge_aliases, without_wrappers
from medmamba.interop.pickle_reader import read_foreign_pickle
from medmamba.labels import LabelMap
from medmamba.networks.spec import NetworkSpec
from medmamba.networks.weights import load_weights

SAFETENSORS = ".safetensors"

STATE_KEYS = ("model", "state_dict", "network_weights")
"""Where trainers put a state dict in their files; VMamba's under the first."""


@dataclass(frozen=True, kw_only=True)
class Donor:
    """Trained weights, under the names our networks have for them.

    Args:
        source: what it is, for people and records.
        sha256: of the file or bundle the weights are in.
        fold: of a cross-validation, that the weights are of; None where nothing says so.
        spec: the network they are of; None for a bare state dict, as the next three.
        label_map: what its outputs mean.
        channels: what its image channels are.
        dataset_name: what it was trained on.
    """

    source: str
    sha256: str
    state: Mapping[str, Tensor]
    fold: str | None = None
    spec: NetworkSpec | None = None
    label_map: LabelMap | None = None
    channels: tuple[str, ...] = ()
    dataset_name: str = ""


def read_donor(path: Path, *, network: str, configuration: str, fold: str) -> Donor:
    """Read trained weights.

    Args:
        path: bundle or run folder; a folder that nnU-Net trained into; or a checkpoint file of
            nnU-Net or a fork, or a bare state dict (.pth, .safetensors).
        network: of several in an ensemble, the one that is wanted.
        configuration: of several below nnU-Net's folder, the one that is wanted.
        fold: the fold that is wanted where there are several; the first where it is not there.

    Raises:
        SecurityError: a file holds more than data, or does not match its hash.
        BundleError: there are no weights, or they are damaged.
        PlanError: the plans of a checkpoint cannot be used.
    """
    if any((folder / MANIFEST_FILE).is_file() for folder in (path, path / MODEL_FOLDER)):
        return _from_bundle(load_bundle(path), network, fold)
    if path.is_dir():
        return _from_results(path, configuration, fold)
    if path.suffix.lower() == SAFETENSORS:
        return Donor(source=path.name, sha256=hash_file(path), state=load_weights(path))
    content = read_foreign_pickle(path)
    if isinstance(content, Mapping) and "init_args" in content:
        found = fit_checkpoint(content, f"checkpoint {path}")
        return _from_checkpoint(found, path.name, hash_file(path))
    state = bare_state(content, f"weights {path}", "Give a file with a network's tensors.")
    return Donor(source=path.name, sha256=hash_file(path), state=state)


def bare_state(content: Any, what: str, advice: str) -> dict[str, Tensor]:
    """Return the state dict that the content of a foreign file is, or has at a usual place.

    Args:
        content: of the file.
        what: how messages name it.
        advice: what to give instead.

    Raises:
        BundleError: it holds no tensors by name.
    """
    for key in STATE_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = content.items() if isinstance(content, Mapping) else ()
    wrong = [name for name, value in tensors if not isinstance(value, Tensor)]
    if not tensors or wrong:
        found = f"{wrong[0]!r}, which is no tensor" if wrong else "no tensors by name"
        raise BundleError(f"{what}: holds {found}. {advice}")
    return {str(name): value for name, value in tensors}


def under_own_names(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without the aliases and wrappers that official files have.

    Args:
        state: under any names.
        own: state dict of the network that it is for.

    Raises:
        BundleError: two names of one tensor hold different values.
    """
    if has_aliases(own):
        return merge_aliases(state, aliased=True)
    return {without_wrappers(name): tensor for name, tensor in state.items()}


def _from_bundle(bundle: Bundle, network: str, fold: str) -> Donor:
    models = [one for one in bundle.models if one.manifest.network == network] or bundle.models
    if len(models) > 1:
        held = ", ".join(model.manifest.network for model in models)
        raise BundleError(
            f"{bundle.folder}: is an ensemble of {held}. Give one of its members: "
            f"{models[0].folder}."
        )
    (model,) = models
    entries = model.manifest.weights
    entry = next((entry for entry in entries if entry.fold == fold), entries[0])
    return Donor(
        source=f"{bundle.manifest.name}, fold {entry.fold}",
        sha256=model.sha256,
        state=load_weights(model.folder / entry.file),
        fold=entry.fold,
        spec=model.configuration.network,
        label_map=model.plan.label_map,
        channels=model.plan.channel_names,
        dataset_name=model.plan.dataset_name,
    )


def _from_results(path: Path, configuration: str, fold: str) -> Donor:
    try:
        results = find_results(path)
    except BundleError:
        # A folder above several models: the one of this configuration is meant.
        results = find_results(path, configuration=configuration)
    chosen = fold if fold in results.folds else results.folds[0]
    file = results.checkpoints[results.folds.index(chosen)]
    source = f"{results.folder.name}, fold {chosen}"
    return _from_checkpoint(read_results_fold(results, chosen), source, hash_file(file))


def _from_checkpoint(found: ImportedFold, source: str, sha256: str) -> Donor:
    plan = found.plan
    return Donor(
        source=source,
        sha256=sha256,
        state=found.state,
        fold=found.fold,
        spec=plan.configurations[found.configuration].network,
        label_map=plan.label_map,
        channels=plan.channel_names,
        dataset_name=plan.dataset_name,
    )
