"""What the data are: sizes, spacings and foreground intensities, measured and never edited.

Every case is measured once and remembered under the hash of its files, so an interrupted run goes
on where it stopped. The default statistics are exact over all foreground voxels;
``sampling="compatible"`` draws the samples nnU-Net draws.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medmamba.dataset import Case, Dataset, load_case
from medmamba.errors import DatasetError, PlanError
from medmamba.files import (
    RECORD_CONFIG,
    from_plain,
    hash_file,
    hash_values,
    read_json,
    to_json,
    to_plain,
    write_atomic,
)
from medmamba.plans.intensities import ChannelAccumulator, ChannelMeasure, draw_counts, measure
from medmamba.preprocessing.batch import case_bytes, map_bounded, worker_count
from medmamba.preprocessing.crop import box_slices, nonzero_box
from medmamba.preprocessing.memory_gate import free_memory_gate
from medmamba.preprocessing.recipe import ChannelStatistics

Sampling = Literal["exact", "compatible"]
Progress = Callable[[int, int], None]

SAMPLES = 100_000_000
"""Intensities nnU-Net draws per channel, divided among the cases."""

SEED = 1234

KEPT_BYTES = 128 * 1024**2
"""Foreground values kept for the second pass; cases beyond that are read again."""

BYTES_PER_VOXEL = 12
"""Float32 as read, as stacked, and the foreground of it."""

MEASURE_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What planning needs to know of a dataset; cases are in sorted order.

    Args:
        spacings_mm: per case, (z, y, x).
        shapes_after_crop: per case, voxels of the non-zero region's box.
        intensities: foreground statistics per channel.
        median_relative_size_after_cropping: part of a case that its box holds.
        label_voxels: label value -> voxels over all cases.
        sampling: whether the statistics are exact or of nnU-Net's random samples.
    """

    __pydantic_config__ = RECORD_CONFIG

    dataset_name: str
    spacings_mm: tuple[tuple[float, float, float], ...]
    shapes_after_crop: tuple[tuple[int, int, int], ...]
    intensities: tuple[ChannelStatistics, ...]
    median_relative_size_after_cropping: float
    case_ids: tuple[str, ...] = ()
    label_voxels: Mapping[int, int] = field(default_factory=dict)
    sampling: Sampling = "exact"

    @property
    def content_hash(self) -> str:
        """SHA-256 of everything planning looks at."""
        return hash_values(fingerprint_to_nnunet(self))


def fingerprint_to_nnunet(fingerprint: Fingerprint) -> dict[str, Any]:
    """Return the content of nnU-Net's dataset_fingerprint.json."""
    return {
        "foreground_intensity_properties_per_channel": {
            str(index): dict(sorted(to_plain(statistics).items()))
            for index, statistics in enumerate(fingerprint.intensities)
        },
        "median_relative_size_after_cropping": fingerprint.median_relative_size_after_cropping,
        "shapes_after_crop": [list(shape) for shape in fingerprint.shapes_after_crop],
        "spacings": [list(spacing) for spacing in fingerprint.spacings_mm],
    }


def fingerprint_from_nnunet(content: Mapping[str, Any], dataset_name: str) -> Fingerprint:
    """Read nnU-Net's dataset_fingerprint.json.

    Raises:
        PlanError: a key is missing or unusable.
    """
    try:
        per_channel = content["foreground_intensity_properties_per_channel"]
        plain = {
            "dataset_name": dataset_name,
            "spacings_mm": content["spacings"],
            "shapes_after_crop": content["shapes_after_crop"],
            "intensities": [per_channel[key] for key in sorted(per_channel, key=int)],
            "median_relative_size_after_cropping": content["median_relative_size_after_cropping"],
            "sampling": "compatible",
        }
    except KeyError as problem:
        raise PlanError(f"fingerprint: key {problem} is missing. Fingerprint again.") from problem
    return from_plain(Fingerprint, plain, what="fingerprint", error=PlanError)


def compute_fingerprint(
    dataset: Dataset,
    *,
    workers: int | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
    sampling: Sampling = "exact",
) -> Fingerprint:
    """Measure every training case.

    Args:
        dataset: the raw dataset.
        workers: cases measured at once; one a core, at most 8, when None.
        folder: where measurements of single cases are kept, so that a run can be continued.
        progress: called with (cases done, cases in all).
        sampling: ``compatible`` for nnU-Net's own random samples.

    Raises:
        DatasetError: there are no cases, or no foreground in any of them.
        InputError: a file cannot be read.
    """
    cases = sorted(dataset.training_cases, key=lambda case: case.id)
    if not cases:
        raise DatasetError(f"{dataset.name}: no training cases. Check imagesTr and labelsTr.")
    pass_one = _Pass(
        folder=folder,
        sampling=sampling,
        draws=SAMPLES // len(cases),
        channels=len(dataset.channel_names),
    )
    channels = [ChannelAccumulator() for _ in dataset.channel_names]
    sizes: list[_CaseSize] = []
    unfinished: list[tuple[Case, tuple[bool, ...]]] = []
    with ThreadPoolExecutor(worker_count(workers)) as pool:
        for done, (case, found) in enumerate(
            zip(cases, map_bounded(pool, pass_one.measure_case, cases), strict=True), start=1
        ):
            sizes.append(found.size)
            for channel, part in zip(channels, found.channels, strict=True):
                channel.add(case.id, part)
            if not all(part.is_whole for part in found.channels):
                unfinished.append((case, tuple(part.is_whole for part in found.channels)))
            if progress is not None:
                progress(done, len(cases))
    if not all(channel.count for channel in channels):
        raise DatasetError(
            f"{dataset.name}: no labelled voxel in any case. Check the label files.",
            code="E_DATASET_NO_FOREGROUND",
        )
    _refine(channels, unfinished, pass_one)
    return _assemble(dataset.name, cases, sizes, channels, sampling)


@dataclass(frozen=True, kw_only=True)
class _CaseSize:
    __pydantic_config__ = RECORD_CONFIG

    spacing_mm: tuple[float, float, float]
    shape_after_crop: tuple[int, int, int]
    relative_size: float
    label_voxels: dict[int, int]


@dataclass(frozen=True, kw_only=True)
class _CaseMeasure:
    __pydantic_config__ = RECORD_CONFIG

    key: str
    size: _CaseSize
    channels: tuple[ChannelMeasure, ...]


class _Pass:
    """Measuring single cases, with what is remembered of them on disk and in memory."""

    def __init__(
        self, *, folder: Path | None, sampling: Sampling, draws: int, channels: int
    ) -> None:
        self._gate = free_memory_gate()
        self._channels = channels
        self._folder = folder
        self._sampling = sampling
        self._draws = draws
        self._kept: dict[str, NDArray[np.float32]] = {}
        self._kept_bytes = 0
        self._lock = threading.Lock()

    def measure_case(self, case: Case) -> _CaseMeasure:
        """Return the measurements of a case, from disk if its files have not changed."""
        key = self._key(case)
        known = self._remembered(case, key)
        if known is not None:
            return known
        with self._gate.hold(case_bytes(case, self._channels, BYTES_PER_VOXEL)):
            size, foreground = _read(case)
        found = _CaseMeasure(
            key=key,
            size=size,
            channels=tuple(
                measure(values, weights)
                for values, weights in zip(foreground, self._weights(foreground), strict=True)
            ),
        )
        if not all(part.is_whole for part in found.channels):
            self._keep(case, foreground)
        if self._folder is not None:
            write_atomic(self._folder / f"{case.id}.json", to_json(found))
        return found

    def foreground(self, case: Case) -> tuple[NDArray[np.float32], Any]:
        """Return foreground values (C, n) and weights of a case, reading it again if need be."""
        kept = self._kept.pop(case.id, None)
        values = kept if kept is not None else _read(case)[1]
        return values, list(self._weights(values))

    def _weights(self, foreground: NDArray[np.float32]) -> Iterator[NDArray[np.int64] | None]:
        random = np.random.RandomState(SEED)
        for values in foreground:
            if self._sampling == "exact" or values.size == 0:
                yield None
            else:
                yield draw_counts(values.size, self._draws, random)

    def _keep(self, case: Case, foreground: NDArray[np.float32]) -> None:
        with self._lock:
            if self._kept_bytes + foreground.nbytes <= KEPT_BYTES:
                self._kept[case.id] = foreground
                self._kept_bytes += foreground.nbytes

    def _key(self, case: Case) -> str:
        if self._folder is None:
            return ""
        files = [*case.images, *([case.labels] if case.labels else [])]
        draws = self._draws if self._sampling == "compatible" else 0
        return hash_values([MEASURE_FORMAT, draws, [hash_file(path) for path in files]])

    def _remembered(self, case: Case, key: str) -> _CaseMeasure | None:
        path = None if self._folder is None else self._folder / f"{case.id}.json"
        if path is None or not path.is_file():
            return None
        try:
            content = read_json(path, what="fingerprint of a case", error=DatasetError)
            found = from_plain(_CaseMeasure, content, what=str(path), error=DatasetError)
        except DatasetError:
            return None
        return found if found.key == key else None


def _read(case: Case) -> tuple[_CaseSize, NDArray[np.float32]]:
    """Read a case; return its sizes and its foreground intensities (C, n)."""
    image, labels, _ = load_case(case)
    channels = image.array.astype(np.float32, copy=False)
    if labels is None:
        raise DatasetError(f"case {case.id}: no label file. Add it or remove the case.")
    box = nonzero_box(channels)
    inside = box_slices(box)
    cropped = labels.array[0][inside]
    foreground = channels[(slice(None), *inside)][:, cropped > 0]
    values, counts = np.unique(cropped, return_counts=True)
    shape = tuple(stop - start for start, stop in box)
    return (
        _CaseSize(
            spacing_mm=image.geometry.spacing_mm,
            shape_after_crop=(shape[0], shape[1], shape[2]),
            relative_size=prod(shape) / prod(image.geometry.shape),
            label_voxels={int(v): int(n) for v, n in zip(values, counts, strict=True)},
        ),
        foreground,
    )


def _refine(
    channels: list[ChannelAccumulator],
    unfinished: list[tuple[Case, tuple[bool, ...]]],
    source: _Pass,
) -> None:
    refined = [channel for channel in channels if channel.needs_refinement]
    for channel in refined:
        channel.prepare_refinement()
    for case, whole in unfinished if refined else []:
        values, weights = source.foreground(case)
        for index, channel in enumerate(channels):
            if not whole[index]:
                channel.refine(values[index], weights[index])


def _assemble(
    name: str,
    cases: list[Case],
    sizes: list[_CaseSize],
    channels: list[ChannelAccumulator],
    sampling: Sampling,
) -> Fingerprint:
    label_voxels: dict[int, int] = {}
    for size in sizes:
        for value, count in size.label_voxels.items():
            label_voxels[value] = label_voxels.get(value, 0) + count
    return Fingerprint(
        dataset_name=name,
        case_ids=tuple(case.id for case in cases),
        spacings_mm=tuple(size.spacing_mm for size in sizes),
        shapes_after_crop=tuple(size.shape_after_crop for size in sizes),
        intensities=tuple(channel.statistics() for channel in channels),
        median_relative_size_after_cropping=float(np.median([s.relative_size for s in sizes])),
        label_voxels=dict(sorted(label_voxels.items())),
        sampling=sampling,
    )
