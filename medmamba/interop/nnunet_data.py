"""nnU-Net's preprocessed datasets: found, and their cases brought into a store of ours.

::

    nnUNet_preprocessed/Dataset004_X/
      dataset.json  dataset_fingerprint.json  nnUNetPlans.json  splits_final.json
      nnUNetPlans_3d_fullres/<case>.b2nd  <case>_seg.b2nd  <case>.pkl      or older:
      nnUNetPlans_3d_fullres/<case>.npz (data, seg)  <case>.pkl            and unpacked .npy

Pickles are read by a reader that knows plain values and arrays only.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba.dataset.splits import SPLITS_FILE, Split, read_splits
from medmamba.errors import DatasetError, MedMambaError
from medmamba.files import hash_file, hash_values, read_json
from medmamba.interop.nnunet_geometry import read_geometry
from medmamba.interop.pickle_reader import read_plain_pickle
from medmamba.plans.fingerprint import Fingerprint, fingerprint_from_nnunet
from medmamba.plans.nnunet_schema import load_plan
from medmamba.plans.plan import ConfigurationPlan, Plan
from medmamba.preprocessing.batch import map_bounded, worker_count
from medmamba.preprocessing.locations import ClassLocations
from medmamba.preprocessing.pipeline import PreprocessedCase, UndoRecord
from medmamba.preprocessing.recipe import PreprocessingRecipe
from medmamba.preprocessing.store import CaseStore, read_array
from medmamba.volume import Grid

FINGERPRINT_FILE = "dataset_fingerprint.json"
DESCRIPTION_FILE = "dataset.json"
IMPORT_FORMAT = 1
"""Raised when the same files would give another store."""


@dataclass(frozen=True, kw_only=True)
class NnunetDataset:
    """A preprocessed dataset of nnU-Net.

    Args:
        description: dataset.json.
        plans: every plans file by its name, such as ``nnUNetPlans``.
        splits: folds of splits_final.json; empty when there is none.
    """

    folder: Path
    description: dict[str, Any]
    fingerprint: Fingerprint
    plans: Mapping[str, Plan]
    splits: tuple[Split, ...] = ()

    def source_of(self, wanted: ConfigurationPlan) -> Path | None:
        """Return the folder of arrays on the grid and by the recipe of ``wanted``, if any."""
        for plan in self.plans.values():
            for branch in plan.configurations.values():
                same = branch.grid.spacing_mm == wanted.grid.spacing_mm
                folder = self.folder / branch.data_identifier
                if same and branch.preprocessing == wanted.preprocessing and case_ids(folder):
                    return folder
        return None


def is_nnunet_preprocessed(folder: Path) -> bool:
    """Tell whether a folder is a preprocessed dataset of nnU-Net and not a raw one."""
    return (folder / FINGERPRINT_FILE).is_file() and not (folder / "imagesTr").is_dir()


def open_preprocessed(folder: Path) -> NnunetDataset:
    """Read everything but the arrays.

    Raises:
        DatasetError: dataset.json or the fingerprint is missing or damaged.
        PlanError: a plans file cannot be used.
    """
    description = read_json(folder / DESCRIPTION_FILE, what=str(folder), error=DatasetError)
    fingerprint = read_json(folder / FINGERPRINT_FILE, what=str(folder), error=DatasetError)
    splits = folder / SPLITS_FILE
    plans = {path.stem: load_plan(path) for path in _plans_files(folder)}
    return NnunetDataset(
        folder=folder,
        description=description,
        fingerprint=fingerprint_from_nnunet(fingerprint, folder.resolve().name),
        plans=plans,
        splits=read_splits(splits) if splits.is_file() else (),
    )


def case_ids(folder: Path) -> tuple[str, ...]:
    """List the cases of a folder of arrays, sorted."""
    return tuple(sorted(path.stem for path in folder.glob("*.pkl")))


def import_cases(
    source: Path,
    store: CaseStore,
    *,
    grid: Grid,
    recipe: PreprocessingRecipe,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Bring every case of a folder of arrays into a store; those that are there are left alone.

    Args:
        source: a folder such as ``nnUNetPlans_3d_fullres``.
        store: where cases go.
        grid: on which the arrays are.
        recipe: by which they were made.
        workers: cases worked on at once; one a core, at most 8, when None.
        progress: called with (cases done, cases in all).

    Returns:
        How many cases were brought in anew.

    Raises:
        DatasetError: cases that cannot be read, all of them; the others are stored.
        SecurityError: a pickle holds more than data.
    """

    def work(case_id: str) -> tuple[bool, str]:
        try:
            return _import_one(source, case_id, store, grid, recipe), ""
        except DatasetError as problem:
            return False, problem.message

    cases = case_ids(source)
    store.remove_leftovers()
    made, problems = 0, []
    with ThreadPoolExecutor(worker_count(workers)) as pool:
        for done, (is_new, problem) in enumerate(map_bounded(pool, work, cases), start=1):
            made += is_new
            problems += [problem] if problem else []
            if progress is not None:
                progress(done, len(cases))
    if problems:
        raise DatasetError(
            f"{source}: {len(problems)} cases cannot be used:\n  " + "\n  ".join(problems),
            code="E_STORE_DAMAGED",
        )
    return made


def _plans_files(folder: Path) -> list[Path]:
    found = []
    for path in sorted(folder.glob("*.json")):
        if path.name in (DESCRIPTION_FILE, FINGERPRINT_FILE, SPLITS_FILE):
            continue
        content = read_json(path, what=str(path), error=DatasetError)
        if isinstance(content, dict) and "configurations" in content:
            found.append(path)
    return found


def _import_one(
    source: Path, case_id: str, store: CaseStore, grid: Grid, recipe: PreprocessingRecipe
) -> bool:
    files = sorted(path for path in source.glob(f"{case_id}*") if _belongs(path, case_id))
    key = hash_values([IMPORT_FORMAT, [[path.name, hash_file(path)] for path in files]])
    if store.has(case_id, key):
        return False
    what = f"case {case_id} in {source}"
    properties = read_plain_pickle(source / f"{case_id}.pkl")
    if not isinstance(properties, Mapping):
        raise DatasetError(f"{what}: its .pkl holds no properties. Preprocess it again.")
    data, labels = _read_arrays(source, case_id, what)
    try:
        record = _record(properties, grid, recipe, data.shape[1:], what)
        locations = _locations(properties.get("class_locations", {}))
    except (KeyError, TypeError, ValueError, IndexError) as problem:
        raise DatasetError(
            f"{what}: its properties cannot be used ({problem!r}). Preprocess it again."
        ) from problem
    made = PreprocessedCase(data=data, labels=labels, record=record, class_locations=locations)
    store.write(case_id, made, key=key, patch_size=grid.patch_size)
    return True


def _belongs(path: Path, case_id: str) -> bool:
    return path.name.partition(".")[0] in (case_id, f"{case_id}_seg") or path.stem == case_id


def _read_arrays(
    source: Path, case_id: str, what: str
) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
    chunked, archive = source / f"{case_id}.b2nd", source / f"{case_id}.npz"
    unpacked = [source / f"{case_id}{end}.npy" for end in ("", "_seg")]
    try:
        if chunked.is_file():
            data, labels = read_array(chunked), read_array(source / f"{case_id}_seg.b2nd")
        elif all(path.is_file() for path in unpacked):
            data, labels = (np.load(path, allow_pickle=False) for path in unpacked)
        elif archive.is_file():
            with np.load(archive, allow_pickle=False) as content:
                data, labels = content["data"], content["seg"]
        else:
            raise DatasetError(f"{what}: no arrays ({case_id}.b2nd or .npz). Preprocess it again.")
    except MedMambaError:
        raise
    except Exception as problem:
        # Damaged archives fail in many ways: zip, zlib, header, missing array.
        raise DatasetError(
            f"{what}: its arrays are damaged ({problem}). Preprocess it again."
        ) from problem
    if data.ndim != 4 or labels.shape != (1, *data.shape[1:]):
        raise DatasetError(f"{what}: arrays of {data.shape} and {labels.shape} do not fit.")
    return data.astype(np.float32, copy=False), labels.astype(np.int16, copy=False)


def _record(
    properties: Mapping[str, Any],
    grid: Grid,
    recipe: PreprocessingRecipe,
    working_shape: tuple[int, ...],
    what: str,
) -> UndoRecord:
    forward = recipe.transpose_forward
    shape = [int(size) for size in properties["shape_before_cropping"]]
    raw_shape = tuple(shape[forward.index(axis)] for axis in range(3))
    spacing = [float(properties["spacing"][axis]) for axis in forward]
    working = grid.spacing_mm if grid.dimension == 3 else (spacing[0], *grid.spacing_mm)
    box = [(int(start), int(stop)) for start, stop in properties["bbox_used_for_cropping"]]
    cropped = [int(s) for s in properties["shape_after_cropping_and_before_resampling"]]
    return UndoRecord(
        geometry=read_geometry(properties, raw_shape, what),
        transpose_forward=forward,
        spacing_mm=(spacing[0], spacing[1], spacing[2]),
        shape=(shape[0], shape[1], shape[2]),
        crop_box=(box[0], box[1], box[2]),
        shape_after_crop=(cropped[0], cropped[1], cropped[2]),
        working_spacing_mm=(working[0], working[1], working[2]),
        working_shape=(working_shape[0], working_shape[1], working_shape[2]),
    )


def _locations(found: Mapping[Any, Any]) -> ClassLocations:
    locations: ClassLocations = {}
    for key, where in found.items():
        name = tuple(int(value) for value in key) if isinstance(key, tuple) else (int(key),)
        rows = np.asarray(where, dtype=np.int64).reshape(len(where), -1)
        # The first column is the channel, which is always 0.
        locations[name] = rows[:, -3:].astype(np.int32) if len(rows) else _no_rows()
    return locations


def _no_rows() -> NDArray[np.int32]:
    return np.zeros((0, 3), dtype=np.int32)
