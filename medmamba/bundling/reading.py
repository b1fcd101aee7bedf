"""Reading bundles: everything that is used is checked before it is."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from medmamba.acceptance import Acceptance, ReferenceCase, expected_of, repeat_reference_case
from medmamba.bundling.manifest import (
    MANIFEST_FILE,
    PROBES_FILE,
    REFERENCE_FILE,
    SUMS_FILE,
    WEIGHTS_FOLDER,
    Manifest,
    find_bundle,
    read_manifest,
)
from medmamba.errors import BundleError, EnvironmentFault, SecurityError
from medmamba.files import from_plain, hash_file, read_json
from medmamba.inference.probe import Expected, Probes
from medmamba.networks.tensor_file import check_tensor_file, header_length
from medmamba.plans.nnunet_schema import load_plan
from medmamba.plans.plan import ConfigurationPlan, Plan

if TYPE_CHECKING:
    from torch import Tensor, nn

    from medmamba.evaluation.postprocessing import Postprocessing


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle whose files have been checked.

    Args:
        folder: where it lies.
        plan: of the network; of the first member in an ensemble.
        sha256: of its list of hashes, and so of everything in it.
        members: bundles of an ensemble; empty for a single network.
    """

    folder: Path
    manifest: Manifest
    plan: Plan
    sha256: str
    members: "tuple[Bundle, ...]" = ()

    @property
    def configuration(self) -> ConfigurationPlan:
        """The branch of the plan that the weights (of the first member) belong to."""
        first = self.models[0]
        return first.plan.configurations[first.manifest.configuration]

    @property
    def previous(self) -> ConfigurationPlan | None:
        """The branch of a cascade's first stage."""
        stage = self.configuration.previous_stage
        return None if stage is None else self.models[0].plan.configurations[stage]

    @property
    def folds(self) -> tuple[str, ...]:
        """Names of the folds, of all members."""
        names = [entry.fold for model in self.models for entry in model.manifest.weights]
        return tuple(dict.fromkeys(names))

    @property
    def models(self) -> "tuple[Bundle, ...]":
        """The members of an ensemble, or the bundle itself."""
        return self.members or (self,)

    @property
    def postprocessing(self) -> "Postprocessing | None":
        """What is done to finished masks; None for nothing."""
        from medmamba.evaluation.postprocessing import load_postprocessing

        name = self.manifest.postprocessing
        return None if name is None else load_postprocessing(self.folder / name)


def load_bundle(path: Path, *, folds: Sequence[int | str] | None = None) -> Bundle:
    """Check a bundle (or the one inside a run folder) and read all but the tensors.

    Args:
        path: bundle folder, or run folder with a ``model`` in it.
        folds: use only these; all that the manifest names when omitted.

    Raises:
        BundleError: missing or damaged parts, unknown keys, newer versions.
        EnvironmentFault: a file may not be read.
        SecurityError: a file does not match its hash, or a path leaves the folder.
    """
    folder = find_bundle(path)
    manifest = read_manifest(folder)
    if manifest.members:
        return _load_ensemble(folder, manifest, folds)
    manifest = _chosen_folds(manifest, folder, folds)
    weights = (*manifest.weights, *manifest.previous_weights)
    used = [MANIFEST_FILE, manifest.plan, *(entry.file for entry in weights)]
    used += [name for name in (REFERENCE_FILE, PROBES_FILE) if (folder / name).exists()]
    used += [manifest.postprocessing] if manifest.postprocessing is not None else []
    for name in used:
        _require_file(folder, name)
    for entry in weights:
        _check_size(folder / entry.file, entry.size_bytes)
    _check_sums(folder, used)
    for entry in weights:
        check_tensor_file(folder / entry.file)
    plan = load_plan(folder / manifest.plan)
    _check_agreement(folder, manifest, plan)
    return Bundle(folder=folder, manifest=manifest, plan=plan, sha256=hash_file(folder / SUMS_FILE))


def load_networks(bundle: Bundle) -> "list[nn.Module]":
    """Build one network per fold with its weights, on the CPU, in evaluation mode.

    Args:
        bundle: of one network; an ensemble's networks are those of its members.

    Raises:
        BundleError: tensors are missing, unexpected, misshapen or not finite; names them.
    """
    from medmamba.networks.weights import load_weights

    paths = [bundle.folder / entry.file for entry in bundle.manifest.weights]
    return [
        build_loaded(bundle.configuration, load_weights(path), what=str(path)) for path in paths
    ]


def load_previous_networks(bundle: Bundle) -> "list[nn.Module]":
    """Build the networks of a cascade's first stage; none where there is no cascade.

    Raises:
        BundleError: tensors are missing, unexpected, misshapen or not finite; names them.
    """
    from medmamba.networks.weights import load_weights

    branch = bundle.previous
    if branch is None:
        return []
    paths = [bundle.folder / entry.file for entry in bundle.manifest.previous_weights]
    return [build_loaded(branch, load_weights(path), what=str(path)) for path in paths]


def load_expected(bundle: Bundle, *, mirror_axes: tuple[int, ...]) -> Expected | None:
    """Read what the networks say of the synthetic image in float32, averaged over these flips.

    Args:
        bundle: of one network.
        mirror_axes: of the flips; empty for none.

    Returns:
        None where it was not stored, as by earlier versions and of large models.

    Raises:
        BundleError: it is damaged.
    """
    path = bundle.folder / PROBES_FILE
    if not path.exists():
        return None
    content = read_json(path, what="parity probes", error=BundleError)
    return expected_of(
        from_plain(Probes, content, what=str(path), error=BundleError),
        mirror_axes=mirror_axes,
        folds=len(bundle.manifest.weights),
        label_map=bundle.plan.label_map,
    )


def verify_bundle(bundle: Bundle) -> Acceptance:
    """Repeat the bundle's reference case here, on the CPU in float32; in an ensemble each member's.

    Returns:
        The outcome; the worst of an ensemble.

    Raises:
        BundleError: the bundle carries none, or one of another version.
    """
    return min((_verify_model(model) for model in bundle.models), key=_merit)


def _verify_model(bundle: Bundle) -> Acceptance:
    path = bundle.folder / REFERENCE_FILE
    content = read_json(path, what="reference case", error=BundleError)
    case = from_plain(ReferenceCase, content, what=str(path), error=BundleError)
    plan = bundle.plan
    branch = bundle.previous
    previous = None if branch is None else (load_previous_networks(bundle), branch)
    return repeat_reference_case(
        case,
        load_networks(bundle),
        bundle.configuration,
        plan.label_map,
        plan.intensities,
        previous,
    )


def _merit(acceptance: Acceptance) -> tuple[int, float]:
    order = ("different", "equivalent", "identical")
    return order.index(acceptance.outcome), acceptance.agreement


def build_loaded(
    configuration: ConfigurationPlan, state: "Mapping[str, Tensor]", *, what: str
) -> "nn.Module":
    """Build the network of a configuration around weights, in evaluation mode.

    Raises:
        BundleError: tensors are missing, unexpected, misshapen or not finite; names them.
    """
    from medmamba.networks import build_network
    from medmamba.networks.weights import load_exactly, require_finite

    require_finite(state, what)
    network = build_network(configuration.network)
    load_exactly(network, state, what=what)
    return network.eval().requires_grad_(False)


def _load_ensemble(folder: Path, manifest: Manifest, folds: Sequence[int | str] | None) -> Bundle:
    used = [MANIFEST_FILE, *(f"{name}/{SUMS_FILE}" for name in manifest.members)]
    used += [manifest.postprocessing] if manifest.postprocessing is not None else []
    for name in used:
        _require_file(folder, name)
    _check_sums(folder, used)
    if manifest.weights:
        raise BundleError(
            f"{folder}: {MANIFEST_FILE} has both 'members' and 'weights'; an ensemble has no "
            "weights of its own."
        )
    members = tuple(load_bundle(folder / name, folds=folds) for name in manifest.members)
    require_alike(members, str(folder))
    pairs = (
        ("labels", manifest.labels, members[0].manifest.labels),
        ("channels", manifest.channels, members[0].manifest.channels),
    )
    for key, found, needed in pairs:
        if found != needed:
            raise BundleError(
                f"{folder}: key '{key}' of {MANIFEST_FILE} is {found!r}, its members have "
                f"{needed!r}. They do not belong together."
            )
    return Bundle(
        folder=folder,
        manifest=manifest,
        plan=members[0].plan,
        sha256=hash_file(folder / SUMS_FILE),
        members=members,
    )


def require_alike(members: Sequence[Bundle], what: str) -> None:
    """Refuse members whose outputs cannot be averaged.

    Raises:
        BundleError: naming the member and what differs.
    """
    first = members[0]
    for member in members[1:]:
        for key, found, needed in (
            ("labels", member.plan.label_map, first.plan.label_map),
            ("channels", member.plan.channel_names, first.plan.channel_names),
        ):
            if found != needed:
                raise BundleError(
                    f"{what}: {key} of {member.manifest.name} are {found!r}, those of "
                    f"{first.manifest.name} {needed!r}. Average models of one dataset only."
                )


def _chosen_folds(manifest: Manifest, folder: Path, folds: Sequence[int | str] | None) -> Manifest:
    if not manifest.weights:
        raise BundleError(
            f"{folder}: key 'weights' of {MANIFEST_FILE} is empty; at least one "
            f"{WEIGHTS_FOLDER}/fold_<k>.safetensors is needed."
        )
    if folds is None:
        return manifest
    wanted = [str(fold) for fold in folds]
    chosen = tuple(entry for entry in manifest.weights if entry.fold in wanted)
    if not chosen or len(chosen) != len(wanted):
        known = ", ".join(entry.fold for entry in manifest.weights)
        raise BundleError(f"{folder}: has folds {known}; asked for {', '.join(wanted)}.")
    earlier = tuple(entry for entry in manifest.previous_weights if entry.fold in wanted)
    return replace(manifest, weights=chosen, previous_weights=earlier)


def _require_file(folder: Path, name: str) -> None:
    path = folder / name
    if Path(name).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
        raise SecurityError(
            f"{folder}: the manifest names '{name}', which lies outside the model folder.",
            code="E_PATH_ESCAPE",
        )
    if not path.is_file():
        beside = sorted(item.name for item in path.parent.glob("*")) if path.parent.is_dir() else []
        raise BundleError(
            f"{folder}: {name} is missing (beside it: {', '.join(beside[:5]) or 'nothing'}). "
            "Copy the model folder again, or choose the folds that are there."
        )
    if not os.access(path, os.R_OK):
        raise EnvironmentFault(
            f"{path}: may not be read by this user (mode {path.stat().st_mode & 0o777:o}). "
            "Change its permissions, chmod a+r for instance.",
            code="E_IO_PERMISSION",
        )


def _check_size(path: Path, expected: int) -> None:
    found = path.stat().st_size
    if found != expected:
        raise BundleError(
            f"{path}: has {found} bytes, the manifest says {expected}. Copy the file again."
        )
    with path.open("rb") as handle:
        header_length(handle.read(8), path)


def _check_sums(folder: Path, names: Sequence[str]) -> None:
    _require_file(folder, SUMS_FILE)
    expected = {}
    for line in (folder / SUMS_FILE).read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        expected[name] = digest
    for name in names:
        found = hash_file(folder / name)
        if expected.get(name) != found:
            raise SecurityError(
                f"{folder / name}: SHA-256 is {found[:16]}..., {SUMS_FILE} says "
                f"{expected.get(name, 'nothing')[:16]}.... The file was changed or damaged; "
                "copy the model folder again from its source.",
                code="E_MODEL_HASH",
            )


def _check_agreement(folder: Path, manifest: Manifest, plan: Plan) -> None:
    if manifest.configuration not in plan.configurations:
        raise BundleError(
            f"{folder}: key 'configuration' is '{manifest.configuration}', the plan has "
            f"{', '.join(plan.configurations)}."
        )
    branch = plan.configurations[manifest.configuration]
    spec, is_cascade = branch.network, branch.previous_stage is not None
    pairs = (
        (
            "labels",
            {entry.name: entry.values for entry in manifest.labels},
            plan.label_map.foreground,
        ),
        ("channels", manifest.channels, plan.channel_names),
        ("network", manifest.network, spec.name),
        ("labels (outputs)", plan.label_map.output_channels, spec.out_channels),
        (
            "previous_weights",
            [entry.fold for entry in manifest.previous_weights],
            [entry.fold for entry in manifest.weights] if is_cascade else [],
        ),
    )
    for key, found, needed in pairs:
        if found != needed:
            raise BundleError(
                f"{folder}: key '{key}' of {MANIFEST_FILE} is {found!r}, the plan says {needed!r}. "
                "Manifest and plan do not belong together."
            )
