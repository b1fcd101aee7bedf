"""Open a raw dataset folder in nnU-Net v2's layout; Decathlon folders go to ``decathlon``.

Only what makes reading impossible is an error here; ``verification`` reports everything else.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medmamba.dataset.case import Case, Dataset
from medmamba.dataset.decathlon import is_decathlon, named_labels, open_decathlon
from medmamba.dataset.splits import SPLITS_FILE, read_splits
from medmamba.errors import DatasetError
from medmamba.files import read_json
from medmamba.io import FORMATS
from medmamba.labels import LabelMap

DESCRIPTION_FILE = "dataset.json"
_CHANNEL_NAME = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")


def open_dataset(folder: Path | str) -> Dataset:
    """Understand a raw dataset folder (nnU-Net v2 or Medical Segmentation Decathlon).

    Raises:
        DatasetError: no folder, no usable dataset.json, or no training case; all faults of
            dataset.json at once.
    """
    dataset = survey_dataset(folder)
    if dataset.faults:
        raise _faulty(dataset.folder / DESCRIPTION_FILE, dataset.faults)
    return dataset


def survey_dataset(folder: Path | str) -> Dataset:
    """Open a dataset for verification: faults that still let cases be found are noted, not raised.

    Raises:
        DatasetError: no folder, no dataset.json that can be read, or no training case.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"{folder}: is not a folder. Give the folder that holds dataset.json.")
    path = folder / DESCRIPTION_FILE
    if not path.is_file():
        raise DatasetError(
            f"{folder}: has no dataset.json. Give the folder of a raw dataset (with imagesTr and "
            "labelsTr), or write dataset.json."
        )
    description = read_json(path, what="dataset.json", error=DatasetError)
    if not isinstance(description, dict):
        raise DatasetError(f"{path}: holds a {type(description).__name__}; a map is needed.")
    if is_decathlon(description):
        dataset = open_decathlon(folder, description)
    else:
        dataset = _survey_nnunet(folder, description)
    if not dataset.training_cases:
        missing = (
            f"{folder}: has no training case (no file in imagesTr ends in "
            f"'_0000{dataset.file_ending}'). Check imagesTr and 'file_ending' in dataset.json."
        )
        raise _faulty(path, dataset.faults or (missing,))
    return _with_splits(dataset, folder / SPLITS_FILE)


def _with_splits(dataset: Dataset, path: Path) -> Dataset:
    if not path.is_file():
        return dataset
    try:
        return replace(dataset, splits=read_splits(path))
    except DatasetError as fault:
        return replace(dataset, faults=(*dataset.faults, fault.message))


def _faulty(path: Path, faults: Sequence[str]) -> DatasetError:
    if len(faults) == 1:
        return DatasetError(faults[0])
    listed = "\n  ".join(faults)
    return DatasetError(f"{path}: {len(faults)} problems:\n  {listed}")


def read_label_map(path: Path) -> LabelMap:
    """Read what label values mean from a dataset.json alone, of either layout.

    Raises:
        DatasetError: missing, damaged, or labels that cannot be used.
    """
    description = read_json(path, what="dataset.json", error=DatasetError)
    if not isinstance(description, dict):
        raise DatasetError(f"{path}: holds a {type(description).__name__}; a map is needed.")
    if is_decathlon(description):
        description = {"labels": named_labels(description["labels"])}
    return LabelMap.from_dataset_json(description)


def _description_faults(description: Mapping[str, Any]) -> tuple[str, ...]:
    """Check every key that is needed; say what is missing or cannot be used."""
    faults = []
    checks = (channel_names, file_ending, lambda found: LabelMap.from_dataset_json(dict(found)))
    for check in checks:
        try:
            check(description)
        except DatasetError as fault:
            faults.append(fault.message)
    if "numTraining" not in description:
        faults.append("dataset.json: 'numTraining' is missing; the number of cases is needed.")
    return tuple(faults)


def _survey_nnunet(folder: Path, description: dict[str, Any]) -> Dataset:
    faults = _description_faults(description)
    names, labels, ending = _usable_parts(folder, description)
    if not ending:
        raise _faulty(folder / DESCRIPTION_FILE, faults)
    listed = description.get("dataset")
    strays: tuple[Path, ...] = ()
    if listed is not None:
        training, unusable = _listed_cases(folder, listed)
        faults += unusable
    else:
        training, strays = scan_cases(folder / "imagesTr", ending, labels=folder / "labelsTr")
    test, _ = scan_cases(folder / "imagesTs", ending, labels=None)
    return Dataset(
        folder=folder,
        name=folder.resolve().name,
        description={**description, "channel_names": _numbered(names)},
        channel_names=names,
        label_map=labels,
        file_ending=ending,
        training_cases=training,
        test_cases=test,
        stray_files=strays,
        faults=faults,
    )


def _usable_parts(
    folder: Path, description: dict[str, Any]
) -> tuple[tuple[str, ...], LabelMap, str]:
    """Channel names, labels and file ending, or what of them a faulty dataset.json still says."""
    try:
        names = channel_names(description)
    except DatasetError:
        entry = description.get("channel_names", description.get("modality"))
        names = tuple(map(str, entry.values())) if isinstance(entry, dict) else ()
    try:
        labels = LabelMap.from_dataset_json(description)
    except DatasetError:
        labels = LabelMap.declared_in(description)
    try:
        ending = file_ending(description)
    except DatasetError:
        ending = _most_common_ending(folder / "imagesTr")
    return names, labels, ending


def _most_common_ending(images: Path) -> str:
    """The ending that most files have, of those that can be read; empty where none can."""
    found = Counter(
        max((ending for ending in FORMATS if path.name.endswith(ending)), key=len, default="")
        for path in visible_files(images, "")
    )
    del found[""]
    return found.most_common(1)[0][0] if found else ""


def channel_names(description: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names in channel order (``channel_names``, or its old name ``modality``).

    Raises:
        DatasetError: missing, or not numbered from 0 without gaps.
    """
    entry = description.get("channel_names", description.get("modality"))
    if not isinstance(entry, dict) or not entry:
        raise DatasetError(
            f'dataset.json: \'channel_names\' is {entry!r}; a map such as {{"0": "CT"}} is needed.'
        )
    try:
        numbered = {int(key): str(value) for key, value in entry.items()}
    except ValueError:
        numbered = {}
    if sorted(numbered) != list(range(len(entry))):
        raise DatasetError(
            f"dataset.json: 'channel_names' has keys {list(entry)}; "
            f"they must be 0 to {len(entry) - 1}."
        )
    return tuple(numbered[index] for index in range(len(numbered)))


def file_ending(description: Mapping[str, Any]) -> str:
    """Return the suffix of images and labels.

    Raises:
        DatasetError: missing, or a format that cannot be read.
    """
    ending = description.get("file_ending")
    if not isinstance(ending, str) or ending.lower() not in FORMATS:
        raise DatasetError(
            f"dataset.json: 'file_ending' is {ending!r}; one of {', '.join(FORMATS)} is needed."
        )
    return ending


def scan_cases(
    images: Path, ending: str, *, labels: Path | None
) -> tuple[tuple[Case, ...], tuple[Path, ...]]:
    """Group the channel files of a folder into cases; also return files that fit no case."""
    groups: dict[str, list[Path]] = {}
    strays = []
    for path in visible_files(images, ending):
        match = _CHANNEL_NAME.fullmatch(path.name[: -len(ending)])
        if match:
            groups.setdefault(match["case"], []).append(path)
        else:
            strays.append(path)
    cases = []
    for case_id, paths in sorted(groups.items()):
        label = labels / f"{case_id}{ending}" if labels is not None else None
        exists = label is not None and label.is_file()
        cases.append(
            Case(id=case_id, images=tuple(sorted(paths)), labels=label if exists else None)
        )
    return tuple(cases), tuple(strays)


def visible_files(folder: Path, ending: str) -> Iterable[Path]:
    """Yield the files of ``folder`` with the ending, without hidden ones (``._name`` of macOS)."""
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".")]
    yield from (folder / name for name in sorted(names) if name.endswith(ending))


def _listed_cases(folder: Path, listed: Any) -> tuple[tuple[Case, ...], tuple[str, ...]]:
    """Cases of a ``dataset`` entry, and what is wrong with the others."""
    if not isinstance(listed, dict):
        return (), (
            f"dataset.json: 'dataset' is a {type(listed).__name__}; a map case -> files is needed.",
        )
    cases, faults = [], []
    for case_id, entry in sorted(listed.items()):
        images = entry.get("images") if isinstance(entry, dict) else None
        if not isinstance(images, list) or not images:
            faults.append(
                f"dataset.json: 'dataset' entry '{case_id}' is {entry!r}; "
                "'images' (a list of paths) and 'label' are needed."
            )
            continue
        label = entry.get("label")
        cases.append(
            Case(
                id=str(case_id),
                images=tuple(_expanded(folder, path) for path in images),
                labels=None if label is None else _expanded(folder, label),
            )
        )
    return tuple(cases), tuple(faults)


def _expanded(folder: Path, path: object) -> Path:
    # Joining keeps absolute paths as they are.
    return folder / os.path.expandvars(str(path))


def _numbered(names: tuple[str, ...]) -> dict[str, str]:
    return {str(index): name for index, name in enumerate(names)}
