"""Every problem of a raw dataset at once: each file decoded once, several cases at a time.

Says what is wrong, where, with the values found and a proposal; decides nothing, changes nothing.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba.dataset.case import (
    CHANNEL_TOLERANCE_VOXELS,
    TRAINING_TOLERANCE_VOXELS,
    Case,
    Dataset,
    grid_difference,
)
from medmamba.dataset.problems import Problem, VerificationReport, make_problem
from medmamba.dataset.raw import visible_files
from medmamba.dataset.subjects import read_subjects, shared_subjects
from medmamba.errors import InputError
from medmamba.io import (
    DEFAULT_GATE,
    TRAINING_GATE,
    SourceHeader,
    judge_image,
    judge_modality,
    orientation_code,
    read_image,
    read_labels,
)
from medmamba.volume import Geometry

MOST_WORKERS = 8
CONVERTED = "W_GEOM_UNITS: converted"
"""How the warning of a file begins whose unit is not the millimetre."""
_NAMES_SHOWN = 5


@dataclass(kw_only=True)
class _CaseRecord:
    """What one case contributes; filled while its files are read, in one thread."""

    case: Case
    problems: list[Problem] = field(default_factory=list)
    geometry: Geometry | None = None
    dimension: int = 3
    channels: int = 0
    files_read: int = 0
    constant: list[str] = field(default_factory=list)
    content: str = ""
    label_voxels: dict[int, int] = field(default_factory=dict)

    def add(self, code: str, message: str) -> None:
        self.problems.append(make_problem(self.case.id, code, message))


def verify(
    dataset: Dataset,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerificationReport:
    """Check every training case and return all problems.

    Args:
        dataset: from ``open_dataset``.
        workers: cases read at once; one a core, at most 8, when None. Memory is that many images.
        progress: called with (cases done, cases in all) after each.
    """
    count = workers or min(MOST_WORKERS, os.cpu_count() or 1)
    total = len(dataset.training_cases)
    records = []
    with ThreadPoolExecutor(max_workers=max(1, count)) as pool:
        for record in pool.map(lambda case: _verify_case(case, dataset), dataset.training_cases):
            records.append(record)
            if progress is not None:
                progress(len(records), total)
    problems = [make_problem(None, "E_DATASET", fault) for fault in dataset.faults]
    problems += [problem for record in records for problem in record.problems]
    problems += _dataset_problems(dataset, records)
    return VerificationReport(
        dataset=dataset.name,
        cases=total,
        problems=tuple(sorted(problems, key=lambda problem: problem.severity != "fatal")),
        orientations=_orientations(records),
        label_voxels=_summed(record.label_voxels for record in records),
        label_cases=_summed(dict.fromkeys(record.label_voxels, 1) for record in records),
    )


def _verify_case(case: Case, dataset: Dataset) -> _CaseRecord:
    record = _CaseRecord(case=case)
    _check_channel_files(record, dataset)
    digest = hashlib.sha256()
    for path in case.images:
        _check_image(record, path, dataset, digest)
    # A modality that is absent and filled with zeros is common; an empty case is not.
    is_empty = len(record.constant) == record.channels
    for message in record.constant:
        record.add("E_VAL_CONSTANT" if is_empty else "W_VAL_CONSTANT", message)
    if record.geometry is not None:
        record.content = digest.hexdigest()
        _check_channel_total(record, dataset)
    if case.labels is None:
        record.add("E_LABEL_MISSING", f"there is no label file {case.id}{dataset.file_ending}.")
    else:
        _check_labels(record, case.labels, dataset)
    return record


def _check_channel_files(record: _CaseRecord, dataset: Dataset) -> None:
    """Hold the channel numbers in file names against dataset.json."""
    case, ending = record.case, dataset.file_ending
    if dataset.description.get("dataset") is not None or not dataset.channel_names:
        return
    numbers = [path.name[: -len(ending)].rpartition("_")[2] for path in case.images]
    if not all(len(number) == 4 and number.isdigit() for number in numbers):
        return
    expected = {f"{index:04d}" for index in range(len(dataset.channel_names))}
    if set(numbers) == {"0000"} and len(expected) > 1:
        return  # may hold every channel itself; the number of channels read decides
    missing, extra = sorted(expected - set(numbers)), sorted(set(numbers) - expected)
    if missing:
        record.add("E_CHAN_COUNT", f"channel {', '.join(missing)} is missing.")
    if extra:
        record.add(
            "E_CHAN_COUNT",
            f"channel {', '.join(extra)} is there, but dataset.json names {len(expected)}.",
        )


def _check_channel_total(record: _CaseRecord, dataset: Dataset) -> None:
    expected = len(dataset.channel_names)
    if not expected:
        return  # dataset.json does not say, which is a fault of its own
    already = any(problem.code == "E_CHAN_COUNT" for problem in record.problems)
    unread = record.files_read < len(record.case.images)
    if record.channels == expected or already or unread:
        return
    message = f"has {record.channels} channels; dataset.json names {expected}."
    if record.channels == 1:
        missing = ", ".join(f"{index:04d}" for index in range(1, expected))
        message = f"channel {missing} is missing."
    record.add("E_CHAN_COUNT", message)


def _check_image(record: _CaseRecord, path: Path, dataset: Dataset, digest: Any) -> None:
    try:
        volume, header = read_image(path, gate=TRAINING_GATE)
    except InputError as problem:
        record.add(problem.code, problem.message)
        return
    array: NDArray[np.float32] = volume.array  # type: ignore[assignment]
    names = dataset.channel_names[record.channels :]
    record.channels += array.shape[0]
    record.files_read += 1
    digest.update(repr(array.shape).encode())
    digest.update(np.ascontiguousarray(array).data.cast("B"))
    _note_warnings(record, path, header)
    for finding in (*judge_image(array), *judge_modality(array, names)):
        message = f"{path.name}: {finding.message}"
        if finding.code == "E_VAL_CONSTANT":
            record.constant.append(message)
        else:
            record.add(finding.code, message)
    if record.geometry is None:
        record.geometry, record.dimension = volume.geometry, header.dimension
        _note_spacing(record, path, volume.geometry, header)
        return
    _compare(record, volume.geometry, path.name, code="E_CHAN_GRID")


def _note_warnings(record: _CaseRecord, path: Path, header: SourceHeader) -> None:
    for warning in header.warnings:
        code, _, text = warning.partition(": ")
        if code == "W_VAL_NONFINITE":
            record.add("E_VAL_NONFINITE", f"{path.name}: {text.split(';')[0]}.")
        elif code.startswith("W_"):
            record.add(code, f"{path.name}: {text}")


def _note_spacing(
    record: _CaseRecord, path: Path, geometry: Geometry, header: SourceHeader
) -> None:
    spacing = geometry.spacing_mm[3 - header.dimension :]
    gate = DEFAULT_GATE
    if header.format == "picture" or (
        gate.min_spacing_mm <= min(spacing) and max(spacing) <= gate.max_spacing_mm
    ):
        return
    listed = " x ".join(f"{value:.4g}" for value in spacing)
    # Microscopes and maps have any scale; a unit that makes voxels of metres is a slip.
    if max(spacing) > gate.max_spacing_mm and any(CONVERTED in note for note in header.warnings):
        record.add(
            "E_GEOM_SPACING", f"{path.name}: with the unit it states, its voxels are {listed} mm."
        )
        return
    record.add("W_GEOM_SPACING", f"{path.name}: voxels of {listed} mm are unusual.")


def _compare(record: _CaseRecord, geometry: Geometry, name: str, *, code: str) -> None:
    assert record.geometry is not None
    first = record.geometry
    if problem := grid_difference(first, geometry, tolerance_voxels=TRAINING_TOLERANCE_VOXELS):
        record.add(code, f"{name} is on another grid than the first image: {problem}.")
    elif problem := grid_difference(first, geometry, tolerance_voxels=CHANNEL_TOLERANCE_VOXELS):
        record.add("W_GRID_ROUNDING", f"{name} differs slightly from the first image: {problem}.")


def _check_labels(record: _CaseRecord, path: Path, dataset: Dataset) -> None:
    try:
        volume, header = read_labels(path, gate=TRAINING_GATE)
    except InputError as problem:
        record.add(problem.code, problem.message)
        return
    if record.geometry is not None:
        _compare(record, volume.geometry, f"label file {path.name}", code="E_LABEL_GRID")
    _note_warnings(record, path, header)
    record.label_voxels = _count_values(volume.array)
    declared = set(dataset.label_map.all_values)
    undeclared = {key: n for key, n in record.label_voxels.items() if key not in declared}
    if undeclared and declared:
        listed = ", ".join(f"{key} ({n} voxels)" for key, n in sorted(undeclared.items())[:8])
        more = f" and {len(undeclared) - 8} more" if len(undeclared) > 8 else ""
        record.add(
            "E_LABEL_UNDECLARED",
            f"{path.name} holds values that dataset.json does not declare: {listed}{more}.",
        )
    if not any(value > 0 for value in record.label_voxels):
        record.add("W_LABEL_EMPTY", f"{path.name} holds no foreground.")


def _count_values(array: NDArray[np.generic]) -> dict[int, int]:
    low, high = int(array.min()), int(array.max())
    if high - low > np.iinfo(np.uint16).max:
        values, counts = np.unique(array, return_counts=True)
        return {int(value): int(count) for value, count in zip(values, counts, strict=True)}
    shifted = array.reshape(-1).astype(np.int64) - low if low < 0 else array.reshape(-1)
    counts = np.bincount(shifted)
    return {int(value) + min(low, 0): int(counts[value]) for value in np.flatnonzero(counts)}


def _dataset_problems(dataset: Dataset, records: list[_CaseRecord]) -> Iterator[Problem]:
    stated = dataset.description.get("numTraining")
    if stated != len(records) and not (stated is None and dataset.faults):
        yield make_problem(
            None, "E_DATA_COUNT",
            f"dataset.json: 'numTraining' is {stated!r}, but there are {len(records)} cases.",
        )  # fmt: skip
    if dataset.stray_files:
        yield make_problem(
            None, "W_NAME_STRAY",
            f"{len(dataset.stray_files)} files of imagesTr belong to no case: "
            f"{_shown(path.name for path in dataset.stray_files)}.",
        )  # fmt: skip
    yield from _stray_labels(dataset)
    yield from _dimension_problems(records)
    yield from _orientation_problems(records)
    yield from _label_problems(dataset, records)
    yield from _duplicate_problems(dataset, records)
    yield from _split_problems(dataset)


def _stray_labels(dataset: Dataset) -> Iterator[Problem]:
    if dataset.description.get("dataset") is not None:
        return
    known = {f"{case.id}{dataset.file_ending}" for case in dataset.training_cases}
    labels = visible_files(dataset.folder / "labelsTr", dataset.file_ending)
    strays = [path.name for path in labels if path.name not in known]
    if strays:
        message = f"{len(strays)} files of labelsTr have no image: {_shown(strays)}."
        yield make_problem(None, "W_LABEL_STRAY", message)


def _dimension_problems(records: list[_CaseRecord]) -> Iterator[Problem]:
    planes = [r.case.id for r in records if r.geometry is not None and r.dimension == 2]
    volumes = [r.case.id for r in records if r.geometry is not None and r.dimension == 3]
    if planes and volumes:
        yield make_problem(
            None, "E_SHAPE_NDIM",
            f"{len(planes)} cases are planes ({_shown(planes)}), {len(volumes)} are volumes "
            f"({_shown(volumes)}). Keep one kind.",
        )  # fmt: skip


def _orientation_problems(records: list[_CaseRecord]) -> Iterator[Problem]:
    found = _orientations(records)
    if len(found) > 1:
        listed = ", ".join(f"{code} ({count} cases)" for code, count in found.items())
        message = f"images are stored in {len(found)} orientations: {listed}."
        yield make_problem(None, "W_ORIENTATION", message)


def _label_problems(dataset: Dataset, records: list[_CaseRecord]) -> Iterator[Problem]:
    totals = _summed(record.label_voxels for record in records)
    if not totals:
        return
    for name, values in dataset.label_map.foreground.items():
        if not any(totals.get(value) for value in values):
            message = f"label '{name}' {list(values)} occurs in no case."
            yield make_problem(None, "W_CLASS_ABSENT", message)


def _duplicate_problems(dataset: Dataset, records: list[_CaseRecord]) -> Iterator[Problem]:
    groups: dict[str, list[str]] = {}
    for record in records:
        if record.content:
            groups.setdefault(record.content, []).append(record.case.id)
    for ids in groups.values():
        if len(ids) < 2:
            continue
        yield make_problem(ids[0], "W_DUPLICATE", f"has the same image as {_shown(ids[1:])}.")
        for fold, split in enumerate(dataset.splits):
            for first, second in combinations(ids, 2):
                sides = {name in split.validation for name in (first, second)}
                known = {*split.train, *split.validation}
                if len(sides) == 2 and {first, second} <= known:
                    message = f"fold {fold} trains on one of {first} and {second} and validates "
                    message += "on the other, but they are the same image."
                    yield make_problem(None, "E_SPLIT_LEAK", message)


def _split_problems(dataset: Dataset) -> Iterator[Problem]:
    known = {case.id for case in dataset.training_cases}
    for fold, split in enumerate(dataset.splits):
        unknown = sorted({*split.train, *split.validation} - known)
        if unknown:
            message = f"splits_final.json: fold {fold} names {len(unknown)} cases that are not "
            message += f"there: {_shown(unknown)}."
            yield make_problem(None, "E_SPLIT_CASES", message)
        subjects = read_subjects(dataset.description, sorted(known))
        shared = shared_subjects(split, subjects)
        if shared:
            message = f"splits_final.json: fold {fold} trains and validates on cases of "
            message += f"{len(shared)} subjects: {_shown(shared)}."
            yield make_problem(None, "E_SPLIT_LEAK", message)


def _orientations(records: list[_CaseRecord]) -> dict[str, int]:
    codes = (orientation_code(r.geometry) for r in records if r.geometry is not None)
    return dict(Counter(codes).most_common())


def _summed(parts: Iterator[dict[int, int]]) -> dict[int, int]:
    total: Counter[int] = Counter()
    for part in parts:
        total.update(part)
    return dict(sorted(total.items()))


def _shown(names: Any) -> str:
    listed = list(names)
    more = f" and {len(listed) - _NAMES_SHOWN} more" if len(listed) > _NAMES_SHOWN else ""
    return ", ".join(listed[:_NAMES_SHOWN]) + more
