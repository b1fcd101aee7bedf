"""The deployable model: a folder of weights, plan and manifest that can be checked and trusted.

::

    model/  manifest.json  plan.json  weights/fold_<k>.safetensors  reference.json  SHA256SUMS

Nothing in it is code, nothing is unpickled, and every byte that is used is hashed first. Reading
the manifest does not import torch; building networks does.
"""

import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmamba import __version__
from medmamba.acceptance import (
    Acceptance,
    ReferenceCase,
    make_reference_case,
    repeat_reference_case,
)
from medmamba.errors import BundleError, EnvironmentFault, SecurityError
from medmamba.evaluation.palette import label_colors
from medmamba.files import (
    RECORD_CONFIG,
    TEMPORARY_PREFIX,
    from_plain,
    hash_file,
    read_json,
    sync_folder,
    to_json,
    write_atomic,
)
from medmamba.networks.tensor_file import check_tensor_file, header_length
from medmamba.plans.nnunet_schema import load_plan, save_plan
from medmamba.plans.plan import ConfigurationPlan, Plan

if TYPE_CHECKING:
    from torch import Tensor, nn

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
PLAN_FILE = "plan.json"
WEIGHTS_FOLDER = "weights"
SUMS_FILE = "SHA256SUMS"
REFERENCE_FILE = "reference.json"
MODEL_FOLDER = "model"
"""Where a training run keeps its bundle."""

INTENDED_USE = "Research use only. Not a medical device."
UNSAFE_SUFFIXES = (".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin")


@dataclass(frozen=True, kw_only=True)
class LabelEntry:
    """A label or region as viewers and reports show it.

    Args:
        name: as in dataset.json.
        values: label values it consists of.
        color: ``#rrggbb``.
        snomed: SNOMED CT code, where one is known.
    """

    __pydantic_config__ = RECORD_CONFIG

    name: str
    values: tuple[int, ...]
    color: str
    snomed: str | None = None


@dataclass(frozen=True, kw_only=True)
class WeightsEntry:
    """One trained fold."""

    __pydantic_config__ = RECORD_CONFIG

    fold: str
    file: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bundle is, in one page.

    Args:
        schema_version: raised when older programs could misread a bundle.
        name: for people, such as ``Dataset004_Hippocampus lightm_unet_s``.
        network: key of the networks' registry.
        configuration: the branch of the plan that the weights belong to.
        channels: names of the image channels, in order.
        weights: one entry per fold; predictions are their mean.
        mirror_axes: axes whose flips the networks have seen in training.
        precision: in which the scores were measured.
        training: how the weights came to be.
        scores: Dice on validation cases, by label and fold.
        licence: of the weights.
    """

    __pydantic_config__ = RECORD_CONFIG

    name: str
    network: str
    configuration: str
    labels: tuple[LabelEntry, ...]
    channels: tuple[str, ...]
    weights: tuple[WeightsEntry, ...]
    mirror_axes: tuple[int, ...] = ()
    precision: str = "fp32"
    training: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    plan: str = PLAN_FILE
    licence: str = "not stated"
    intended_use: str = INTENDED_USE
    medmamba_version: str = __version__
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle whose files have been checked.

    Args:
        folder: where it lies.
        sha256: of its list of hashes, and so of everything in it.
    """

    folder: Path
    manifest: Manifest
    plan: Plan
    sha256: str

    @property
    def configuration(self) -> ConfigurationPlan:
        """The branch of the plan that the weights belong to."""
        return self.plan.configurations[self.manifest.configuration]

    @property
    def folds(self) -> tuple[str, ...]:
        """Names of the folds."""
        return tuple(entry.fold for entry in self.manifest.weights)


def save_bundle(
    folder: Path,
    *,
    plan: Plan,
    configuration: str,
    weights: "Sequence[Mapping[str, Tensor]]",
    folds: Sequence[int | str] | None = None,
    name: str | None = None,
    precision: str = "fp32",
    training: Mapping[str, Any] | None = None,
    scores: Mapping[str, Any] | None = None,
    licence: str = "not stated",
    reference_case: bool = True,
) -> Bundle:
    """Write a bundle so that ``folder`` is either the old one or the whole new one.

    Args:
        folder: where to; an existing bundle there is replaced.
        plan: the whole plan; it travels with the weights.
        configuration: the branch of it that the weights belong to.
        weights: one state dict per fold.
        folds: their names; 0, 1, ... when omitted.
        name: for people.
        precision: in which the scores were measured.
        training: JSON values that say how the weights came to be.
        scores: JSON values.
        licence: of the weights.
        reference_case: predict a synthetic case, so that ``verify_bundle`` can repeat it.

    Raises:
        BundleError: weights do not fit the plan.
        EnvironmentFault: the place cannot be written.
    """
    names = [str(fold) for fold in (folds if folds is not None else range(len(weights)))]
    if not weights or len(names) != len(weights) or configuration not in plan.configurations:
        raise BundleError(
            f"bundle {folder}: {len(weights)} sets of weights for folds {names} of configuration "
            f"'{configuration}' (the plan has {', '.join(plan.configurations)}). "
            "Give one set per fold, of a configuration in the plan."
        )
    scratch = folder.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:12]}-{folder.name}")
    try:
        entries = _write_weights(scratch, names, weights)
        manifest = Manifest(
            name=name or f"{plan.dataset_name} {plan.network}",
            network=plan.configurations[configuration].network.name,
            configuration=configuration,
            labels=_label_entries(plan),
            channels=plan.channel_names,
            weights=entries,
            mirror_axes=plan.configurations[configuration].training.mirror_axes,
            precision=precision,
            training=dict(training or {}),
            scores=dict(scores or {}),
            licence=licence,
        )
        save_plan(scratch / PLAN_FILE, plan)
        write_atomic(scratch / MANIFEST_FILE, to_json(manifest))
        if reference_case:
            case = _make_reference(plan, configuration, weights)
            write_atomic(scratch / REFERENCE_FILE, to_json(case))
        _write_sums(scratch)
        _move_into_place(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return load_bundle(folder)


def find_bundle(path: Path) -> Path:
    """Return the bundle folder meant by ``path``: itself, or the ``model`` inside a run.

    Raises:
        BundleError: there is none; says what was looked for.
        SecurityError: the path is a file in a format that can run code.
    """
    if path.is_file():
        if path.suffix.lower() in UNSAFE_SUFFIXES:
            raise SecurityError(
                f"{path}: '{path.suffix}' files can run code when loaded. "
                "Turn it into a model folder: `medmamba convert import-checkpoint FILE -o MODEL`."
            )
        raise BundleError(f"{path}: is a file; a model is a folder with {MANIFEST_FILE}.")
    for folder in (path, path / MODEL_FOLDER):
        if (folder / MANIFEST_FILE).is_file():
            return folder
    found = "does not exist" if not path.exists() else "is no model"
    raise BundleError(
        f"{path}: {found}. Looked for {MANIFEST_FILE} there and in {MODEL_FOLDER}/. "
        "Give the model folder that training wrote, or the run folder that holds it."
    )


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a bundle or run folder, without checking the other files.

    Raises:
        BundleError: there is none, it is damaged, or of a newer version; names the key.
    """
    folder = find_bundle(path)
    content = read_json(folder / MANIFEST_FILE, what="model manifest", error=BundleError)
    version = content.get("schema_version") if isinstance(content, dict) else None
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise BundleError(
            f"{folder / MANIFEST_FILE}: key 'schema_version' is {version!r}; this version of "
            f"medmamba reads up to {SCHEMA_VERSION}. Use a newer medmamba."
        )
    return from_plain(Manifest, content, what=str(folder / MANIFEST_FILE), error=BundleError)


def load_bundle(path: Path, *, folds: Sequence[int | str] | None = None) -> Bundle:
    """Check a bundle (or the one inside a run folder) and read all but the tensors.

    Args:
        path: bundle folder, or run folder with a ``model`` in it.
        folds: use only these; all that the manifest names when omitted.

    Raises:
        BundleError: missing or damaged parts, unknown keys, newer versions.
        SecurityError: a file does not match its hash, or a path leaves the folder.
    """
    folder = find_bundle(path)
    manifest = _chosen_folds(read_manifest(folder), folder, folds)
    used = [MANIFEST_FILE, manifest.plan, *(entry.file for entry in manifest.weights)]
    used += [REFERENCE_FILE] if (folder / REFERENCE_FILE).exists() else []
    for name in used:
        _require_file(folder, name)
    for entry in manifest.weights:
        _check_size(folder / entry.file, entry.size_bytes)
    _check_sums(folder, used)
    for entry in manifest.weights:
        check_tensor_file(folder / entry.file)
    plan = load_plan(folder / manifest.plan)
    _check_agreement(folder, manifest, plan)
    return Bundle(folder=folder, manifest=manifest, plan=plan, sha256=hash_file(folder / SUMS_FILE))


def load_networks(bundle: Bundle) -> "list[nn.Module]":
    """Build one network per fold with its weights, on the CPU, in evaluation mode.

    Raises:
        BundleError: tensors are missing, unexpected, misshapen or not finite; names them.
    """
    from medmamba.networks.weights import load_weights

    paths = [bundle.folder / entry.file for entry in bundle.manifest.weights]
    return [_build(bundle.configuration, load_weights(path), what=str(path)) for path in paths]


def verify_bundle(bundle: Bundle) -> Acceptance:
    """Repeat the bundle's reference case here, on the CPU in float32.

    Raises:
        BundleError: the bundle carries none, or one of another version.
    """
    path = bundle.folder / REFERENCE_FILE
    content = read_json(path, what="reference case", error=BundleError)
    case = from_plain(ReferenceCase, content, what=str(path), error=BundleError)
    plan = bundle.plan
    networks = load_networks(bundle)
    return repeat_reference_case(
        case, networks, bundle.configuration, plan.label_map, plan.intensities
    )


def _make_reference(
    plan: Plan, configuration: str, weights: "Sequence[Mapping[str, Tensor]]"
) -> ReferenceCase:
    branch = plan.configurations[configuration]
    networks = [_build(branch, state, what="weights") for state in weights]
    return make_reference_case(networks, branch, plan.label_map, plan.intensities)


def _build(
    configuration: ConfigurationPlan, state: "Mapping[str, Tensor]", *, what: str
) -> "nn.Module":
    from medmamba.networks import build_network
    from medmamba.networks.weights import load_exactly

    _require_finite(state, what)
    network = build_network(configuration.network)
    load_exactly(network, state, what=what)
    return network.eval().requires_grad_(False)


def _write_weights(
    folder: Path, names: Sequence[str], weights: "Sequence[Mapping[str, Tensor]]"
) -> tuple[WeightsEntry, ...]:
    from medmamba.networks.weights import save_weights

    entries = []
    for fold, state in zip(names, weights, strict=True):
        file = f"{WEIGHTS_FOLDER}/fold_{fold}.safetensors"
        save_weights(folder / file, state)
        size = (folder / file).stat().st_size
        entries.append(WeightsEntry(fold=fold, file=file, size_bytes=size))
    return tuple(entries)


def _label_entries(plan: Plan) -> tuple[LabelEntry, ...]:
    colors = label_colors(plan.label_map.foreground)
    return tuple(
        LabelEntry(name=name, values=values, color=colors[name])
        for name, values in plan.label_map.foreground.items()
    )


def _write_sums(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{hash_file(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    write_atomic(folder / SUMS_FILE, "".join(lines))


def _move_into_place(scratch: Path, folder: Path) -> None:
    """Rename a finished folder over an old one; for an instant there may be none, never half."""
    old = folder.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:12]}-old-{folder.name}")
    try:
        sync_folder(scratch)
        if folder.exists():
            folder.rename(old)
        scratch.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise EnvironmentFault(
            f"{folder}: cannot be written ({error.strerror or error}). "
            "Check permissions and free space.",
            code="E_IO_WRITE",
        ) from error
    shutil.rmtree(old, ignore_errors=True)


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
    return replace(manifest, weights=chosen)


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
    spec = plan.configurations[manifest.configuration].network
    pairs = (
        (
            "labels",
            {entry.name: entry.values for entry in manifest.labels},
            plan.label_map.foreground,
        ),
        ("channels", manifest.channels, plan.channel_names),
        ("network", manifest.network, spec.name),
        ("labels (outputs)", plan.label_map.output_channels, spec.out_channels),
    )
    for key, found, needed in pairs:
        if found != needed:
            raise BundleError(
                f"{folder}: key '{key}' of {MANIFEST_FILE} is {found!r}, the plan says {needed!r}. "
                "Manifest and plan do not belong together."
            )


def _require_finite(state: "Mapping[str, Tensor]", what: str) -> None:
    bad = [
        name
        for name, tensor in state.items()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]
    if bad:
        raise BundleError(
            f"{what}: tensor '{bad[0]}' holds NaN or infinity ({len(bad)} tensors in all). "
            "Training had diverged; use an earlier checkpoint.",
            code="E_MODEL_WEIGHTS",
        )
