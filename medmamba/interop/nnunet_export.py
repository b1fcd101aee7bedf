"""Write a planned and preprocessed dataset so that nnU-Net trains it: `nnUNetv2_train`.

nnU-Net reads plans, arrays and properties from its folder ``nnUNet_preprocessed/DatasetXXX_Name``.
Our plans files are nnU-Net's with one block more, and name the class in ``nnunet_network`` that
builds our networks; medmamba must be installed beside nnU-Net. This is the one module that writes
pickles, because nnU-Net reads nothing else there.
"""

import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medmamba.dataset import Dataset, Split, read_splits, write_splits
from medmamba.dataset.splits import SPLITS_FILE
from medmamba.errors import DatasetError
from medmamba.files import replace_atomic, to_json, write_atomic
from medmamba.interop.nnunet_geometry import geometry_properties
from medmamba.plans.fingerprint import Fingerprint, fingerprint_to_nnunet
from medmamba.plans.nnunet_schema import save_plan
from medmamba.plans.plan import Plan
from medmamba.preprocessing.pipeline import UndoRecord
from medmamba.preprocessing.store import CaseStore, StoredCase, array_shape
from medmamba.volume import Geometry

DATASET_NAME = re.compile(r"Dataset\d{3}_.+")


def export_to_nnunet(
    dataset: Dataset,
    plan: Plan,
    fingerprint: Fingerprint,
    stores: Mapping[str, CaseStore],
    root: Path,
    *,
    splits: tuple[Split, ...] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write everything that nnU-Net's training reads; what is there and fits is left alone.

    Args:
        dataset: the raw dataset.
        plan: written as ``<plans_name>.json``.
        fingerprint: written as dataset_fingerprint.json where none is there.
        stores: configuration -> its preprocessed cases.
        root: nnU-Net's folder of preprocessed datasets.
        splits: folds; nnU-Net draws its own, the same ones, when there are none.
        progress: called with (cases done, cases in all).

    Returns:
        The dataset's folder in ``root``.

    Raises:
        DatasetError: the name is not one nnU-Net accepts, the folder holds other folds, or arrays
            of another grid under the same name.
        EnvironmentFault: the folder cannot be written.
    """
    if not DATASET_NAME.fullmatch(dataset.name):
        raise DatasetError(
            f"dataset '{dataset.name}': nnU-Net needs a name like Dataset004_Hippocampus. "
            "Rename the folder of the raw dataset."
        )
    folder = root / dataset.name
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "dataset.json", to_json(dataset.description))
    if not (folder / "dataset_fingerprint.json").is_file():
        write_atomic(
            folder / "dataset_fingerprint.json", to_json(fingerprint_to_nnunet(fingerprint))
        )
    _write_splits(folder / SPLITS_FILE, splits)
    for case in dataset.training_cases:
        if case.labels is not None:
            _copy(case.labels, folder / "gt_segmentations" / f"{case.id}{dataset.file_ending}")
    work = [(name, case) for name, store in stores.items() for case in store.case_ids()]
    for done, (name, case_id) in enumerate(work, start=1):
        target = folder / plan.configurations[name].data_identifier
        _write_case(stores[name], case_id, target, plan.reader)
        if progress is not None:
            progress(done, len(work))
    # The plans come last: with them nnU-Net can start.
    save_plan(folder / f"{plan.plans_name}.json", plan)
    return folder


def _write_splits(path: Path, splits: tuple[Split, ...]) -> None:
    if not splits:
        return
    if path.is_file():
        if read_splits(path) != splits:
            raise DatasetError(
                f"{path}: holds other folds than the dataset. Remove the file, or make them equal.",
                code="E_SPLIT_CONFLICT",
            )
        return
    write_splits(path, splits)


def _write_case(store: CaseStore, case_id: str, folder: Path, reader: str) -> None:
    case = store.open(case_id)
    arrays = {"": case.data.shape, "_seg": None if case.labels is None else case.labels.shape}
    for ending, shape in arrays.items():
        target = folder / f"{case_id}{ending}.b2nd"
        if target.is_file():
            if array_shape(target) != shape:
                raise DatasetError(
                    f"{target}: has shape {array_shape(target)}, this plan gives {shape}: the "
                    f"folder belongs to other plans. Remove {folder}, or write to another folder.",
                    code="E_STORE_CONFLICT",
                )
            continue
        _copy(store.folder / target.name, target)
    properties = folder / f"{case_id}.pkl"
    if not properties.is_file():
        content = pickle.dumps(_properties(case, reader), protocol=4)
        write_atomic(properties, content)


def write_prediction_properties(path: Path, geometry: Geometry, reader: str) -> None:
    """Write what nnU-Net keeps beside the probabilities of a prediction, to go on from them.

    Args:
        path: ``CASE.pkl``.
        geometry: grid of the probabilities.
        reader: nnU-Net's name of the class that writes masks.
    """
    shape = geometry.shape
    content = {
        **geometry_properties(geometry, reader),
        "shape_before_cropping": shape,
        "bbox_used_for_cropping": [[0, size] for size in shape],
        "shape_after_cropping_and_before_resampling": shape,
    }
    write_atomic(path, pickle.dumps(content, protocol=4))


def _properties(case: StoredCase, reader: str) -> dict[str, Any]:
    record: UndoRecord = case.record
    return {
        **geometry_properties(record.geometry, reader),
        "shape_before_cropping": record.shape,
        "bbox_used_for_cropping": [list(side) for side in record.crop_box],
        "shape_after_cropping_and_before_resampling": record.shape_after_crop,
        "class_locations": {
            key if len(key) > 1 else key[0]: _rows(where)
            for key, where in case.class_locations.items()
        },
    }


def _rows(where: np.ndarray[Any, Any]) -> Any:
    if len(where) == 0:
        return []
    return np.concatenate([np.zeros((len(where), 1), np.int64), where.astype(np.int64)], axis=1)


def _copy(source: Path, target: Path) -> None:
    if target.is_file() and target.stat().st_size == source.stat().st_size:
        return
    replace_atomic(target, lambda temporary: shutil.copyfile(source, temporary))
