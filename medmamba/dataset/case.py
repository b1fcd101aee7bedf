"""A case and a dataset as values; reading a case and holding its files against each other."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medmamba.dataset.splits import Split
from medmamba.errors import InputError
from medmamba.io import (
    DEFAULT_GATE,
    TRAINING_GATE,
    Gate,
    SourceHeader,
    judge_image,
    judge_modality,
    read_image,
    read_labels,
    turn,
)
from medmamba.labels import LabelMap
from medmamba.volume import Geometry, Volume

CHANNEL_TOLERANCE_VOXELS = 1e-3
"""Channels of a case to predict must lie on one grid to this accuracy at every corner."""
TRAINING_TOLERANCE_VOXELS = 0.1
"""Training files may differ by what rewriting a header costs; that much moves no label."""

STRICT_CODES = {"W_HU_RANGE": "E_HU_RANGE", "W_MODALITY": "E_MODALITY"}
"""What a strict gate makes of warnings about values."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One subject: its channel files and, for training, its labels.

    Args:
        id: name of the case in every output.
        images: one path per channel, or a single file that holds all channels.
        labels: label file, None when there is none.
        acquisition: which part of a DICOM series it is; empty for the whole.
        known_as: the name that ``id`` stands for, where no output may say it.
    """

    id: str
    images: tuple[Path, ...]
    labels: Path | None = None
    acquisition: str = ""
    known_as: str = ""

    def gate(self, gate: Gate) -> Gate:
        """``gate`` as reading this case's images needs it."""
        return replace(gate, acquisition=self.acquisition) if self.acquisition else gate


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A raw dataset folder, understood but not yet verified.

    Args:
        folder: where dataset.json lies.
        name: such as ``Dataset004_Hippocampus``.
        description: dataset.json in nnU-Net v2 form, whichever layout was read.
        channel_names: in channel order.
        label_map: meaning of label values.
        file_ending: suffix of images and labels, with its dot.
        training_cases: sorted by id; channels or labels may be missing (``verify`` tells).
        test_cases: sorted by id, from imagesTs.
        layout: ``nnunet`` or ``decathlon``.
        stray_files: files of the dataset's ending that belong to no case.
        splits: folds of a splits_final.json in the folder; empty when there is none.
        faults: what is wrong with dataset.json and splits_final.json themselves; a dataset with
            faults can be verified and no more.
    """

    folder: Path
    name: str
    description: dict[str, Any]
    channel_names: tuple[str, ...]
    label_map: LabelMap
    file_ending: str
    training_cases: tuple[Case, ...]
    test_cases: tuple[Case, ...] = ()
    layout: str = "nnunet"
    stray_files: tuple[Path, ...] = ()
    splits: tuple[Split, ...] = ()
    faults: tuple[str, ...] = ()

    @property
    def channels_in_one_file(self) -> bool:
        """Whether a case is a single file that holds every channel (4D or colour)."""
        return len(self.channel_names) > 1 and all(
            len(case.images) == 1 for case in self.training_cases
        )

    def case(self, case_id: str) -> Case:
        """Return the training case called ``case_id``.

        Raises:
            KeyError: there is none.
        """
        for case in self.training_cases:
            if case.id == case_id:
                return case
        raise KeyError(case_id)


def load_case(
    case: Case,
    *,
    channels: int | None = None,
    dimension: int | None = None,
    gate: Gate | None = None,
    orientation: str | None = None,
    channel_names: Sequence[str] = (),
    allow_geometry_mismatch: bool = False,
) -> tuple[Volume, Volume | None, SourceHeader]:
    """Read image (C, D, H, W), labels (1, D, H, W) if there are any, and the first file's header.

    Args:
        case: what to read.
        channels: channels the image must have, None for any.
        dimension: 3 when planes cannot be taken; None or 2 when they can.
        gate: limits of reading; files with labels are read with the training gate by default.
        orientation: turn the axes to point this way, such as ``RAS``; as stored when None.
            ``write_labels`` turns labels back.
        channel_names: what the model calls its channels; one named ``CT`` is held to it.
        allow_geometry_mismatch: accept files whose grids agree in shape only.

    Raises:
        InputError: a file cannot be trusted, or the files do not belong together.
    """
    training = case.labels is not None
    chosen = case.gate(gate or (TRAINING_GATE if training else DEFAULT_GATE))
    tolerance = TRAINING_TOLERANCE_VOXELS if training else CHANNEL_TOLERANCE_VOXELS
    image, header = _load_channels(
        case, chosen, tolerance=np.inf if allow_geometry_mismatch else tolerance
    )
    if dimension == 3 and header.dimension == 2:
        raise InputError(
            f"case {case.id}: {case.images[0].name} is a plane; the model takes volumes. Give the "
            "whole volume, or a 2D model.",
            code="E_SHAPE_NDIM",
        )
    _require_channels(case, image, channels)
    header = _judge_values(case, image, header, training=training)
    header = _judge_modality(case, image, header, channel_names, strict=chosen.strict)
    if case.labels is None:
        if orientation is not None:
            image, header = turn(image, header, orientation)
        return image, None, header
    labels, _ = read_labels(case.labels, gate=chosen)
    problem = grid_difference(
        image.geometry,
        labels.geometry,
        tolerance_voxels=np.inf if allow_geometry_mismatch else tolerance,
    )
    if problem:
        raise InputError(
            f"case {case.id}: labels are on another grid than the image ({problem}). "
            "Resample the labels onto the image or remove the case.",
            code="E_LABEL_GRID",
        )
    if orientation is not None:
        labels, _ = turn(labels, header, orientation)
        image, header = turn(image, header, orientation)
    return image, labels, header


def _load_channels(case: Case, gate: Gate, *, tolerance: float) -> tuple[Volume, SourceHeader]:
    if not case.images:
        raise InputError(f"case {case.id}: has no image file. Add it.", code="E_CHAN_COUNT")
    first, header = read_image(case.images[0], gate=gate)
    if len(case.images) == 1:
        return first, header
    arrays, warnings = [first.array], list(header.warnings)
    for path in case.images[1:]:
        volume, other = read_image(path, gate=gate)
        problem = grid_difference(first.geometry, volume.geometry, tolerance_voxels=tolerance)
        if problem:
            raise InputError(
                f"case {case.id}: {path.name} is on another grid than {case.images[0].name} "
                f"({problem}). Resample the channels onto one grid.",
                code="E_CHAN_GRID",
            )
        arrays.append(volume.array)
        warnings += [item for item in other.warnings if item not in warnings]
    joined = Volume(array=np.concatenate(arrays), geometry=first.geometry)
    return joined, replace(header, warnings=tuple(warnings))


def _require_channels(case: Case, image: Volume, channels: int | None) -> None:
    found = image.array.shape[0]
    if channels is None or found == channels:
        return
    if len(case.images) == 1 and channels == 1:
        raise InputError(
            f"case {case.id}: {case.images[0].name} holds {found} volumes; the model takes one. "
            "Split it into files of one volume each.",
            code="E_SHAPE_4D",
        )
    raise InputError(
        f"case {case.id}: has {found} channels; {channels} are needed. "
        f"Name the files {case.id}_0000 to {case.id}_{channels - 1:04d}.",
        code="E_CHAN_COUNT",
    )


def _judge_modality(
    case: Case, image: Volume, header: SourceHeader, names: Sequence[str], *, strict: bool
) -> SourceHeader:
    findings = judge_modality(image.array, names)  # type: ignore[arg-type]
    if findings and strict:
        raise InputError(
            f"case {case.id}: {findings[0].message} Export it again, or predict without --strict.",
            code=STRICT_CODES[findings[0].code],
        )
    return replace(header, warnings=(*header.warnings, *map(str, findings)))


def _judge_values(
    case: Case, image: Volume, header: SourceHeader, *, training: bool
) -> SourceHeader:
    findings = judge_image(image.array)  # type: ignore[arg-type]
    constant = [item for item in findings if item.is_error]
    # An absent modality filled with zeros is common in training data; in a case to predict it is
    # a sign that something went wrong on the way here.
    if constant and (not training or len(constant) == image.array.shape[0]):
        raise InputError(
            f"case {case.id}: {constant[0].message} Export the image again.", code=constant[0].code
        )
    texts = (str(item).replace("E_VAL_CONSTANT", "W_VAL_CONSTANT") for item in findings)
    return replace(header, warnings=(*header.warnings, *texts))


def grid_difference(first: Geometry, second: Geometry, *, tolerance_voxels: float) -> str:
    """Say how two grids differ, with both values; empty when they agree."""
    if first.shape != second.shape:
        return f"shape {_times(second.shape)}, expected {_times(first.shape)}"
    distance = first.corner_distance(second) if np.isfinite(tolerance_voxels) else 0.0
    if distance <= tolerance_voxels:
        return ""
    if not np.allclose(first.spacing_mm, second.spacing_mm, rtol=1e-4):
        return f"spacing {_listed(second.spacing_mm)} mm, expected {_listed(first.spacing_mm)} mm"
    columns = first.matrix[:3, :3] / np.array(first.spacing_mm)
    others = second.matrix[:3, :3] / np.array(second.spacing_mm)
    if not np.allclose(columns, others, atol=1e-3):
        return f"axes point {_listed(others.T.ravel())}, expected {_listed(columns.T.ravel())}"
    return (
        f"origin {_listed(second.matrix[:3, 3])} mm, expected {_listed(first.matrix[:3, 3])} mm: "
        f"{distance:.3g} voxels apart"
    )


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in shape)


def _listed(values: Any) -> str:
    return "(" + ", ".join(f"{float(value):.5g}" for value in values) + ")"
