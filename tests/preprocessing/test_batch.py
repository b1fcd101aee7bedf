import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medmamba.dataset import open_dataset
from medmamba.errors import DatasetError, EnvironmentFault
from medmamba.preprocessing import batch
from medmamba.preprocessing.batch import Target, preprocess_cases
from medmamba.preprocessing.recipe import ChannelRecipe, Normalization, PreprocessingRecipe
from medmamba.preprocessing.store import CaseStore
from medmamba.volume import Grid

GRID = Grid(spacing_mm=(1.5, 0.9, 0.9), patch_size=(8, 16, 16))
RECIPE = PreprocessingRecipe(
    channels=(ChannelRecipe(normalization=Normalization.ZSCORE),), transpose_forward=(0, 1, 2)
)


def write_dataset(folder: Path, *, cases: int = 5) -> Path:
    root = folder / "Dataset778_Boxes"
    for name in ("imagesTr", "labelsTr"):
        (root / name).mkdir(parents=True)
    for index in range(cases):
        voxels = np.random.default_rng(index).normal(100, 20, (24, 22, 12)).astype(np.float32)
        labels = np.zeros(voxels.shape, np.uint8)
        labels[5:15, 5:15, 3:9] = 1
        affine = np.diag([1.0, 1.0, 2.0, 1.0])
        nibabel.save(
            nibabel.Nifti1Image(voxels, affine), root / "imagesTr" / f"c{index}_0000.nii.gz"
        )
        nibabel.save(nibabel.Nifti1Image(labels, affine), root / "labelsTr" / f"c{index}.nii.gz")
    description = {
        "channel_names": {"0": "T1"},
        "labels": {"background": 0, "box": 1},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def target(store: CaseStore, grid: Grid = GRID) -> Target:
    return Target(store=store, grid=grid, recipe=RECIPE)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_case_once_and_again_only_what_changed(tmp_path: Path) -> None:
    dataset, store = open_dataset(write_dataset(tmp_path)), CaseStore(tmp_path / "store")
    steps: list[tuple[int, int]] = []
    made = preprocess_cases(dataset, [target(store)], progress=lambda *step: steps.append(step))
    assert made == 5
    assert steps == [(done, 5) for done in range(1, 6)]
    assert store.case_ids() == ("c0", "c1", "c2", "c3", "c4")
    assert preprocess_cases(dataset, [target(store)]) == 0
    # A larger patch changes chunks only; stored cases stay.
    wider = Grid(spacing_mm=GRID.spacing_mm, patch_size=(16, 16, 16))
    assert preprocess_cases(dataset, [target(store, wider)]) == 0
    path = dataset.training_cases[2].images[0]
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj) * 2 + 1, image.affine), path)
    assert preprocess_cases(dataset, [target(store)]) == 1
    coarser = Grid(spacing_mm=(3.0, 1.8, 1.8), patch_size=(8, 8, 8))
    assert preprocess_cases(dataset, [target(store, coarser)]) == 5


def test_a_bad_case_is_named_and_the_others_are_stored(tmp_path: Path) -> None:
    dataset, store = open_dataset(write_dataset(tmp_path)), CaseStore(tmp_path / "store")
    path = dataset.training_cases[1].images[0]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DatasetError, match="case c1"):
        preprocess_cases(dataset, [target(store)])
    assert store.case_ids() == ("c0", "c2", "c3", "c4")


def test_a_full_disk_ends_it_and_what_is_finished_stays(tmp_path: Path, monkeypatch) -> None:
    dataset, store = open_dataset(write_dataset(tmp_path)), CaseStore(tmp_path / "store")
    write, written = CaseStore.write, []

    def write_two(self: CaseStore, case_id: str, *arguments, **options) -> None:
        written.append(case_id)
        if len(written) > 2:
            raise EnvironmentFault("c.b2nd: the disk is full", code="E_IO_NOSPACE")
        write(self, case_id, *arguments, **options)

    monkeypatch.setattr(CaseStore, "write", write_two)
    with pytest.raises(EnvironmentFault, match="the disk is full") as caught:
        preprocess_cases(dataset, [target(store)], workers=1)
    assert caught.value.code == "E_IO_NOSPACE"
    assert len(store.case_ids()) == 2
    monkeypatch.undo()
    assert preprocess_cases(dataset, [target(store)]) == 3


def test_killed_and_run_again_it_gives_the_same_bytes(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, cases=8)
    code = (
        "import sys; from pathlib import Path; from medmamba.dataset import open_dataset;"
        "from medmamba.preprocessing.batch import Target, preprocess_cases;"
        "from medmamba.preprocessing.recipe import *;"
        "from medmamba.preprocessing.store import CaseStore; from medmamba.volume import Grid;"
        "channel = ChannelRecipe(normalization=Normalization.ZSCORE);"
        "recipe = PreprocessingRecipe(channels=(channel,), transpose_forward=(0, 1, 2));"
        "grid = Grid(spacing_mm=(1.5, 0.9, 0.9), patch_size=(8, 16, 16));"
        "target = Target(store=CaseStore(Path(sys.argv[2])), grid=grid, recipe=recipe);"
        "preprocess_cases(open_dataset(Path(sys.argv[1])), [target])"
    )
    store = tmp_path / "store"
    victim = subprocess.Popen([sys.executable, "-c", code, str(root), str(store)])
    while not list(store.glob("c*.json")) and victim.poll() is None:
        time.sleep(0.002)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    dataset = open_dataset(root)
    preprocess_cases(dataset, [target(CaseStore(store))])
    undisturbed = tmp_path / "undisturbed"
    preprocess_cases(dataset, [target(CaseStore(undisturbed))], workers=1)
    assert content(store) == content(undisturbed)


def test_several_grids_are_made_in_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(write_dataset(tmp_path))
    planes = Grid(spacing_mm=(1.1, 1.1), patch_size=(16, 16))
    apart, together = ([CaseStore(tmp_path / side / name) for name in ("3d", "2d")]
                       for side in ("apart", "together"))  # fmt: skip
    preprocess_cases(dataset, [target(apart[0])])
    preprocess_cases(dataset, [target(apart[1], planes)])
    reads: list[str] = []
    load = batch.load_case
    monkeypatch.setattr(batch, "load_case", lambda case: reads.append(case.id) or load(case))
    made = preprocess_cases(dataset, [target(together[0]), target(together[1], planes)])
    assert made == 10
    assert sorted(reads) == ["c0", "c1", "c2", "c3", "c4"]
    for one, other in zip(apart, together, strict=True):
        assert content(one.folder) == content(other.folder)


def test_damaged_arrays_are_made_again(tmp_path: Path) -> None:
    dataset, store = open_dataset(write_dataset(tmp_path)), CaseStore(tmp_path / "store")
    preprocess_cases(dataset, [target(store)])
    whole = content(store.folder)
    for name, change in (("c0.b2nd", lambda data: data[:-40] + b"x" * 40), ("c1_seg.b2nd", None)):
        path = store.folder / name
        path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DatasetError, match=r"c1_seg\.b2nd: is missing"):
        store.open("c1")
    assert preprocess_cases(dataset, [target(store)]) == 2
    assert content(store.folder) == whole


def test_every_bad_case_is_named(tmp_path: Path) -> None:
    dataset, store = open_dataset(write_dataset(tmp_path)), CaseStore(tmp_path / "store")
    for case in dataset.training_cases[1:3]:
        case.images[0].write_bytes(case.images[0].read_bytes()[:200])
    with pytest.raises(DatasetError, match=r"(?s)2 of 5 cases.*case c1.*case c2"):
        preprocess_cases(dataset, [target(store)])
