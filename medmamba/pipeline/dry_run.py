"""dry_run(): what ``predict`` would do, without doing it. The gate judges every file; no torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

from medmamba.bundle import Bundle, load_bundle
from medmamba.dataset import Case, Rejection
from medmamba.dataset.manifest import CaseStream
from medmamba.dataset.shards import parse_shard
from medmamba.errors import MedMambaError
from medmamba.files import RECORD_CONFIG
from medmamba.inference.casework import mask_suffix
from medmamba.inference.records import (
    CommitRecord,
    identify,
    read_record,
    records_folder,
    still_holds,
)
from medmamba.io import DEFAULT_GATE, Gate, SourceHeader, read_header
from medmamba.pipeline.checking import check_case
from medmamba.pipeline.predicting import open_work
from medmamba.preprocessing.memory_gate import available_bytes

Decision = Literal["predict", "keep", "reject"]

BYTES_PER_VOXEL = 8
"""A float32 image as read, and its copy on the working grid; of the larger of the two."""


@dataclass(frozen=True, kw_only=True)
class PlannedCase:
    """What would become of a case.

    Args:
        case_id: name of the case.
        decision: ``keep`` where a record from this model and input still holds.
        reason: why, in words.
        warnings: what the gate noticed.
        output: name of the mask.
        shape: voxels (D, H, W) of the mask.
        working_shape: voxels the network would see, by the model's spacing.
        memory_bytes: that images of the case take, besides the network.
        disk_bytes: that the mask takes at most.
    """

    __pydantic_config__ = RECORD_CONFIG

    case_id: str
    decision: Decision
    reason: str
    warnings: tuple[str, ...] = ()
    output: str = ""
    shape: tuple[int, ...] = ()
    working_shape: tuple[int, ...] = ()
    memory_bytes: int = 0
    disk_bytes: int = 0


def dry_run(
    images: Path | str,
    output: Path | str,
    model: Path | str,
    *,
    overwrite: str = "stale",
    shard: str | None = None,
    root: Path | str | None = None,
    follow_links: bool = False,
    split: bool = False,
    gate: Gate = DEFAULT_GATE,
    max_ram_bytes: int | None = None,
    bids_suffixes: Sequence[str] = (),
) -> tuple[PlannedCase, ...]:
    """Say what ``predict`` would do with each case; nothing is written and no weights are loaded.

    A case is said to be kept if its record speaks of the same input and model; should device or
    precision turn out different, it would be done again after all.

    Args:
        images: an image, a folder, or a list file.
        output: folder for masks and records.
        model: model folder, or the run folder that holds it.
        overwrite: which finished cases to do again.
        shard: one share of the cases.
        root: what the paths of a list are relative to.
        follow_links: take images outside the input folder too.
        split: make every acquisition of a DICOM series a case of its own.
        gate: limits and permissions of reading.
        max_ram_bytes: reject a case that takes more memory; what is free now when None.
        bids_suffixes: which images of a BIDS folder are meant.

    Raises:
        BundleError, SecurityError: the model cannot be used or trusted.
        UsageError: no image there.
    """
    bundle = load_bundle(Path(model))
    share = None if shard is None else parse_shard(shard)
    work = open_work(
        bundle, Path(images), Path(output), root=root, share=share, follow_links=follow_links,
        split=split, bids_suffixes=bids_suffixes,
    )  # fmt: skip
    budget = max_ram_bytes or available_bytes()
    listed: Iterable[Case | Rejection] = (
        work if isinstance(work, CaseStream) else (*work.cases, *work.rejected)
    )
    planned = [
        PlannedCase(case_id=item.id, decision="reject", reason=f"{item.code}: {item.message}")
        if isinstance(item, Rejection)
        else _plan(
            item, records_folder(Path(output)), bundle, overwrite, gate=gate, budget_bytes=budget
        )
        for item in listed
    ]
    return tuple(sorted(planned, key=lambda item: item.case_id))


def _plan(
    case: Case, folder: Path, bundle: Bundle, overwrite: str, *, gate: Gate, budget_bytes: int
) -> PlannedCase:
    checked = check_case(
        case, len(bundle.manifest.channels), bundle.configuration.grid.dimension, gate=gate,
        channel_names=bundle.manifest.channels,
    )  # fmt: skip
    if not checked.accepted:
        return PlannedCase(case_id=case.id, decision="reject", reason=checked.errors[0])
    header = read_header(case.images[0], gate=case.gate(gate))
    working = _working_shape(header, bundle)
    voxels = max(prod(header.geometry.shape), prod(working)) * len(bundle.manifest.channels)
    decision, reason = _decide(case, folder, bundle, overwrite)
    needed = voxels * BYTES_PER_VOXEL
    if needed > budget_bytes and decision == "predict":
        decision, reason = "reject", f"E_LIMIT_RAM: takes {needed} bytes, {budget_bytes} are there"
    return PlannedCase(
        case_id=case.id,
        decision=decision,
        reason=reason,
        warnings=checked.warnings,
        output=f"{case.id}{mask_suffix(header)}",
        shape=header.geometry.shape,
        working_shape=working,
        memory_bytes=needed,
        disk_bytes=prod(header.geometry.shape),
    )


def _working_shape(header: SourceHeader, bundle: Bundle) -> tuple[int, ...]:
    """The grid of the first member, before cropping to what is not background."""
    branch = bundle.configuration
    order = branch.preprocessing.transpose_forward
    shape = [header.geometry.shape[axis] for axis in order]
    spacing = [header.geometry.spacing_mm[axis] for axis in order]
    target = branch.grid.spacing_mm
    fixed = len(shape) - len(target)
    scaled = [
        max(1, round(size * have / want))
        for size, have, want in zip(shape[fixed:], spacing[fixed:], target, strict=True)
    ]
    return (*shape[:fixed], *scaled)


def _decide(case: Case, folder: Path, bundle: Bundle, overwrite: str) -> tuple[Decision, str]:
    record = read_record(folder / f"{case.id}.json")
    if record is None:
        return "predict", "not done yet"
    if overwrite == "always":
        return "predict", "done, and to be done again"
    if not still_holds(record, folder):
        return "predict", f"its record says '{record.status}', or its mask has changed"
    if overwrite == "never":
        return "keep", "done"
    return _compare(record, case, bundle)


def _compare(record: CommitRecord, case: Case, bundle: Bundle) -> tuple[Decision, str]:
    if record.model is None or record.model.sha256 != bundle.sha256:
        return "predict", "done with another model"
    try:
        inputs = [identity.sha256 for identity in identify(case.images)]
    except MedMambaError as error:
        return "reject", f"{error.code}: {error.message}"
    if inputs != [identity.sha256 for identity in record.inputs]:
        return "predict", "its input has changed"
    return "keep", "done with this model from this input"
