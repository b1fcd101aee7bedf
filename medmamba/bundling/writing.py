"""Writing bundles, whole or not at all."""

import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmamba.acceptance import ReferenceCase, make_probes, make_reference_case
from medmamba.bundling.card import render_card
from medmamba.bundling.manifest import (
    CARD_FILE,
    MANIFEST_FILE,
    MEMBERS_FOLDER,
    PLAN_FILE,
    POSTPROCESSING_FILE,
    PREVIOUS_PREFIX,
    PROBES_FILE,
    REFERENCE_FILE,
    SUMS_FILE,
    WEIGHTS_FOLDER,
    LabelEntry,
    Manifest,
    WeightsEntry,
)
from medmamba.bundling.reading import Bundle, build_loaded, load_bundle, require_alike
from medmamba.errors import BundleError, EnvironmentFault
from medmamba.evaluation.palette import label_colors
from medmamba.files import TEMPORARY_PREFIX, hash_file, sync_folder, to_json, write_atomic
from medmamba.inference.probe import Probes
from medmamba.labels import UsualVolume
from medmamba.plans.nnunet_schema import save_plan
from medmamba.plans.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor


def save_bundle(
    folder: Path,
    *,
    plan: Plan,
    configuration: str,
    weights: "Sequence[Mapping[str, Tensor]]",
    previous_weights: "Sequence[Mapping[str, Tensor]]" = (),
    folds: Sequence[int | str] | None = None,
    name: str | None = None,
    precision: str = "fp32",
    training: Mapping[str, Any] | None = None,
    scores: Mapping[str, Any] | None = None,
    postprocessing: Mapping[str, Any] | None = None,
    licence: str = "not stated",
    usual_volumes: Mapping[str, UsualVolume] | None = None,
    orientation: str = "",
    reference_case: bool = True,
) -> Bundle:
    """Write a bundle so that ``folder`` is either the old one or the whole new one.

    Args:
        folder: where to; an existing bundle there is replaced.
        plan: the whole plan; it travels with the weights.
        configuration: the branch of it that the weights belong to.
        weights: one state dict per fold.
        previous_weights: of a cascade's first stage, likewise.
        folds: their names; 0, 1, ... when omitted.
        name: for people.
        precision: in which the scores were measured.
        training: JSON values that say how the weights came to be.
        scores: JSON values.
        postprocessing: content of a postprocessing.json; None for no postprocessing.
        licence: of the weights.
        usual_volumes: of labels in the training cases.
        orientation: of the training images, where all have the same.
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
    is_cascade = plan.configurations[configuration].previous_stage is not None
    if len(previous_weights) != (len(weights) if is_cascade else 0):
        raise BundleError(
            f"bundle {folder}: {len(previous_weights)} sets of weights of the first stage for "
            f"{len(weights)} of '{configuration}'. A cascade needs one for each, others none."
        )

    def fill(scratch: Path) -> None:
        manifest = Manifest(
            name=name or f"{plan.dataset_name} {plan.network}",
            network=plan.configurations[configuration].network.name,
            configuration=configuration,
            labels=_label_entries(plan),
            channels=plan.channel_names,
            weights=_write_weights(scratch, names, weights),
            previous_weights=_write_weights(
                scratch, names if is_cascade else (), previous_weights, PREVIOUS_PREFIX
            ),
            postprocessing=None if postprocessing is None else POSTPROCESSING_FILE,
            mirror_axes=plan.configurations[configuration].training.mirror_axes,
            precision=precision,
            training=dict(training or {}),
            scores=dict(scores or {}),
            licence=licence,
            usual_volumes=dict(usual_volumes or {}),
            orientation=orientation,
        )
        save_plan(scratch / PLAN_FILE, plan)
        _write_description(scratch, manifest, postprocessing)
        if reference_case:
            case, probes = _make_reference(plan, configuration, weights, previous_weights)
            write_atomic(scratch / REFERENCE_FILE, to_json(case))
            write_atomic(scratch / PROBES_FILE, to_json(probes))

    return _write_whole(folder, fill)


def save_ensemble(
    folder: Path,
    members: Sequence[Path],
    *,
    name: str,
    training: Mapping[str, Any] | None = None,
    scores: Mapping[str, Any] | None = None,
    postprocessing: Mapping[str, Any] | None = None,
    licence: str = "not stated",
) -> Bundle:
    """Write a bundle that predicts the mean of the probabilities of others, which it contains.

    Args:
        folder: where to; an existing bundle there is replaced.
        members: bundles of single networks for the same labels and channels; they are copied.
        name: for people.
        training: JSON values that say how the members came to be.
        scores: JSON values.
        postprocessing: content of a postprocessing.json; None for no postprocessing.
        licence: of the weights.

    Raises:
        BundleError: the members do not fit each other, or are not single networks.
        SecurityError: a member is damaged.
        EnvironmentFault: the place cannot be written.
    """
    bundles = [load_bundle(path) for path in members]
    if len(bundles) < 2 or any(bundle.members for bundle in bundles):
        raise BundleError(
            f"bundle {folder}: {len(bundles)} members, of which "
            f"{sum(bool(bundle.members) for bundle in bundles)} are ensembles. "
            "Give at least two bundles of single networks."
        )
    require_alike(bundles, f"bundle {folder}")
    names = [
        f"{MEMBERS_FOLDER}/{number}_{bundle.manifest.network}_{bundle.manifest.configuration}"
        for number, bundle in enumerate(bundles)
    ]

    def fill(scratch: Path) -> None:
        for bundle, place in zip(bundles, names, strict=True):
            shutil.copytree(bundle.folder, scratch / place)
        first = bundles[0].manifest
        manifest = Manifest(
            name=name,
            network=" + ".join(bundle.manifest.network for bundle in bundles),
            configuration=" + ".join(bundle.manifest.configuration for bundle in bundles),
            labels=first.labels,
            channels=first.channels,
            weights=(),
            members=tuple(names),
            postprocessing=None if postprocessing is None else POSTPROCESSING_FILE,
            precision=first.precision,
            training=dict(training or {}),
            scores=dict(scores or {}),
            licence=licence,
        )
        _write_description(scratch, manifest, postprocessing)

    return _write_whole(folder, fill)


def _write_whole(folder: Path, fill: Callable[[Path], None]) -> Bundle:
    scratch = folder.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:12]}-{folder.name}")
    try:
        fill(scratch)
        _write_sums(scratch)
        _move_into_place(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return load_bundle(folder)


def _write_description(
    scratch: Path, manifest: Manifest, postprocessing: Mapping[str, Any] | None
) -> None:
    write_atomic(scratch / MANIFEST_FILE, to_json(manifest))
    write_atomic(scratch / CARD_FILE, render_card(manifest))
    if postprocessing is not None:
        write_atomic(scratch / POSTPROCESSING_FILE, to_json(dict(postprocessing)))


def _make_reference(
    plan: Plan,
    configuration: str,
    weights: "Sequence[Mapping[str, Tensor]]",
    previous_weights: "Sequence[Mapping[str, Tensor]]",
) -> tuple[ReferenceCase, Probes]:
    branch = plan.configurations[configuration]
    networks = [build_loaded(branch, state, what="weights") for state in weights]
    previous = None
    if branch.previous_stage is not None:
        first = plan.configurations[branch.previous_stage]
        built = [build_loaded(first, state, what="weights") for state in previous_weights]
        previous = (built, first)
    case = make_reference_case(networks, branch, plan.label_map, plan.intensities, previous)
    return case, make_probes(networks, branch, plan.label_map, plan.intensities, previous)


def _write_weights(
    folder: Path,
    names: Sequence[str],
    weights: "Sequence[Mapping[str, Tensor]]",
    prefix: str = "",
) -> tuple[WeightsEntry, ...]:
    from medmamba.networks.weights import save_weights

    entries = []
    for fold, state in zip(names, weights, strict=True):
        file = f"{WEIGHTS_FOLDER}/{prefix}fold_{fold}.safetensors"
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
