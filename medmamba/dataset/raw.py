"""Open a raw dataset folder in nnU-Net v2's layout; Decathlon folders go to ``decathlon``.

Only what makes reading impossible is an error here; ``verification`` reports everything else.
"""

import os
import re
from collections.abc import Iterable, Mapping
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
        DatasetError: no folder, no usable dataset.json, or no training case.
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
        dataset = _open_nnunet(folder, description)
    if not dataset.training_cases:
        raise DatasetError(
            f"{folder}: has no training case (no file in imagesTr ends in "
            f"'_0000{dataset.file_ending}'). Check imagesTr and 'file_ending' in dataset.json."
        )
    splits = folder / SPLITS_FILE
    return replace(dataset, splits=read_splits(splits)) if splits.is_file() else dataset


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


def check_description(description: Mapping[str, Any], path: Path) -> None:
    """Check every key that is needed, and report all problems at once.

    Raises:
        DatasetError: listing what is missing or cannot be used.
    """
    problems = []
    checks = (channel_names, file_ending, lambda found: LabelMap.from_dataset_json(dict(found)))
    for check in checks:
        try:
            check(description)
        except DatasetError as problem:
            problems.append(problem.message)
    if "numTraining" not in description:
        problems.append("dataset.json: 'numTraining' is missing; the number of cases is needed.")
    if len(problems) == 1:
        raise DatasetError(problems[0])
    if problems:
        listed = "\n  ".join(problems)
        raise DatasetError(f"{path}: {len(problems)} problems:\n  {listed}")


def _open_nnunet(folder: Path, description: dict[str, Any]) -> Dataset:
    check_description(description, folder / DESCRIPTION_FILE)
    names = channel_names(description)
    ending = file_ending(description)
    listed = description.get("dataset")
    if listed is not None:
        training: tuple[Case, ...] = _listed_cases(folder, listed)
        strays: tuple[Path, ...] = ()
    else:
        training, strays = scan_cases(folder / "imagesTr", ending, labels=folder / "labelsTr")
    test, _ = scan_cases(folder / "imagesTs", ending, labels=None)
    return Dataset(
        folder=folder,
        name=folder.resolve().name,
        description={**description, "channel_names": _numbered(names)},
        channel_names=names,
        label_map=LabelMap.from_dataset_json(description),
        file_ending=ending,
        training_cases=training,
        test_cases=test,
        stray_files=strays,
    )


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


def _listed_cases(folder: Path, listed: Any) -> tuple[Case, ...]:
    if not isinstance(listed, dict):
        raise DatasetError(
            f"dataset.json: 'dataset' is a {type(listed).__name__}; a map case -> files is needed."
        )
    cases = []
    for case_id, entry in sorted(listed.items()):
        images = entry.get("images") if isinstance(entry, dict) else None
        if not isinstance(images, list) or not images:
            raise DatasetError(
                f"dataset.json: 'dataset' entry '{case_id}' is {entry!r}; "
                "'images' (a list of paths) and 'label' are needed."
            )
        label = entry.get("label")
        cases.append(
            Case(
                id=str(case_id),
                images=tuple(_expanded(folder, path) for path in images),
                labels=None if label is None else _expanded(folder, label),
            )
        )
    return tuple(cases)


def _expanded(folder: Path, path: object) -> Path:
    # Joining keeps absolute paths as they are.
    return folder / os.path.expandvars(str(path))


def _numbered(names: tuple[str, ...]) -> dict[str, str]:
    return {str(index): name for index, name in enumerate(names)}
