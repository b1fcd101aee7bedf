"""Datasets that nnU-Net has preprocessed are read; ours are written so that nnU-Net reads them."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import medmamba
from medmamba.dataset import open_dataset
from medmamba.errors import DatasetError, SecurityError
from medmamba.interop.nnunet_geometry import geometry_properties, read_geometry
from medmamba.interop.pickle_reader import read_plain_pickle
from medmamba.preprocessing.store import CaseStore
from medmamba.volume import Geometry

SESSION = Path(__file__).resolve().parents[2] / "plans" / "bench" / "nnunet_session.py"


@pytest.fixture
def exported(ellipsoids: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A work folder, and nnU-Net's folder written beside it."""
    outcome = medmamba.plan(
        ellipsoids,
        tmp_path / "work",
        network="plain_unet",
        configurations=("3d_fullres", "2d"),
        nnunet_folder=tmp_path / "nnUNet_preprocessed",
    )
    assert outcome.nnunet_folder is not None
    return tmp_path / "work", outcome.nnunet_folder


def as_older_nnunet(folder: Path) -> None:
    """Turn chunked arrays into the archives that nnU-Net wrote before."""
    for path in sorted(folder.glob("*.pkl")):
        from medmamba.preprocessing.store import read_array

        data = read_array(path.with_suffix(".b2nd"))
        labels = read_array(folder / f"{path.stem}_seg.b2nd")
        np.savez_compressed(path.with_suffix(".npz"), data=data, seg=labels)
        path.with_suffix(".b2nd").unlink()
        (folder / f"{path.stem}_seg.b2nd").unlink()


def same_case(store: Path, other: Path, case_id: str) -> None:
    ours, theirs = CaseStore(store).open(case_id), CaseStore(other).open(case_id)
    np.testing.assert_array_equal(ours.data[:], theirs.data[:])
    assert ours.labels is not None
    assert theirs.labels is not None
    np.testing.assert_array_equal(ours.labels[:], theirs.labels[:])
    assert list(ours.class_locations) == list(theirs.class_locations)
    for key, where in ours.class_locations.items():
        np.testing.assert_array_equal(where, theirs.class_locations[key])
    assert ours.record.crop_box == theirs.record.crop_box
    assert ours.record.geometry.same_grid_as(theirs.record.geometry)


@pytest.mark.slow
@pytest.mark.parametrize("older", [False, True])
def test_what_was_written_is_read_again(
    exported: tuple[Path, Path], tmp_path: Path, older: bool
) -> None:
    work, folder = exported
    if older:
        as_older_nnunet(folder / "nnUNetPlans_3d_fullres")
    again = medmamba.plan(folder, tmp_path / "again", network="plain_unet")
    assert again.plan is not None
    (store,) = again.stores
    case_ids = CaseStore(store).case_ids()
    assert len(case_ids) == 6
    for case_id in case_ids:
        same_case(work / "preprocessed" / store.name, store, case_id)
    assert (tmp_path / "again" / "splits.json").read_bytes() == (work / "splits.json").read_bytes()
    changed = medmamba.plan(folder, tmp_path / "again", network="lightm_unet_s")
    assert changed.stores == again.stores


def test_a_plan_that_nnunet_has_no_arrays_for_is_refused(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(DatasetError, match="no arrays at 1 x 1 x 1 mm"):
        medmamba.plan(exported[1], tmp_path / "again", spacing_mm=(1.0, 1.0, 1.0))


def test_damaged_cases_are_all_named(exported: tuple[Path, Path], tmp_path: Path) -> None:
    arrays = exported[1] / "nnUNetPlans_3d_fullres"
    (arrays / "case_001.b2nd").unlink()
    (arrays / "case_004.pkl").write_bytes(b"\x80\x04N.")
    with pytest.raises(DatasetError, match=r"(?s)2 cases .*case_001.*case_004"):
        medmamba.plan(exported[1], tmp_path / "again", network="plain_unet")


class _Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch harmed",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "case.pkl"
    path.write_bytes(pickle.dumps({"spacing": _Harm()}))
    with pytest.raises(SecurityError, match="system"):
        read_plain_pickle(path)
    assert not Path("harmed").exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_properties_of_any_protocol_are_read(tmp_path: Path, protocol: int) -> None:
    rows = np.arange(12, dtype=np.int64).reshape(3, 4)
    content = {"spacing": [2.0, 1.0, 1.0], "class_locations": {1: rows, (1, 2): []}}
    (tmp_path / "case.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_plain_pickle(tmp_path / "case.pkl")
    np.testing.assert_array_equal(found["class_locations"][1], rows)
    assert found["class_locations"][1, 2] == []


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO", "NibabelIOWithReorient"])
def test_geometry_goes_there_and_back(reader: str) -> None:
    matrix = np.array(
        [[0.1, 0.9, -0.4, 5.0], [0.3, 0.4, 0.8, -7.0], [2.1, -0.1, 0.1, 11.0], [0, 0, 0, 1]]
    )
    geometry = Geometry.from_matrix((4, 5, 6), matrix)
    found = read_geometry(geometry_properties(geometry, reader), (4, 5, 6), "case")
    assert found.corner_distance(geometry) < 1e-9


def test_other_plans_arrays_are_not_mixed(ellipsoids: Path, exported: tuple[Path, Path]) -> None:
    arrays = exported[1] / "nnUNetPlans_3d_fullres"
    shutil.copy(arrays / "case_001.b2nd", arrays / "case_002.b2nd")
    with pytest.raises(DatasetError, match="belongs to other plans"):
        medmamba.plan(
            ellipsoids, exported[0], network="plain_unet", nnunet_folder=exported[1].parent
        )


def test_names_and_folds_that_nnunet_would_not_take(ellipsoids: Path, tmp_path: Path) -> None:
    target = tmp_path / "nnunet"
    folds = target / ellipsoids.name / "splits_final.json"
    folds.parent.mkdir(parents=True)
    folds.write_text(json.dumps([{"train": ["case_000"], "val": ["case_001"]}]))
    with pytest.raises(DatasetError, match="other folds"):
        medmamba.plan(ellipsoids, tmp_path / "work", network="plain_unet", nnunet_folder=target)
    renamed = ellipsoids.rename(ellipsoids.with_name("Ellipsoids"))
    with pytest.raises(DatasetError, match="Dataset004_Hippocampus"):
        medmamba.plan(renamed, tmp_path / "work", network="plain_unet", nnunet_folder=target)


def test_a_dataset_is_found_by_number(
    ellipsoids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_raw", str(ellipsoids.parent))
    outcome = medmamba.plan("901", tmp_path / "work", network="plain_unet", until="plan")
    assert outcome.report.dataset == open_dataset(ellipsoids).name


@pytest.mark.slow
@pytest.mark.parametrize("network", ["lightm_unet_s", "umamba_bot"])
def test_nnunets_trainer_trains_our_network(ellipsoids: Path, tmp_path: Path, network: str) -> None:
    pytest.importorskip("nnunetv2", reason="the extra 'nnunet' is not installed")
    work = tmp_path / "nnunet"
    medmamba.plan(
        ellipsoids, tmp_path / "work", network=network, nnunet_folder=work / "preprocessed"
    )
    command = [SESSION, "train", work, ellipsoids, "--plans", f"medmamba_{network}"]
    done = subprocess.run(
        [sys.executable, *map(str, command), "--iterations", "1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((work / "results").glob("*/*/fold_0/checkpoint_final.pth"))
