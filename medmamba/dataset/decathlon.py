"""The Medical Segmentation Decathlon's folder layout, understood as an nnU-Net v2 dataset.

One file per case without a channel number (4D when there are several modalities), a ``training``
list, and ``labels`` written the other way round: value -> name (Antonelli et al. 2022).
"""

import re
from pathlib import Path
from typing import Any

from medmamba.dataset.case import Case, Dataset
from medmamba.errors import DatasetError
from medmamba.io import FORMATS
from medmamba.labels import BACKGROUND_NAME, LabelMap

_TASK_FOLDER = re.compile(r"Task(?P<number>\d{1,3})_(?P<name>.+)")
_KEPT_KEYS = ("name", "description", "reference", "licence", "license", "release")


def is_decathlon(description: dict[str, Any]) -> bool:
    """Whether a dataset.json lists its files and names its labels as the Decathlon does."""
    labels = description.get("labels")
    return (
        isinstance(description.get("training"), list)
        and "file_ending" not in description
        and isinstance(labels, dict)
        and all(str(key).isdigit() for key in labels)
    )


def open_decathlon(folder: Path, description: dict[str, Any]) -> Dataset:
    """Build the dataset; ``description`` comes out in nnU-Net v2 form.

    Raises:
        DatasetError: entries of dataset.json that cannot be read.
    """
    names = _modalities(description)
    training = tuple(
        sorted((_training_case(folder, entry) for entry in description["training"]),
               key=lambda case: case.id)
    )  # fmt: skip
    test = tuple(
        sorted((_case(folder, entry, None) for entry in description.get("test") or []),
               key=lambda case: case.id)
    )  # fmt: skip
    ending = _ending(training, folder)
    converted = {
        "channel_names": {str(index): name for index, name in enumerate(names)},
        "labels": named_labels(description["labels"]),
        "numTraining": int(description.get("numTraining", len(training))),
        "file_ending": ending,
        **{key: description[key] for key in _KEPT_KEYS if key in description},
    }
    return Dataset(
        folder=folder,
        name=_name(folder),
        description=converted,
        channel_names=names,
        label_map=LabelMap.from_dataset_json(converted),
        file_ending=ending,
        training_cases=training,
        test_cases=tuple(case for case in test if any(path.is_file() for path in case.images)),
        layout="decathlon",
    )


def _modalities(description: dict[str, Any]) -> tuple[str, ...]:
    entry = description.get("modality", description.get("channel_names"))
    if not isinstance(entry, dict) or not all(str(key).isdigit() for key in entry) or not entry:
        raise DatasetError(
            f'dataset.json: \'modality\' is {entry!r}; a map such as {{"0": "MRI"}} is needed.'
        )
    return tuple(str(entry[key]) for key in sorted(entry, key=int))


def named_labels(entry: dict[str, Any]) -> dict[str, int]:
    """Turn the Decathlon's value -> name into name -> value."""
    labels: dict[str, int] = {}
    for key in sorted(entry, key=int):
        value, name = int(key), str(entry[key])
        if value == 0:
            name = BACKGROUND_NAME
        elif name in labels:
            name = f"{name}_{value}"
        labels[name] = value
    return labels


def _training_case(folder: Path, entry: Any) -> Case:
    if not isinstance(entry, dict) or "image" not in entry:
        raise DatasetError(
            f"dataset.json: 'training' entry is {entry!r}; 'image' and 'label' are needed."
        )
    label = entry.get("label")
    return _case(folder, entry["image"], None if label is None else folder / str(label))


def _case(folder: Path, image: object, label: Path | None) -> Case:
    path = folder / str(image)
    ending = next((end for end in FORMATS if path.name.lower().endswith(end)), "")
    stem = path.name[: len(path.name) - len(ending)]
    images: tuple[Path, ...] = (path,)
    if not path.is_file():
        # The first nnU-Net numbered the files but not the list.
        numbered = sorted(path.parent.glob(f"{_escaped(stem)}_[0-9][0-9][0-9][0-9]{ending}"))
        images = tuple(numbered) or images
    exists = label is not None and label.is_file()
    return Case(id=stem, images=images, labels=label if exists else None)


def _escaped(stem: str) -> str:
    return re.sub(r"([\[\]?*])", r"[\1]", stem)


def _ending(cases: tuple[Case, ...], folder: Path) -> str:
    endings = {
        end
        for case in cases
        for end in [next((e for e in FORMATS if case.images[0].name.lower().endswith(e)), "")]
    }
    if len(endings) > 1 or "" in endings:
        raise DatasetError(
            f"{folder}: images end in {', '.join(sorted(endings)) or 'nothing'}; "
            f"one ending out of {', '.join(FORMATS)} is needed."
        )
    return endings.pop() if endings else ".nii.gz"


def _name(folder: Path) -> str:
    match = _TASK_FOLDER.fullmatch(folder.resolve().name)
    if not match:
        return folder.resolve().name
    return f"Dataset{int(match['number']):03d}_{match['name']}"
